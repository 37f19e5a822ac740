"""Metrics of HiP attention."""

from vllm_plugins.metrics import MetricSpec

DECODES = MetricSpec(
    "hip_decode_queries_total",
    "counter",
    "Query tokens of decode steps, by kind: sparse or dense.",
    (),
    "kind",
)
REFRESHES = MetricSpec(
    "hip_refreshes_total",
    "counter",
    "Decodes that ran a pruning stage, by the first stage that ran (0 is the coarsest).",
    (),
    "stage",
)
REUSED = MetricSpec(
    "hip_reused_selections_total",
    "counter",
    "Decodes that attended to what an earlier step had selected.",
)
CONTEXT = MetricSpec(
    "hip_context_tokens_total",
    "counter",
    "Tokens that sparse decodes would have attended to in a dense layer.",
)
PREFILLS = MetricSpec(
    "hip_prefill_queries_total",
    "counter",
    "Query tokens of prompts, by kind: sparse or dense.",
    (),
    "kind",
)

ALL = (DECODES, REFRESHES, REUSED, CONTEXT, PREFILLS)
