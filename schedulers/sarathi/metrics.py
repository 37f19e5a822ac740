"""Metrics of Sarathi-Serve."""

from vllm_plugins.metrics import SECONDS_BUCKETS, TOKEN_BUCKETS, MetricSpec

BUDGET = MetricSpec(
    "sarathi_step_token_budget",
    "histogram",
    "Token budget of steps with prefill work, in rows.",
    TOKEN_BUCKETS,
)
PREDICTED = MetricSpec(
    "sarathi_predicted_step_seconds",
    "histogram",
    "Step time that the cost model predicted.",
    SECONDS_BUCKETS,
)
MEASURED = MetricSpec(
    "sarathi_measured_step_seconds", "histogram", "Step time that was measured.", SECONDS_BUCKETS
)
ERROR = MetricSpec(
    "sarathi_cost_model_error",
    "histogram",
    "Relative error of the prediction, |predicted - measured| / measured.",
    (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0),
)
CORRECTION = MetricSpec(
    "sarathi_cost_model_correction",
    "gauge",
    "Factor g by which the profiled step time is corrected.",
)
MARGIN = MetricSpec(
    "sarathi_margin", "gauge", "Factor by which steps are planned to stay below their target."
)
TBT_MISSES = MetricSpec(
    "sarathi_tbt_slo_misses_total",
    "counter",
    "Tokens that came later after the one before than their target.",
)
TTFT_MISSES = MetricSpec(
    "sarathi_ttft_slo_misses_total", "counter", "First tokens that came later than their target."
)
INFEASIBLE = MetricSpec(
    "sarathi_infeasible_steps_total",
    "counter",
    "Steps whose least budget was predicted to exceed the target less the margin.",
)
STALLED = MetricSpec(
    "sarathi_stalled_decodes_total", "counter", "Decodes that could have run in a step and did not."
)
INVALID = MetricSpec(
    "sarathi_invalid_targets_total",
    "counter",
    "Requests whose own latency target was malformed and was ignored.",
)
REORDERED = MetricSpec(
    "sarathi_reordered_steps_total",
    "counter",
    "Steps before which the waiting queue was put into another order.",
)

ALL = (
    BUDGET,
    PREDICTED,
    MEASURED,
    ERROR,
    CORRECTION,
    MARGIN,
    TBT_MISSES,
    TTFT_MISSES,
    INFEASIBLE,
    STALLED,
    INVALID,
    REORDERED,
)
