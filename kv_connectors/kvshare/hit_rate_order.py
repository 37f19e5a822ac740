"""Order of waiting requests by how much of their prompt is stored.

A request that reuses most of its prompt is through soon, and while it waits what it reuses may be
evicted, so it goes first (KVShare, arXiv 2503.16525, abstract: admission by KV hit rate), among
the requests of its tenant domain. The formula is **our guess**: the share of the prompt that is
stored, plus the time it has waited over the time that weighs as much as a whole hit. Waiting adds
up, so nobody waits for ever; and whoever was overtaken ``max_bypass`` times goes before all that
were not, in order of arrival.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_plugins.engine.policy import SchedulerPolicy, Step, StepPlan
from vllm_plugins.kv_connectors.kvshare.metrics import BYPASSES

if TYPE_CHECKING:
    from vllm.v1.request import Request

# Requests whose prompts are looked up anew in one step; each costs up to a millisecond per 1,000
# tokens when the store has changed.
LOOKED_UP_PER_STEP = 16


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the order needs to know about one waiting request.

    Attributes:
        arrived: When it arrived, in seconds.
        hit: Share of its prompt that is stored, in [0, 1].
        bypassed: How often a later one was admitted before it.
        started: Whether it has been answering already and was preempted.
        domain: Digest of the tenant domain; None where nothing is stored of the request.
    """

    arrived: float
    hit: float
    bypassed: int
    started: bool
    domain: bytes | None = None


def hit_rate_order(
    waiting: Sequence[Waiting], now: float, full_hit_seconds: float, max_bypass: int
) -> list[int]:
    """Return the indices of waiting requests in the order in which to admit them.

    Args:
        waiting: The requests.
        now: The time, in seconds.
        full_hit_seconds: Time of waiting that weighs as much as a whole prompt in the store.
        max_bypass: Whoever was overtaken this often goes first.
    """

    def by_arrival(index: int) -> tuple[bool, float]:
        return not waiting[index].started, waiting[index].arrived

    def key(index: int) -> tuple[int, float, float]:
        request = waiting[index]
        if request.started:
            return 0, request.arrived, 0.0
        if request.bypassed >= max_bypass:
            return 1, request.arrived, 0.0
        return 2, -(request.hit + (now - request.arrived) / full_hit_seconds), request.arrived

    # Each domain keeps the places that arrival gives it, so that nobody's wait tells what another
    # domain has stored.
    places = sorted(range(len(waiting)), key=by_arrival)
    own: dict[bytes | None, list[int]] = {}
    for index in places:
        own.setdefault(waiting[index].domain, []).append(index)
    turns = {domain: iter(sorted(indices, key=key)) for domain, indices in own.items()}
    return [next(turns[waiting[index].domain]) for index in places]


class HitRatePolicy(SchedulerPolicy):
    """Keeps vLLM's waiting queue in this order.

    Args:
        full_hit_seconds: See `hit_rate_order`.
        max_bypass: See `hit_rate_order`.
    """

    metrics = (BYPASSES,)

    def __init__(self, full_hit_seconds: float, max_bypass: int) -> None:
        self._full_hit_seconds = full_hit_seconds
        self._max_bypass = max_bypass
        # In order of arrival.
        self._arrived: dict[str, float] = {}
        self._bypassed: dict[str, int] = {}

    def _share(self) -> Callable[[Request], float]:
        share: Callable[[Request], float] = self.facts.kv_connector.scheduler.stored_share
        return share

    def added(self, request: Request, arrived: float) -> None:
        """Take a new request's arrival."""
        self._arrived[request.request_id] = arrived
        self._bypassed[request.request_id] = 0

    def plan(self, plan: StepPlan) -> None:
        """Put the waiting queue in order before the step is scheduled."""
        if len(plan.waiting) < 2:
            return
        requests, share = list(plan.waiting), self._share()
        domain = self.facts.kv_connector.scheduler.domain
        waiting = [
            Waiting(
                self._arrived[request.request_id],
                share(request) if place < LOOKED_UP_PER_STEP else 0.0,
                # One that was preempted has been admitted before, and is not counted any more.
                self._bypassed.get(request.request_id, 0),
                request.num_output_tokens > 0,
                domain(request),
            )
            for place, request in enumerate(requests)
        ]
        order = hit_rate_order(waiting, plan.now, self._full_hit_seconds, self._max_bypass)
        if order != list(range(len(order))):
            plan.waiting.remove_requests(requests)
            for index in order:
                plan.waiting.add_request(requests[index])

    def scheduled(self, step: Step) -> None:
        """Count who was overtaken."""
        for data in step.output.scheduled_new_reqs:
            arrived = self._arrived.get(data.req_id)
            self._bypassed.pop(data.req_id, None)
            if arrived is None:
                continue
            overtaken = [name for name in self._bypassed if self._arrived[name] < arrived]
            for name in overtaken:
                self._bypassed[name] += 1
            if overtaken:
                self.metric.inc(BYPASSES.name)

    def forget(self, request_ids: Collection[str]) -> None:
        """Drop finished requests."""
        for request_id in request_ids:
            self._arrived.pop(request_id, None)
            self._bypassed.pop(request_id, None)
