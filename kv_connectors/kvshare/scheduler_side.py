"""KVShare beside the scheduler: plans reuse, keeps the index, tells the workers.

It promises the scheduler a span of the prompt as if a remote cache held it; the request waits while
the workers make that true (``blend.py``) and is then scheduled from the end of the span on.
"""

from __future__ import annotations

import os
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.request import RequestStatus

from vllm_plugins.kv_connectors.kvshare import metrics as m
from vllm_plugins.kv_connectors.kvshare.chunking import ChunkSizes
from vllm_plugins.kv_connectors.kvshare.domains import Domains
from vllm_plugins.kv_connectors.kvshare.index import SegmentIndex, Stored
from vllm_plugins.kv_connectors.kvshare.offers import EngineShape, Offers
from vllm_plugins.kv_connectors.kvshare.operator_desk import OperatorDesk, operator_orders
from vllm_plugins.kv_connectors.kvshare.planner import Plan, Planner
from vllm_plugins.kv_connectors.kvshare.request_state import (
    NO_HIT,
    Hit,
    RequestState,
    is_mixed,
    text_of,
)
from vllm_plugins.kv_connectors.kvshare.tainted import TaintedChains
from vllm_plugins.kv_connectors.kvshare.tally import Tally
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
    from collections.abc import Sequence

    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from vllm_plugins.kv_connectors.kvshare.disk import Catalogue
    from vllm_plugins.kv_connectors.kvshare.plugin import KVShareOptions
    from vllm_plugins.metrics import Metrics

# Ends of a request that reach its sender; an aborted one has none any more.
ANSWERED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


