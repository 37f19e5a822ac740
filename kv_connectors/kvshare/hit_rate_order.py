"""Order of waiting requests by how much of their prompt is stored.

A request that reuses most of its prompt is through soon, and while it waits what it reuses may be
evicted, so it goes first (KVShare, arXiv 2503.16525, abstract: admission by KV hit rate), among
the requests of its tenant domain. The formula is **our guess**: the share of the prompt that is
stored, plus the time it has waited over the time that weighs as much as a whole hit.

Beside a plug-in that orders by remaining prefill (spf), what counts is the prefill that reuse
leaves: a long prompt that is stored goes like a short one, and a short one that is not stored need
not wait for it. The formula and the ageing are then that plug-in's.

Within its domain nobody is overtaken more than ``max_bypass`` times by those that only the store
puts before it: by later ones, or beside spf by those that spf would have let wait. Against all
others waiting adds up, in both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_plugins.engine.policy import SchedulerPolicy, Step, StepPlan, prefill_left
from vllm_plugins.kv_connectors.kvshare.metrics import BYPASSES
from vllm_plugins.kv_connectors.kvshare.request_state import NO_HIT, Hit

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_plugins.kv_connectors.kvshare.scheduler_side import SchedulerSide

# Prompt tokens that are looked up anew in one step when the store has changed; 1,000 take a
# millisecond at most (`benchmarks/kvshare_planner.py`).
LOOKED_UP_PER_STEP = 8192
# Places that are given by rank in one step, of all domains; each costs a look at its whole domain.
# A step seldom admits as many, though requests that load what is stored take no slot; those behind
# come in the order that does not know the store. The next step ranks anew.
RANKED_PER_STEP = 64


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the order needs to know about one waiting request.

    Attributes:
        arrived: When it arrived, in seconds.
        blind: Score by the order that does not know the store.
        place: The blind score of the one in whose place it stands, of the same domain.
        score: What orders it within its domain, smallest first. All scores fall alike as time goes
            by, so that their order does not depend on it.
        bypassed: How often one of its domain that is later by the blind order was admitted before
            it.
        started: Whether it has been admitted already and was preempted.
        domain: Digest of the tenant domain; None where nothing is stored of the request.
    """

    arrived: float
    blind: float
    place: float
    score: float
    bypassed: int
    started: bool
    domain: bytes | None = None

    @property
    def blind_rank(self) -> tuple[bool, float, float]:
        """What it would be ordered by if nothing were stored."""
        return not self.started, self.arrived if self.started else self.blind, self.arrived


def places(waiting: Sequence[Waiting]) -> list[int]:
    """Return the indices of waiting requests in the order of the places that they have."""
    return sorted(range(len(waiting)), key=lambda i: (not waiting[i].started, waiting[i].place))


def hit_rate_order(waiting: Sequence[Waiting], max_bypass: int) -> list[int]:
    """Return the indices of waiting requests in the order in which to admit them.

    Args:
        waiting: The requests.
        max_bypass: Nobody is overtaken more often by later ones of its domain, later in the order
            that does not know the store.

    Returns:
        Each index once; behind the first ``RANKED_PER_STEP`` a domain's requests are in the order
        that does not know the store.
    """

    def rank(index: int) -> tuple[bool, float]:
        request = waiting[index]
        return not request.started, request.arrived if request.started else request.score

    # Each domain keeps the places that it has without the store, so that nobody's wait tells what
    # another domain has stored.
    by_place = places(waiting)
    own: dict[bytes | None, list[int]] = {}
    for index in sorted(by_place, key=lambda i: waiting[i].blind_rank):
        own.setdefault(waiting[index].domain, []).append(index)
    turns = {
        domain: _turns(waiting, blind, sorted(blind, key=rank), max_bypass)
        for domain, blind in own.items()
    }
    first = [next(turns[waiting[index].domain]) for index in by_place[:RANKED_PER_STEP]]
    taken = set(first)
    rest = {domain: iter([i for i in blind if i not in taken]) for domain, blind in own.items()}
    return first + [next(rest[waiting[index].domain]) for index in by_place[RANKED_PER_STEP:]]


