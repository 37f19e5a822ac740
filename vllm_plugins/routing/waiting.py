"""Requests that no instance has room for: a bounded queue with deadlines."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")

# Departures from which the drain rate is estimated.
RATE_SAMPLES = 32
SHORTEST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0


class QueueFull(Exception):  # noqa: N818  (as asyncio and queue name theirs)
    """The waiting room is full.

    Attributes:
        retry_after_s: When a place may be free, in seconds from now.
    """

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full, try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[Item]):
    """A request and the time at which it has waited too long, in seconds."""

    item: Item
    deadline_s: float


class WaitingRoom(Generic[Item]):
    """First come, first served, unless whoever is first could not use what there is.

    Args:
        max_queue: Most requests that wait.
        deadline_s: How long each may wait unless it says otherwise, in seconds.
    """

    def __init__(self, max_queue: int, deadline_s: float) -> None:
        self._max_queue = max_queue
        self._deadline_s = deadline_s
        self._queue: deque[_Waiting[Item]] = deque()
        self._departures: deque[float] = deque(maxlen=RATE_SAMPLES)

    def __len__(self) -> int:
        return len(self._queue)

    def enter(self, item: Item, now: float, deadline_s: float | None = None) -> None:
        """Let a request wait.

        Args:
            item: The request; any object.
            now: Seconds.
            deadline_s: How long it may wait, in seconds.

        Raises:
            QueueFull: As many wait as may.
        """
        if len(self._queue) >= self._max_queue:
            raise QueueFull(self.retry_after(now))
        allowed = self._deadline_s if deadline_s is None else deadline_s
        self._queue.append(_Waiting(item, now + allowed))

    def __iter__(self) -> Iterator[Item]:
        """Go through those that wait now, in order; they may leave meanwhile."""
        return iter([one.item for one in self._queue])

    def head(self) -> Item | None:
        """Return the request whose turn it is; it goes on waiting."""
        return self._queue[0].item if self._queue else None

    def admit(self, item: Item, now: float) -> None:
        """Take out a request because there is room for it."""
        self._departures.append(now)
        self.leave(item)

    def leave(self, item: Item) -> bool:
        """Take out a request that waits no longer; return False if it does not wait here."""
        return bool(self._discard(lambda one: one.item is item))

    def expire(self, now: float) -> list[Item]:
        """Take out and return the requests that have waited too long, oldest first."""
        return self._discard(lambda one: one.deadline_s <= now)

    def retry_after(self, now: float) -> float:
        """Estimate after how many seconds the present queue is gone, from 1 to 60.

        The rate is that of the last departures up to now, so that a queue that has stopped moving
        promises less with every second.
        """
        if not self._departures or now <= self._departures[0]:
            return LONGEST_RETRY_S if self._queue else SHORTEST_RETRY_S
        rate = len(self._departures) / (now - self._departures[0])
        return min(LONGEST_RETRY_S, max(SHORTEST_RETRY_S, len(self._queue) / rate))

    def _discard(self, unwanted: Callable[[_Waiting[Item]], bool]) -> list[Item]:
        gone = [one.item for one in self._queue if unwanted(one)]
        if gone:
            self._queue = deque(one for one in self._queue if not unwanted(one))
        return gone
