"""What stored KV is offered to a request: a plan that pays, or why there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_plugins.kv_connectors.kvshare.index import SegmentIndex
    from vllm_plugins.kv_connectors.kvshare.planner import Plan, Planner
    from vllm_plugins.kv_connectors.kvshare.plugin import KVShareOptions
    from vllm_plugins.kv_connectors.kvshare.request_state import RequestState
    from vllm_plugins.kv_connectors.kvshare.tally import Refusal

# Blending must promise to save this share of a span's work, or the request is left alone.
LEAST_SAVING = 0.1


class Offers:
    """Looks requests up in the index.

    Args:
        options: The plug-in's options.
        planner: Makes plans from the index.
        index: The stored segments.
        block_size: Tokens of a KV block.
        layers: Decoder layers of the model.
    """

    def __init__(
        self,
        options: KVShareOptions,
        planner: Planner,
        index: SegmentIndex,
        block_size: int,
        layers: int,
    ) -> None:
        self._options, self._planner, self._index = options, planner, index
        self._block = block_size
        # Share of a token's work that is spent on it even when it is reused.
        self._always = (options.check_layer + 1) / layers

    def plan(self, state: RequestState, computed: int) -> Refusal | None:
        """Plan a request's reuse from the end of its prefix hit on, in ``state.planned``.

        Args:
            state: A request that may reuse KV.
            computed: Tokens that the prefix cache holds for it, a multiple of the block size.

        Returns:
            Why the plan does not pay; None where it does.
        """
        assert state.domain is not None
        known = state.planned
        if known is None or known.start != computed or known.version != self._index.version:
            # The last token is always computed by vLLM, which samples from it.
            last = min(len(state.tokens), state.request.num_tokens - 1)
            end = last // self._block * self._block
            if end - computed < self._options.min_reuse:
                return "short"
            known = self._planner.plan(state.domain, state.tokens, computed, end)
            exact_only = self._options.mode == "exact_only"
            known = state.planned = known.shortened(self._block, exact_only)
        return self._objection(known)

    def _objection(self, plan: Plan) -> Refusal | None:
        if plan.reused < self._options.min_reuse:
            return "unknown"
        # At its neutral setting the plug-in recomputes everything, which pays nobody: it is for
        # measuring, and whoever sets it wants it done.
        if plan.is_exact or self._options.recompute_min == 1.0:
            return None
        work = plan.work(self._always, self._options.recompute_max)
        return "not_worth" if work > (1 - LEAST_SAVING) * (plan.end - plan.start) else None

    def measure_share(self, state: RequestState) -> int:
        """Look up the share of a prompt that is stored, into ``state.share``.

        Returns:
            The tokens that had to be looked at.
        """
        state.share, state.share_version = 0.0, self._index.version
        if state.domain is None or state.barred is not None:
            return 0
        count = len(state.tokens)
        plan = self._planner.plan(state.domain, state.tokens, 0, count)
        state.share = plan.reused / max(count, 1)
        return count
