"""KVShare beside the scheduler: plans reuse, keeps the index, tells the workers.

It promises the scheduler a span of the prompt as if a remote cache held it; the request waits while
the workers make that true (``blend.py``) and is then scheduled from the end of the span on.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import RequestStatus

from vllm_plugins.kv_connectors.kvshare import metrics as m
from vllm_plugins.kv_connectors.kvshare.chunking import ChunkSizes
from vllm_plugins.kv_connectors.kvshare.domains import Domains
from vllm_plugins.kv_connectors.kvshare.index import SegmentIndex, Stored
from vllm_plugins.kv_connectors.kvshare.operator_desk import OperatorDesk, operator_orders
from vllm_plugins.kv_connectors.kvshare.planner import Plan, Planner
from vllm_plugins.kv_connectors.kvshare.request_state import RequestState
from vllm_plugins.kv_connectors.kvshare.segments import Segment, as_tokens
from vllm_plugins.kv_connectors.kvshare.transfer import (
    Label,
    Orders,
    Refresh,
    Results,
    Reuse,
    Save,
    sources_of,
)

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from vllm_plugins.kv_connectors.kvshare.disk import Catalogue
    from vllm_plugins.kv_connectors.kvshare.plugin import KVShareOptions
    from vllm_plugins.metrics import Metrics

# Blending must promise to save this share of a span's work, or the request is left alone.
LEAST_SAVING = 0.1
# Ends of a request that reach its sender; an aborted one has none any more.
ANSWERED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


class SchedulerSide:
    """What the connector does in the scheduler's process.

    Args:
        options: The plug-in's options.
        block_size: Tokens of a KV block.
        layers: Decoder layers of the model.
        capacity: Tokens that the workers' largest tier holds.
        metrics: Where to count.
        catalogue: The disk tier, from which the index is refilled; None without one.
    """

    def __init__(
        self,
        options: KVShareOptions,
        block_size: int,
        layers: int,
        capacity: int,
        metrics: Metrics,
        catalogue: Catalogue | None = None,
    ) -> None:
        self._options = options
        self._block = block_size
        # Share of a token's work that is spent on it even when it is reused.
        self._always = (options.check_layer + 1) / layers
        self.index = SegmentIndex(capacity)
        self._catalogue = catalogue
        self._domains = Domains(options, catalogue.domain_key if catalogue else os.urandom(32))
        public = self._domains.public
        sizes = ChunkSizes(options.chunk_min, options.chunk_max)
        self._planner = Planner(
            self.index,
            options.min_run,
            options.max_generation,
            sizes,
            public,
            exact_only=options.mode == "exact_only",
        )
        self._desk = OperatorDesk(operator_orders(options), self.index, public)
        self._metrics = metrics
        self._states: dict[str, RequestState] = {}
        self._orders = Orders()
        self._blocks: KVCacheManager | None = None
        if catalogue is not None:
            # What an operator registered is to be registered again: its name is not on disk.
            labels = {k: v for k, v in catalogue.labels().items() if v.domain != public}
            self.index.restore(labels, catalogue.first_key)
            self._orders.known = list(self.index)

    def close(self) -> None:
        """Let another server use the disk tier."""
        if self._catalogue is not None:
            self._catalogue.close()

    @property
    def has_news(self) -> bool:
        """Whether there are orders that must not wait for the next request."""
        return bool(self._orders.evicted)

    def bind(self, manager: KVCacheManager) -> None:
        """Take vLLM's KV cache manager, which knows the requests' blocks."""
        self._blocks = manager

    def promise(self, request: Request, computed: int) -> int:
        """Return how many tokens beyond ``computed`` reuse can provide.

        Args:
            request: A request that is about to be admitted.
            computed: Tokens that the prefix cache holds for it, a multiple of the block size.
        """
        state = self._state(request)
        if state is None or not state.may_reuse:
            return 0
        plan = self._plan(state, computed)
        return 0 if plan is None else plan.end - computed

    def stored_share(self, request: Request) -> float:
        """Return the share of a waiting request's prompt that is stored, in [0, 1]."""
        state = self._state(request)
        if state is None or state.domain is None or not state.may_reuse:
            return 0.0
        if state.share_version != self.index.version:
            plan = self._planner.plan(state.domain, state.tokens, 0, len(state.tokens))
            state.share = plan.reused / max(len(state.tokens), 1)
            state.share_version = self.index.version
        return state.share

    def domain(self, request: Request) -> bytes | None:
        """Return the digest of a request's tenant domain; None where it shares with nobody."""
        return self._domains.of(request.cache_salt)

    def _state(self, request: Request) -> RequestState | None:
        """Return a request's state; None where its text does not say what its KV is."""
        state = self._states.get(request.request_id)
        if state is None:
            mixed = request.mm_features or request.prompt_embeds is not None
            if request.prompt_token_ids is None or mixed:
                return None
            tokens = as_tokens(request.prompt_token_ids)
            state = RequestState(request, tokens, self.domain(request))
            self._states[request.request_id] = state
            self._take_order(state)
        return state

    def _take_order(self, state: RequestState) -> None:
        """See whether a request comes from the server's operator."""
        order = state.order = self._desk.order(state.request)
        if order is None or order.do != "register":
            return
        refusal = self._desk.refusal(order)
        if refusal:
            state.answer, state.stored = {"error": refusal}, True
        else:
            state.domain = self._domains.public

    def _plan(self, state: RequestState, computed: int) -> Plan | None:
        """Plan from the end of the prefix hit on; None where reuse does not pay."""
        assert state.domain is not None
        known = state.planned
        if known is None or known.start != computed or known.version != self.index.version:
            # The last token is always computed by vLLM, which samples from it.
            last = min(len(state.tokens), state.request.num_tokens - 1)
            end = last // self._block * self._block
            if end - computed < self._options.min_reuse:
                return None
            known = self._planner.plan(state.domain, state.tokens, computed, end)
            exact_only = self._options.mode == "exact_only"
            state.planned = known.shortened(self._block, exact_only)
        return self._worth_it(state.planned)

    def _worth_it(self, plan: Plan | None) -> Plan | None:
        if plan is None or plan.reused < self._options.min_reuse:
            return None
        if plan.is_exact:
            return plan
        recomputed = self._options.recompute_max * plan.reused
        gaps = plan.end - plan.start - plan.reused
        span = plan.end - plan.start
        work = self._always * span + (1 - self._always) * (gaps + recomputed)
        # At its neutral setting the plug-in recomputes everything, which pays nobody: it is for
        # measuring, and whoever sets it wants it done.
        neutral = self._options.recompute_min == 1.0
        return plan if neutral or work <= (1 - LEAST_SAVING) * span else None

    def admitted(self, request: Request, promised: int) -> None:
        """Order what was promised, now that the request has its blocks.

        Args:
            request: The request.
            promised: Tokens that `promise` returned; 0 where nothing is to be loaded.
        """
        state = self._states.get(request.request_id)
        if state is None or not promised:
            return
        plan = state.planned
        assert plan is not None and plan.end - plan.start == promised
        self.index.pin(plan.segments)
        state.pinned, state.used, state.loading = plan.segments, plan, True
        exact = plan.is_exact
        # Not again after a preemption: what the prefix cache gives back then is not told apart.
        looked_at = not exact and not request.num_preemptions and self._options.decode_interval
        state.refreshed = 0 if looked_at else None
        if not exact:
            self._taint(request, min(plan.exact_prefix_end, plan.end))
        self._orders.reuses.append(
            Reuse(
                request.request_id,
                state.tokens[: plan.end],
                plan.start,
                sources_of(plan.runs),
                self._block_ids(request.request_id),
                exact,
            )
        )
        self._count(plan, exact)

    def _count(self, plan: Plan, exact: bool) -> None:
        exact_tokens = sum(run.length for run in plan.runs if run.exact)
        self._metrics.inc(m.REQUESTS.name, 1, "exact" if exact else "blend")
        self._metrics.inc(m.REUSED.name, exact_tokens, "exact")
        self._metrics.inc(m.REUSED.name, plan.reused - exact_tokens, "approximate")
        self._metrics.inc(m.GAPS.name, plan.end - plan.start - plan.reused)

    def _taint(self, request: Request, position: int) -> None:
        """Keep approximate blocks out of the exact prefix cache.

        From the first block that is not exact on, the chain of block hashes goes on from a random
        value, so nobody but this request, after a preemption, can find its blocks. The exact head
        of the prompt stays shared.
        """
        assert self._blocks is not None
        block = self._blocks.block_pool.hash_block_size
        whole = position // block
        if whole < len(request.block_hashes):
            del request.block_hashes[whole:]
            request.block_hashes.append(BlockHash(os.urandom(32)))
            request.update_block_hashes()

    def _block_ids(self, request_id: str) -> np.ndarray:
        assert self._blocks is not None
        return np.array(self._blocks.get_block_ids(request_id)[0], dtype=np.int32)

    def orders(self, output: SchedulerOutput) -> Orders:
        """Return what the workers have to do in this step."""
        for request_id, scheduled in output.num_scheduled_tokens.items():
            state = self._states.get(request_id)
            if state is None:
                continue
            if not state.stored:
                self._store_if_complete(state, scheduled)
            if state.refreshed is not None:
                self._refresh_if_due(state, state.refreshed)
        orders, self._orders = self._orders, Orders()
        # What one request of this step stored may have made room for the next one's already.
        gone = set(orders.evicted)
        orders.saves = [save for save in orders.saves if save.key not in gone]
        self._metrics.set(m.STORED.name, self.index.used)
        self._metrics.set(m.SEGMENTS.name, len(self.index))
        self._metrics.inc(m.EVICTED.name, len(orders.evicted))
        return orders

    def _store_if_complete(self, state: RequestState, scheduled: int) -> None:
        """Store the prompt in the step that completes it."""
        request = state.request
        # vLLM counts this step's tokens only after it has asked for the orders.
        if request.num_computed_tokens + scheduled < len(state.tokens):
            return
        state.stored = True
        if not state.may_store or (request.num_preemptions and state.used):
            # After a preemption the prefix cache may have given back approximate blocks.
            return
        stored = self._store(state)
        self._orders.evicted += stored.evicted
        if state.order is not None:
            state.answer, gone = self._desk.registered(state.order, stored)
            self._orders.evicted += gone
        blocks = self._block_ids(request.request_id)
        self._orders.saves += [
            Save(segment.key, segment.position, len(segment), blocks, self._label(segment))
            for segment in stored.segments
            if segment is not None
        ]

    def _label(self, segment: Segment) -> Label | None:
        return None if self._catalogue is None else Label.of(segment)

    def _store(self, state: RequestState) -> Stored:
        assert state.domain is not None
        start, done = 0, state.used
        if state.order is not None:
            # All of it, whatever is stored already: each canonical text goes by itself.
            start = min(state.order.context, len(state.tokens))
            done = Plan(start, len(state.tokens), (), self.index.version)
        drafts = self._planner.new_segments(
            state.domain, state.tokens, done, start, len(state.tokens)
        )
        return self.index.store(state.domain, drafts)

    def _refresh_if_due(self, state: RequestState, last: int) -> None:
        request = state.request
        if request.num_preemptions:
            state.refreshed = None
        elif request.num_output_tokens - last >= self._options.decode_interval:
            state.refreshed = request.num_output_tokens
            # The last token was sampled from the one before it, whose KV is therefore computed
            # however many steps are in flight.
            known = as_tokens(request.all_token_ids)[: request.num_tokens - 1]
            self._orders.refreshes.append(
                Refresh(request.request_id, known, self._block_ids(request.request_id))
            )

    def heard(self, output: KVConnectorOutput) -> None:
        """Take the workers' report."""
        for request_id in output.finished_recving or ():
            self._release(request_id)
        results = output.kv_connector_worker_meta
        if isinstance(results, Results):
            self._lose(results.lost)
            self._decline(results.failed)
            self._metrics.inc(m.RECOMPUTED.name, sum(results.recomputed.values()))
            self._metrics.inc(m.REFRESHED.name, sum(results.refreshed.values()))
            for counts, total in results.deviations.values():
                self._metrics.observe_counts(m.DEVIATION.name, counts, total)

    def _release(self, request_id: str) -> None:
        state = self._states.get(request_id)
        if state is None:
            return
        self._orders.evicted += self.index.unpin(state.pinned)
        state.pinned, state.loading = [], False
        if state.request.is_finished():
            del self._states[request_id]

    def _lose(self, keys: set[int]) -> None:
        """Forget segments whose KV is gone."""
        for key in keys:
            if key not in self.index:
                # Another rank or request has reported it already.
                continue
            self._metrics.inc(m.LOST.name)
            if self.index.remove(key):
                self._orders.evicted.append(key)
            self._orders.evicted += self._desk.lost(key)

    def _decline(self, request_ids: set[str]) -> None:
        """Have requests computed in full whose KV could not be put together."""
        for request_id in request_ids:
            state = self._states.get(request_id)
            if state is not None:
                state.declined, state.refreshed = True, None
                if not state.request.num_preemptions:
                    # Else the prefix cache may have given back what an earlier plan made.
                    state.used = None

    def ended(self, request: Request) -> dict[str, Any] | None:
        """Drop a request that finished or was aborted.

        Returns:
            What its sender is told beside the output: the answer to an operator's order.
        """
        state = self._states.get(request.request_id)
        if state is None:
            return None
        if state.loading:
            # The workers still write to its blocks; they say when they no longer do.
            self._orders.cancelled.append(request.request_id)
        else:
            del self._states[request.request_id]
        return self._answer(state)

    def _answer(self, state: RequestState) -> dict[str, Any] | None:
        order, finished = state.order, state.request.status in ANSWERED
        if order is None or not finished:
            return None
        if order.do != "register":
            state.answer, gone = self._desk.carry_out(order)
            self._orders.evicted += gone
        return {"kvshare": {"operator": state.answer}}

    def reset(self) -> bool:
        """Forget everything that is stored, as when the weights change.

        Returns:
            Whether nothing was in use, so that all is gone.
        """
        gone = self._desk.release_all()
        gone += [key for key in list(self.index) if self.index.remove(key)]
        self._orders.evicted += gone
        return not len(self.index)