def _turns(
    waiting: Sequence[Waiting], blind: list[int], ranked: list[int], max_bypass: int
) -> Iterator[int]:
    """Yield a domain's requests by rank, but none past one that may not be overtaken again.

    Args:
        waiting: The requests.
        blind: Indices of the domain's requests in the order that does not know the store.
        ranked: The same in the order that does.
        max_bypass: See `hit_rate_order`.
    """
    gone = len(ranked)
    rank_of = {index: rank for rank, index in enumerate(ranked)}
    rank = np.array([rank_of[index] for index in blind])
    left = np.array([max_bypass - waiting[index].bypassed for index in blind])
    for _ in blind:
        spent = np.flatnonzero((left <= 0) & (rank < gone))
        until = spent[0] + 1 if len(spent) else len(blind)
        turn = int(rank[:until].argmin())
        left[:turn] -= 1
        rank[turn] = gone
        yield blind[turn]


class HitRatePolicy(SchedulerPolicy):
    """Keeps vLLM's waiting queue in this order.

    Args:
        full_hit_seconds: Time of waiting that weighs as much as a whole prompt in the store, where
            no other policy orders by prefill.
        max_bypass: See `hit_rate_order`.
    """

    metrics = (BYPASSES,)
    arranges_waiting = True

    def __init__(self, full_hit_seconds: float, max_bypass: int) -> None:
        self._full_hit_seconds = full_hit_seconds
        self._max_bypass = max_bypass
        self._arrived: dict[str, float] = {}
        self._blind: dict[str, float] = {}
        self._place: dict[str, float] = {}
        # Of those that were not admitted yet.
        self._bypassed: dict[str, int] = {}
        self._queue: list[tuple[Request, Waiting]] = []

    def added(self, request: Request, arrived: float) -> None:
        """Take a new request's arrival."""
        self._arrived[request.request_id] = arrived
        self._bypassed[request.request_id] = 0

    def plan(self, plan: StepPlan) -> None:
        """Put the waiting queue in order before the step is scheduled."""
        self._queue = []
        if len(plan.waiting) < 2:
            return
        requests = list(plan.waiting)
        waiting = self._look_at(requests)
        order = hit_rate_order(waiting, self._max_bypass)
        for index, there in zip(order, places(waiting), strict=True):
            self._place[requests[index].request_id] = waiting[there].place
        self._queue = [(requests[index], waiting[index]) for index in order]
        if order != list(range(len(order))):
            plan.waiting.remove_requests(requests)
            for index in order:
                plan.waiting.add_request(requests[index])

    def _look_at(self, requests: Sequence[Request]) -> list[Waiting]:
        side: SchedulerSide = self.facts.kv_connector.scheduler
        hits = side.hits(requests, LOOKED_UP_PER_STEP)
        return [self._known(*pair, side) for pair in zip(requests, hits, strict=True)]

    def _known(self, request: Request, hit: Hit, side: SchedulerSide) -> Waiting:
        name = request.request_id
        if name not in self._blind:
            self._blind[name] = self._place[name] = self._score(request, NO_HIT)
        return Waiting(
            self._arrived[name],
            self._blind[name],
            self._place[name],
            self._score(request, hit),
            # One that was preempted has been admitted before, and is not counted any more.
            self._bypassed.get(name, 0),
            request.num_preemptions > 0 or request.num_output_tokens > 0,
            side.domain(request),
        )

    def _score(self, request: Request, hit: Hit) -> float:
        key = self.facts.waiting_key
        if key is not None:
            return key(request, prefill_left(request) - hit.saved)
        return self._arrived[request.request_id] / self._full_hit_seconds - hit.share

    def scheduled(self, step: Step) -> None:
        """Count who was overtaken by whom the step took from the queue, to run or to be loaded."""
        left = set(step.plan.waiting)
        passed: dict[bytes | None, list[tuple[str, Waiting]]] = {}
        for request, known in self._queue:
            name = request.request_id
            if request in left and name in self._bypassed:
                passed.setdefault(known.domain, []).append((name, known))
        for request, known in self._queue:
            if request not in left and self._bypassed.pop(request.request_id, None) is not None:
                self._count(known, passed.get(known.domain, ()))

    def _count(self, admitted: Waiting, waiting: Collection[tuple[str, Waiting]]) -> None:
        """Count those of a domain that still wait, but would not if nothing were stored."""
        overtaken = [name for name, known in waiting if known.blind_rank < admitted.blind_rank]
        for name in overtaken:
            self._bypassed[name] += 1
        if overtaken:
            self.metric.inc(BYPASSES.name)

    def forget(self, request_ids: Collection[str]) -> None:
        """Drop finished requests."""
        for request_id in request_ids:
            for known in (self._arrived, self._blind, self._place, self._bypassed):
                known.pop(request_id, None)
