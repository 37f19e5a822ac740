"""Requests that no instance has room for: a bounded queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
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


class WaitingRoom(Generic[Item]):
    """First come, first served, unless whoever is first could not use what there is.

    Args:
        max_queue: Most requests that wait.
    """

    def __init__(self, max_queue: int) -> None:
        self._max_queue = max_queue
        self._queue: list[Item] = []
        self._departures: deque[float] = deque(maxlen=RATE_SAMPLES)

    def __len__(self) -> int:
        return len(self._queue)

    def enter(self, item: Item, now: float) -> None:
        """Let a request wait.

        Args:
            item: The request; any object.
            now: Seconds.

        Raises:
            QueueFull: As many wait as may.
        """
        if len(self._queue) >= self._max_queue:
            raise QueueFull(self.retry_after(now))
        self._queue.append(item)

    def __iter__(self) -> Iterator[Item]:
        """Go through those that wait now, in order; they may leave meanwhile."""
        return iter(self._queue.copy())

    def head(self) -> Item | None:
        """Return the request whose turn it is; it goes on waiting."""
        return self._queue[0] if self._queue else None

    def admit(self, item: Item, now: float) -> None:
        """Take out a request because there is room for it."""
        self._departures.append(now)
        self.leave(item)

    def leave(self, item: Item) -> bool:
        """Take out a request that waits no longer; return False if it does not wait here."""
        before = len(self._queue)
        self._queue = [one for one in self._queue if one is not item]
        return len(self._queue) < before

    def retry_after(self, now: float) -> float:
        """Estimate after how many seconds the present queue is gone, from 1 to 60.

        The rate is that of the last departures up to now, so that a queue that has stopped moving
        promises less with every second.
        """
        if not self._departures or now <= self._departures[0]:
            return LONGEST_RETRY_S if self._queue else SHORTEST_RETRY_S
        rate = len(self._departures) / (now - self._departures[0])
        return min(LONGEST_RETRY_S, max(SHORTEST_RETRY_S, len(self._queue) / rate))
