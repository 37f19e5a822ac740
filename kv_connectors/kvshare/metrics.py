"""Metrics of KVShare."""

from vllm_plugins.metrics import MetricSpec

DEVIATION_BUCKETS = (1e-5, 1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

REQUESTS = MetricSpec(
    "kvshare_requests_total",
    "counter",
    "Requests that reused stored KV, by kind: exact or blend.",
    (),
    "kind",
)
REFUSED = MetricSpec(
    "kvshare_refused_requests_total",
    "counter",
    "Requests that reused nothing, by reason: short (less than min_reuse tokens beyond the prefix "
    "cache's hit), unknown (less than min_reuse of them stored), not_worth, media (less than "
    "min_reuse before the first image, or embeddings), unsigned, full_prefill (log-probabilities "
    "of the prompt), failed, opted_out, operator.",
    (),
    "reason",
)
REUSED = MetricSpec(
    "kvshare_reused_tokens_total",
    "counter",
    "Prompt tokens that took stored KV, by kind: exact or approximate.",
    (),
    "kind",
)
REPEATED = MetricSpec(
    "kvshare_repeated_tokens_total",
    "counter",
    "Prompt tokens whose KV was blended, or computed behind such KV, for an earlier prompt that "
    "begins alike, and was still in vLLM's own prefix cache.",
)
GAPS = MetricSpec(
    "kvshare_gap_tokens_total",
    "counter",
    "Prompt tokens between reused ones that were computed with them.",
)
RECOMPUTED = MetricSpec(
    "kvshare_recomputed_tokens_total",
    "counter",
    "Reused tokens that were computed again because they deviated.",
)
REFRESHED = MetricSpec(
    "kvshare_refreshed_tokens_total",
    "counter",
    "Reused tokens that were computed again while their request was decoding.",
)
LOST = MetricSpec(
    "kvshare_lost_segments_total",
    "counter",
    "Stored segments whose KV was missing, damaged or found no room; what needed it was computed.",
)
EVICTED = MetricSpec(
    "kvshare_evicted_segments_total",
    "counter",
    "Stored segments that are gone: they made room, were lost, or the operator evicted them.",
)
BYPASSES = MetricSpec(
    "kvshare_bypasses_total",
    "counter",
    "With order=hit_rate, requests admitted before an earlier one of their tenant domain.",
)
DEVIATION = MetricSpec(
    "kvshare_relative_deviation",
    "histogram",
    "Squared deviation of a reused token's values at the check layer from what a full prefill "
    "gives there, over the mean squared norm of the reused values.",
    DEVIATION_BUCKETS,
)
STORED = MetricSpec("kvshare_stored_tokens", "gauge", "Tokens whose KV is stored.")
SEGMENTS = MetricSpec("kvshare_stored_segments", "gauge", "Segments that are stored.")

ALL = (
    REQUESTS,
    REFUSED,
    REUSED,
    REPEATED,
    GAPS,
    RECOMPUTED,
    REFRESHED,
    DEVIATION,
    LOST,
    EVICTED,
    STORED,
    SEGMENTS,
)
