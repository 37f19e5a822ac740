"""Shortest prefill first with ageing (Nexus, algorithm 2 and section 3 of its note).

``score = remaining - gamma * (now - arrival)``, ascending. All scores fall at the same rate, so the
order of two requests never changes while they wait, and ``remaining + gamma * arrival`` is a
key that a heap can keep.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from vllm_plugins.engine.policy import SchedulerPolicy, Step, WaitingKey
from vllm_plugins.metrics import MetricSpec

if TYPE_CHECKING:
    from vllm.v1.request import Request

BYPASSES = MetricSpec(
    "spf_bypasses_total", "counter", "Requests admitted while an earlier one went on waiting."
)


class SpfPolicy(SchedulerPolicy):
    """Orders the waiting queue; leaves the steps alone.

    Args:
        gamma: Ageing in tokens per second. A request overtakes another that arrived ``t`` seconds
            before it only if its remaining prefill is more than ``gamma * t`` tokens shorter, so
            with ``gamma > 0`` nobody is overtaken by requests that arrive more than
            ``remaining / gamma`` seconds later.
    """

    metrics = (BYPASSES,)

    def __init__(self, gamma: float) -> None:
        self._gamma = gamma
        # Arrival by request, in order of arrival: the first entry is the oldest that still waits.
        self._waiting: dict[str, float] = {}
        self._arrived: dict[str, float] = {}

    def waiting_key(self) -> WaitingKey:
        """Return the order by score."""
        return self._key

    def _key(self, request: Request, remaining: float) -> float:
        return remaining + self._gamma * self._arrived[request.request_id]

    def added(self, request: Request, arrived: float) -> None:
        """Take a new request's arrival; a session's further turns go before all that wait."""
        if request.request_id in self._arrived:
            return
        self._arrived[request.request_id] = self._waiting[request.request_id] = arrived

    def scheduled(self, step: Step) -> None:
        """Count admissions past an earlier request."""
        for data in step.output.scheduled_new_reqs:
            arrived = self._waiting.pop(data.req_id, None)
            oldest = next(iter(self._waiting.values()), None)
            if arrived is not None and oldest is not None and oldest < arrived:
                self.metric.inc(BYPASSES.name)

    def forget(self, request_ids: Collection[str]) -> None:
        """Drop finished requests."""
        for request_id in request_ids:
            self._waiting.pop(request_id, None)
            self._arrived.pop(request_id, None)
