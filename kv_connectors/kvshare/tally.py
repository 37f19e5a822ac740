"""What the metrics and the log say of who reused stored KV, and why others did not."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal, get_args

from vllm.logger import init_logger

from vllm_plugins.kv_connectors.kvshare import metrics as m

if TYPE_CHECKING:
    from vllm_plugins.kv_connectors.kvshare.planner import Plan
    from vllm_plugins.metrics import Metrics

logger = init_logger("vllm.vllm_plugins.kvshare")

Refusal = Literal[
    "short", "unknown", "not_worth", "media", "unsigned", "full_prefill", "failed", "opted_out",
    "operator",
]  # fmt: skip
"""Why a request reuses nothing; `CAUSES` and the metric's text say what each means."""

# Requests after which the store should have served one.
WARM_UP = 100
# What is to be looked at where that is the reason of most.
CAUSES: dict[Refusal, str] = {
    "short": "beyond the prefix cache's hit, prompts have less than min_reuse tokens",
    "unknown": "prompts have less than min_reuse tokens in common with what is stored in their "
    "domain; differing cache_salts, a store too small or texts that the tokenizer cuts differently "
    "may be why",
    "not_worth": "gaps, recompute_max and the passes that few --max-num-seqs make of it leave less "
    "than a tenth of the work to save",
    "media": "before their first image prompts have less than min_reuse tokens, or they have "
    "embeddings; KV of these and of what is behind them is not told from token ids",
    "unsigned": "requests name no tenant, or come by a way that passes the front door",
    "full_prefill": "requests ask for a full prefill, as log-probabilities of the prompt do",
    "failed": "stored KV was lost or not read in time; see the warnings above",
}


class Tally:
    """Counts requests, and warns once where reuse never happens.

    Args:
        metrics: Where to count.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._refused: Counter[Refusal] = Counter()
        self._quiet = False
        # A series that appears late hides its first increase.
        for kind in ("exact", "blend"):
            metrics.inc(m.REQUESTS.name, 0, kind)
        for kind in ("exact", "approximate"):
            metrics.inc(m.REUSED.name, 0, kind)
        for reason in get_args(Refusal):
            metrics.inc(m.REFUSED.name, 0, reason)

    def reused(self, plan: Plan) -> None:
        """Count a request whose KV was put together by a plan."""
        self._quiet = True
        exact_tokens = sum(run.length for run in plan.runs if run.exact)
        self._metrics.inc(m.REQUESTS.name, 1, "exact" if plan.is_exact else "blend")
        self._metrics.inc(m.REUSED.name, exact_tokens, "exact")
        self._metrics.inc(m.REUSED.name, plan.reused - exact_tokens, "approximate")
        self._metrics.inc(m.GAPS.name, plan.end - plan.start - plan.reused)

    def refused(self, reason: Refusal) -> None:
        """Count a request that reuses nothing."""
        self._metrics.inc(m.REFUSED.name, 1, reason)
        # Who wants none is no sign of anything.
        if self._quiet or reason not in CAUSES:
            return
        self._refused[reason] += 1
        if self._refused.total() == WARM_UP:
            self._quiet = True
            logger.warning(
                "kvshare: none of the first %d requests reused stored KV (%s); the likely cause: "
                "%s",
                WARM_UP,
                ", ".join(f"{name}: {count}" for name, count in self._refused.most_common()),
                CAUSES[self._refused.most_common(1)[0][0]],
            )
