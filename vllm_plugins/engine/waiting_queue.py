"""A waiting queue ordered by a key, with the semantics that vLLM's scheduler expects."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request


class KeyedRequestQueue(RequestQueue):
    """Requests in ascending order of a key that is fixed while they wait.

    A request that is put back (preempted, or skipped in one step) is ordered by its key again
    rather than placed in front: its key accounts for what it has already computed. Removal marks
    the entry and is swept when the entry reaches the top, so that each operation is O(log n).

    Args:
        key: Order of a request, smallest first; asked once each time the request enters.
    """

    def __init__(self, key: Callable[[Request], float]) -> None:
        self._key = key
        self._heap: list[tuple[float, int, Request]] = []
        self._entry: dict[Request, int] = {}
        self._sequence = itertools.count()

    def add_request(self, request: Request) -> None:
        """Insert a request by its key; equal keys keep their order of entry."""
        sequence = next(self._sequence)
        self._entry[request] = sequence
        heapq.heappush(self._heap, (self._key(request), sequence, request))

    def pop_request(self) -> Request:
        """Remove and return the first request.

        Raises:
            IndexError: The queue is empty.
        """
        request = self.peek_request()
        heapq.heappop(self._heap)
        del self._entry[request]
        return request

    def peek_request(self) -> Request:
        """Return the first request without removing it.

        Raises:
            IndexError: The queue is empty.
        """
        while self._heap:
            _, sequence, request = self._heap[0]
            if self._entry.get(request) == sequence:
                return request
            heapq.heappop(self._heap)
        raise IndexError("the waiting queue is empty")

    def prepend_request(self, request: Request) -> None:
        """Put a request back by its key."""
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Put requests back by their keys."""
        # A skipped request's step list is in reverse order of its queue.
        for request in reversed(list(requests)):
            self.add_request(request)

    def remove_request(self, request: Request) -> None:
        """Remove one request.

        Raises:
            KeyError: It is not in the queue.
        """
        del self._entry[request]

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Remove those of the requests that are in the queue."""
        for request in requests:
            self._entry.pop(request, None)
        if len(self._heap) > 2 * len(self._entry) + 64:
            # Marked entries keep their requests alive; a burst of aborts must not pile them up.
            self._heap = [e for e in self._heap if self._entry.get(e[2]) == e[1]]
            heapq.heapify(self._heap)

    def __bool__(self) -> bool:
        return bool(self._entry)

    def __len__(self) -> int:
        return len(self._entry)

    def __iter__(self) -> Iterator[Request]:
        live = (e for e in sorted(self._heap, key=lambda e: e[:2]) if self._entry.get(e[2]) == e[1])
        return (request for _, _, request in live)
