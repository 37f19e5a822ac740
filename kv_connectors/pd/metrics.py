"""Metrics of prefill/decode disaggregation."""

from vllm_plugins.metrics import SECONDS_BUCKETS, MetricSpec

HANDED_OVER = MetricSpec(
    "pd_handed_over_total", "counter", "Prompts whose KV this instance kept for others to pull."
)
HELD = MetricSpec("pd_held_blocks", "gauge", "Blocks that wait to be pulled from here.")
EXPIRED = MetricSpec(
    "pd_expired_leases_total", "counter", "Leases that nobody renewed, whose blocks were freed."
)
SENT = MetricSpec(
    "pd_sent_bytes_total",
    "counter",
    "Bytes of KV that left, by when: early before the prompt's last step was over, or late.",
    (),
    "when",
)
QUEUED = MetricSpec("pd_queued", "gauge", "Requests whose prompt waits to be pulled.")
ACCEPTED = MetricSpec(
    "pd_accepted_blocks", "gauge", "Blocks of prompts that are being pulled or wait to run."
)
PULLED = MetricSpec("pd_pulled_tokens_total", "counter", "Prompt tokens whose KV was pulled.")
RECEIVED = MetricSpec(
    "pd_received_bytes_total",
    "counter",
    "Bytes of KV pulled, by way: tcp, unix, shared_memory or cuda_ipc.",
    (),
    "way",
)
PULL_SECONDS = MetricSpec(
    "pd_pull_seconds", "histogram", "Duration of a prompt's pull in a worker, in s.",
    SECONDS_BUCKETS,
)  # fmt: skip
RECOMPUTED = MetricSpec(
    "pd_recomputed_total",
    "counter",
    "Prompts that were computed here after all, by reason: local (too little was missing), "
    "unwanted (vLLM computes it in any case, as for prompt_logprobs), gone, closed, timeout, "
    "damaged, refused, incompatible, position (its state stands elsewhere), cancelled, malformed "
    "or error.",
    (),
    "reason",
)

ALL = (HANDED_OVER, HELD, EXPIRED, SENT, QUEUED, ACCEPTED, PULLED, RECEIVED, PULL_SECONDS,
       RECOMPUTED)  # fmt: skip

WAYS = ("tcp", "unix", "shared_memory", "cuda_ipc")
REASONS = (
    "local", "unwanted", "gone", "closed", "timeout", "damaged", "refused", "incompatible",
    "position", "cancelled", "malformed", "error",
)  # fmt: skip
# Label values that exist from the start.
LABELS = {SENT.name: ("early", "late"), RECEIVED.name: WAYS, RECOMPUTED.name: REASONS}
