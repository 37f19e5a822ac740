"""What stored KV is offered to a request: a plan that pays, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm_plugins.kv_connectors.kvshare.request_state import NO_HIT, Hit, is_mixed
from vllm_plugins.kv_connectors.kvshare.work import PROJECTION, PassSize

if TYPE_CHECKING:
    from vllm_plugins.kv_connectors.kvshare.index import SegmentIndex
    from vllm_plugins.kv_connectors.kvshare.planner import Plan, Planner
    from vllm_plugins.kv_connectors.kvshare.plugin import KVShareOptions
    from vllm_plugins.kv_connectors.kvshare.request_state import RequestState
    from vllm_plugins.kv_connectors.kvshare.tally import Refusal

# Blending must promise to save this share of a span's work, or the request is left alone.
LEAST_SAVING = 0.1


@dataclass(frozen=True)
class EngineShape:
    """What the work of a blend depends on in an engine.

    Attributes:
        block_size: Tokens of a KV block.
        layers: Decoder layers of the model.
        max_runs: Runs of rows that a pass of the partial forward holds, ``max_num_seqs``.
    """

    block_size: int
    layers: int
    max_runs: int


class Offers:
    """Looks requests up in the index.

    Args:
        options: The plug-in's options.
        planner: Makes plans from the index.
        index: The stored segments.
        shape: What its work depends on in the engine.
    """

    def __init__(
        self,
        options: KVShareOptions,
        planner: Planner,
        index: SegmentIndex,
        shape: EngineShape,
    ) -> None:
        self._options, self._planner, self._index = options, planner, index
        self._block = shape.block_size
        # Share of a token's work that is spent on it even when it is reused.
        self._always = (options.check_layer + PROJECTION) / shape.layers
        assert options.fix_tokens_per_step is not None
        self._pass = PassSize(shape.max_runs, options.fix_tokens_per_step)

    def reach(self, state: RequestState) -> int:
        """Return the position up to which a request may be blended; 0 where it may not at all."""
        end = self._end(state)
        may = state.barred is None and end - state.cached >= self._options.min_reuse
        return end if may else 0

    def _end(self, state: RequestState) -> int:
        # The last token is always computed by vLLM, which samples from it.
        return min(len(state.tokens), state.request.num_tokens - 1) // self._block * self._block

    def plan(self, state: RequestState, computed: int) -> Refusal | None:
        """Plan a request's reuse from the end of its prefix hit on, in ``state.planned``.

        Args:
            state: A request that may reuse KV.
            computed: Tokens that the prefix cache holds for it, a multiple of the block size.

        Returns:
            Why the plan does not pay; None where it does.
        """
        assert state.domain is not None
        known, behind = state.planned, _behind(state)
        if (
            known is None
            or (known.start, known.behind) != (computed, behind)
            or known.version != self._index.version
        ):
            end = self._end(state)
            if end - computed < self._options.min_reuse:
                few = is_mixed(state.request) and end < self._options.min_reuse
                return "media" if few else "short"
            known = self._planner.plan(state.domain, state.tokens, computed, end)
            exact_only = self._options.mode == "exact_only"
            known = replace(known.shortened(self._block, exact_only), behind=behind)
            state.planned = known
        return self._objection(known)

    def _objection(self, plan: Plan) -> Refusal | None:
        if plan.reused < self._options.min_reuse:
            return "unknown"
        # At its neutral setting the plug-in recomputes everything, which pays nobody: it is for
        # measuring, and whoever sets it wants it done.
        if plan.is_exact or self._options.recompute_min == 1.0:
            return None
        span = plan.end - plan.start
        return "not_worth" if span - self._work(plan) < LEAST_SAVING * span else None

    def _work(self, plan: Plan) -> float:
        """Return what carrying a plan out may cost, in tokens through all layers."""
        if plan.is_exact:
            return 0.0
        span = plan.end - plan.start
        again, apart = self._again(plan)
        rows, runs = span - plan.reused + again, apart + len(plan.gaps)
        upper = self._pass.cost(rows, runs, (span - rows) / max(runs, 1.0))
        return self._always * self._pass.cost(span) + (1 - self._always) * upper

    def _again(self, plan: Plan) -> tuple[float, float]:
        """Return how many reused tokens may be computed again, and in how many runs they stand."""
        options = self._options
        if options.selector == "none":
            return 0.0, 0.0
        if options.selector == "epic":
            return float(options.link_tokens * len(plan.runs)), float(len(plan.runs))
        # One by one: 302 such rows were seen in 259 runs.
        most = options.recompute_max * plan.reused
        return most, most

    def measure(self, state: RequestState) -> int:
        """Look up what a waiting request would find in the store, into ``state.hit``.

        Returns:
            The tokens that had to be looked at.
        """
        state.hit, state.hit_version = NO_HIT, self._index.version
        if state.domain is None or state.barred is not None:
            return 0
        count = len(state.tokens)
        plan = self._planner.plan(state.domain, state.tokens, 0, count)
        offer = plan.shortened(self._block, self._options.mode == "exact_only")
        saved = 0.0 if self._objection(offer) else offer.end - offer.start - self._work(offer)
        state.hit = Hit(plan.reused / max(state.request.num_prompt_tokens, 1), max(saved, 0.0))
        return count


def _behind(state: RequestState) -> int:
    """Return the generation of the KV that the prefix cache may hold for a request; -1 if exact."""
    found = -1 if state.root is None else state.root.generation
    # One that was preempted may get back what an earlier plan of its own made.
    used = state.used
    return found if used is None or used.is_exact else max(found, used.generation_at(used.end) - 1)