class SchedulerSide:
    """What the connector does in the scheduler's process.

    Args:
        options: The plug-in's options.
        shape: What is to be known of the engine.
        capacity: Tokens that the workers' largest tier holds.
        metrics: Where to count.
        catalogue: The disk tier, from which the index is refilled; None without one.
    """

    _blocks: KVCacheManager
    _chains: TaintedChains

    def __init__(
        self,
        options: KVShareOptions,
        shape: EngineShape,
        capacity: int,
        metrics: Metrics,
        catalogue: Catalogue | None = None,
    ) -> None:
        self._options = options
        self.index = SegmentIndex(capacity)
        self._catalogue = catalogue
        self._domains = Domains(options, catalogue.domain_key if catalogue else os.urandom(32))
        public = self._domains.public
        self._planner = Planner(
            self.index,
            options.min_run,
            options.max_generation,
            ChunkSizes(options.chunk_min, options.chunk_max),
            public,
            exact_only=options.mode == "exact_only",
        )
        self._offers = Offers(options, self._planner, self.index, shape)
        self._desk = OperatorDesk(operator_orders(options), self.index, public)
        self._metrics, self._tally = metrics, Tally(metrics)
        # Looks in one step; they take half of the workers' slice, so that blending goes on.
        assert options.fix_tokens_per_step is not None
        self._looks = max(1, options.fix_tokens_per_step // 2 // (options.decode_k + 1))
        self._states: dict[str, RequestState] = {}
        self._orders = Orders()
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
        self._chains = TaintedChains(manager.block_pool)

    def promise(self, request: Request, computed: int) -> int | None:
        """Return how many tokens beyond ``computed`` reuse can provide; None to be asked again.

        Args:
            request: A request that is about to be admitted.
            computed: Tokens that the prefix cache holds for it, a multiple of the block size.
        """
        state = self._state(request)
        state.cached = computed
        if self._chains.redirects(state, self._offers.reach(state)):
            return None
        state.refusal = state.barred or self._offers.plan(state, computed)
        if state.refusal is not None:
            return 0
        assert state.planned is not None
        return state.planned.end - computed

    def hits(self, requests: Sequence[Request], most: int) -> list[Hit]:
        """Return what each waiting request would find in the store.

        Args:
            requests: Waiting requests.
            most: Prompt tokens to look up anew, whose last look-up is oldest; the last prompt may
                exceed it. The others' hits are as of their last look-up, and none before it.
        """
        states = [self._states.get(request.request_id) for request in requests]
        versions = [-1 if state is None else state.hit_version for state in states]
        left = most
        for index in sorted(range(len(requests)), key=versions.__getitem__):
            if left <= 0 or versions[index] == self.index.version:
                break
            state = states[index] = self._state(requests[index])
            left -= self._offers.measure(state)
        return [NO_HIT if state is None else state.hit for state in states]

    def domain(self, request: Request) -> bytes | None:
        """Return the digest of a request's tenant domain; None where it shares with nobody."""
        return self._domains.of(request.cache_salt)

    def _state(self, request: Request) -> RequestState:
        state = self._states.get(request.request_id)
        if state is None:
            state = RequestState(request, text_of(request), self.domain(request))
            self._states[request.request_id] = state
            if not is_mixed(request):
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

    def admitted(self, request: Request, promised: int) -> None:
        """Order what was promised, now that the request has its blocks.

        Args:
            request: The request.
            promised: Tokens that `promise` returned; 0 where nothing is to be loaded.
        """
        state = self._states.get(request.request_id)
        if state is None or not promised:
            self._refuse(state)
            return
        plan = state.planned
        assert plan is not None and plan.end - plan.start == promised
        self.index.pin(plan.segments)
        state.pinned, state.used, state.loading = plan.segments, plan, True
        exact = plan.is_exact
        looked_at = not exact and state.may_refresh and self._options.decode_interval
        state.refreshed = 0 if looked_at else None
        if not exact:
            end, generation = plan.end, plan.generation_at(plan.end) - 1
            self._chains.leave(state, min(plan.exact_prefix_end, end), end, generation)
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

    def _refuse(self, state: RequestState | None) -> None:
        """Count a request that is computed in full; one that was preempted has been counted."""
        if state is not None and state.refusal is not None:
            if not state.request.num_preemptions:
                self._tally.refused(state.refusal)
            state.refusal = None

    def _block_ids(self, request_id: str) -> np.ndarray:
        return np.array(self._blocks.get_block_ids(request_id)[0], dtype=np.int32)

    def orders(self, output: SchedulerOutput) -> Orders:
        """Return what the workers have to do in this step."""
        self._chains.settle(output.num_scheduled_tokens)
        due: list[tuple[int, RequestState]] = []
        for request_id, scheduled in output.num_scheduled_tokens.items():
            state = self._states.get(request_id)
            if state is None:
                continue
            if not state.stored:
                self._store_if_complete(state, scheduled)
            since = self._tokens_since_look(state)
            if since >= self._options.decode_interval:
                due.append((since, state))
        self._order_looks(due)
        orders, self._orders = self._orders, Orders()
        # What one request of this step stored may have made room for the next one's already.
        gone = set(orders.evicted)
        orders.saves = [save for save in orders.saves if save.key not in gone]
        self._metrics.set(m.STORED.name, self.index.used)
        self._metrics.set(m.SEGMENTS.name, len(self.index))
        self._metrics.inc(m.EVICTED.name, len(orders.evicted))
        return orders

    def _store_if_complete(self, state: RequestState, scheduled: int) -> None:
        """Store `state.tokens` in the step that completes them, which others may follow."""
        request = state.request
        # vLLM counts this step's tokens only after it has asked for the orders.
        if request.num_computed_tokens + scheduled < len(state.tokens):
            return
        state.stored = True
        if state.root is not None:
            self._metrics.inc(m.REPEATED.name, max(state.cached - state.root.position, 0))
        if not state.may_store or (request.num_preemptions and (state.used or state.root)):
            # After a preemption the prefix cache may have given back approximate blocks.
            return
        stored = self._store(state)
        self._orders.evicted += stored.evicted
        if state.order is not None:
            state.answer, gone = self._desk.registered(state.order, stored)
            self._orders.evicted += gone
        blocks = self._block_ids(request.request_id)
        for segment in stored.segments:
            if segment is not None:
                label = None if self._catalogue is None else Label.of(segment)
                place = segment.key, segment.position, len(segment)
                self._orders.saves.append(Save(*place, blocks, label))

    def _store(self, state: RequestState) -> Stored:
        assert state.domain is not None
        start, end, done = 0, len(state.tokens), state.used
        if state.root is not None:
            # What is before was stored by whose blocks it has.
            start = state.cached
            done = done or Plan(start, end, (), -1, state.root.generation)
        if state.order is not None:
            # All of it, whatever is stored already: each canonical text goes by itself.
            start = min(state.order.context, end)
            done = Plan(start, end, (), self.index.version)
        drafts = self._planner.new_segments(state.domain, state.tokens, done, start, end)
        return self.index.store(state.domain, drafts)

    def _tokens_since_look(self, state: RequestState) -> int:
        """Return what was generated since the last look at stale tokens; -1 where none are left."""
        # Asked again each time: a session's later input may bring an image.
        if not state.may_refresh:
            state.refreshed = None
        if state.refreshed is None:
            return -1
        return state.request.num_output_tokens - state.refreshed

    def _order_looks(self, due: list[tuple[int, RequestState]]) -> None:
        """Have the stale tokens of those looked at who wait longest; the others stay due."""
        due.sort(key=itemgetter(0), reverse=True)
        for _, state in due[: self._looks]:
            request, name = state.request, state.request.request_id
            state.refreshed = request.num_output_tokens
            # The last token was sampled from the one before it, whose KV is therefore computed
            # however many steps are in flight.
            last = request.num_tokens - 2
            token_id = request.all_token_ids[last]
            self._orders.refreshes.append(Refresh(name, last, token_id, self._block_ids(name)))

    def heard(self, output: KVConnectorOutput) -> None:
        """Take the workers' report."""
        results = output.kv_connector_worker_meta
        if isinstance(results, Results):
            self._take_counts(results)
        for request_id in output.finished_recving or ():
            self._release(request_id)
        if isinstance(results, Results):
            self._lose(results.lost)
            self._decline(results.failed)

    def _take_counts(self, results: Results) -> None:
        """Count what is complete by now, however its requests end."""
        for request_id in results.recomputed:
            state = self._states.get(request_id)
            if state is not None and state.used is not None:
                self._tally.reused(state.used)
        for request_id, count in results.refreshed.items():
            state = self._states.get(request_id)
            if state is not None and not count:
                state.refreshed = None
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
                self._chains.fail(state)
                state.declined, state.refreshed, state.refusal = True, None, "failed"
                if not state.request.num_preemptions:
                    # Else the prefix cache may have given back what an earlier plan made.
                    state.used = None

    def ended(self, request: Request) -> dict[str, Any] | None:
        """Drop a request that finished or was aborted.

        Returns:
            What its sender is told beside the output: the answer to an operator's order.
        """
        self._chains.settle([request.request_id])
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
            if order.do == "evict":
                self._chains.forget(self._states.values())
        return {"kvshare": {"operator": state.answer}}

    def reset(self) -> bool:
        """Forget everything that is stored, as when the weights change.

        Returns:
            Whether nothing was in use, so that all is gone.
        """
        gone = self._desk.release_all()
        gone += [key for key in list(self.index) if self.index.remove(key)]
        self._chains.forget(self._states.values())
        self._orders.evicted += gone
        return not len(self.index)
