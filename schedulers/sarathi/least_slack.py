"""Order of waiting requests by their time to first token: least slack first, with a bound.

The slack of a request is the time left until its prefill has to start if its first token is to be
in time. Serving by deadline keeps everybody's slack from running out for as long as that can be
done at all. When the engine is overloaded it is the worst order (all are served just too late), so
the requests whose slack is given up are chosen by Moore and Hodgson's rule, which keeps the most
requests in time on one machine: walk the requests by deadline, and whenever one would be late,
give up the longest so far.

Nobody waits for ever. A request that has waited ``max_wait`` seconds is *overdue* and goes before
all that are not; overdue requests are served in order of arrival. So a request is admitted at the
latest after ``max_wait`` plus the time that the requests which were overdue before it take.

Prompts under way give a step to waiting requests that come before them, if there is room for the
first. They may be unable to start all the same, such as one whose KV is still on its way; then they
are given a step ever more rarely, at last one in 65, also where they are overdue.

The paper orders by arrival; this order is the package's own addition, off unless asked for.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass

LONGEST = 6
"""Doublings of the steps for which a request that could not start is not let past."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the order needs to know about one waiting request; times in seconds.

    Args:
        index: Position of the request in the sequence that is being ordered.
        arrived: When it arrived.
        deadline: When its first token is due.
        work: Predicted time of its remaining prefill.
    """

    index: int
    arrived: float
    deadline: float
    work: float


class Overtaking:
    """Which waiting requests are let past prompts under way, in which steps."""

    def __init__(self) -> None:
        self._step = 0
        self._let_past: Collection[str] = ()
        # Steps given to a request in vain, and the step from which on it may be given another one.
        self._in_vain: dict[str, tuple[int, int]] = {}

    def may(self, request_id: str) -> bool:
        """Say whether a step is not lost on a request, as far as is known."""
        return self._step >= self._in_vain.get(request_id, (0, 0))[1]

    def let_past(self, request_ids: Collection[str]) -> None:
        """Remember to whom the next step is given: all that come before who is overtaken."""
        self._let_past = request_ids

    def scheduled(self, started: Container[str], lost: bool) -> None:
        """Learn what has come of a step.

        Args:
            started: Requests with tokens in the step.
            lost: Whether those who were overtaken could have had something of it.
        """
        self._step += 1
        if lost and not any(name in started for name in self._let_past):
            for name in self._let_past:
                times = self._in_vain.get(name, (0, 0))[0]
                self._in_vain[name] = (times + 1, self._step + 2 ** min(times, LONGEST))
        self._let_past = ()

    def forget(self, request_ids: Collection[str]) -> None:
        """Drop requests that are gone."""
        for name in request_ids:
            self._in_vain.pop(name, None)


def least_slack_order(waiting: Sequence[Waiting], now: float, max_wait: float) -> list[int]:
    """Return the indices of waiting requests in the order in which to serve them."""
    overdue = [w for w in waiting if now - w.arrived >= max_wait]
    others = [w for w in waiting if now - w.arrived < max_wait]
    overdue.sort(key=lambda w: w.arrived)
    in_time, late = moore_hodgson(others, now + sum(w.work for w in overdue))
    in_time.sort(key=lambda w: w.deadline)
    # The sooner a late request is through, the more of the others are still in time.
    late.sort(key=lambda w: (w.work, w.arrived))
    return [w.index for w in (*overdue, *in_time, *late)]


def moore_hodgson(waiting: Sequence[Waiting], start: float) -> tuple[list[Waiting], list[Waiting]]:
    """Split requests into those that can all be in time when served by deadline, and the rest.

    The first part is as large as it can be (Moore 1968).
    """
    kept: list[tuple[float, int, Waiting]] = []
    late: list[Waiting] = []
    finish = start
    for request in sorted(waiting, key=lambda w: w.deadline):
        heapq.heappush(kept, (-request.work, request.index, request))
        finish += request.work
        if finish > request.deadline:
            given_up = heapq.heappop(kept)[2]
            finish -= given_up.work
            late.append(given_up)
    return [request for _, _, request in kept], late
