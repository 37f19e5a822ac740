"""Gives each request its instance, or a place in the queue until one has room."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from vllm_plugins.router.answers import RefusedError
from vllm_plugins.router.metrics import RouterMetrics
from vllm_plugins.routing import (
    Dispatcher,
    Fleet,
    Health,
    Instance,
    Ledger,
    QueueFull,
    Role,
    Ticket,
    WaitingRoom,
    Work,
)

logger = logging.getLogger(__name__)

# Values over which a mean is about taken.
MEMORY = 64
# Guesses before anything was seen: tokens of an answer, and embeddings of an image.
ANSWER_TOKENS, MEDIUM_TOKENS = 256, 576


_Take = Callable[[Collection[str]], list[Ticket] | None]


@dataclass(eq=False)
class _Waiter:
    """Somebody in the queue.

    Attributes:
        take: Opens the tickets, at none of some instances; None while all others are full.
        tried: Instances that have failed the request.
        since_s: When it came, in seconds.
    """

    take: _Take
    tried: Collection[str]
    since_s: float
    served: asyncio.Future[list[Ticket]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class RecentMean:
    """A mean of what was seen lately.

    Args:
        guess: Before anything was seen.
    """

    def __init__(self, guess: float) -> None:
        self.value = guess

    def note(self, seen: float) -> None:
        """Take in a value."""
        self.value += (seen - self.value) / MEMORY


class Desk:
    """Opens tickets at instances, in order of arrival where they have no room.

    Args:
        fleet: The instances.
        ledger: Their load.
        health: Whom failures are reported to.
        dispatcher: Picks among those that have room.
        metrics: Queue lengths are written there.
        max_queue: Most requests that wait for each role.
        queue_timeout_s: Longest time that one waits, in seconds.
    """

    def __init__(
        self,
        fleet: Fleet,
        ledger: Ledger,
        health: Health,
        dispatcher: Dispatcher,
        metrics: RouterMetrics,
        max_queue: int,
        queue_timeout_s: float,
    ) -> None:
        self.fleet = fleet
        self.ledger = ledger
        self.health = health
        self.answer_tokens = RecentMean(ANSWER_TOKENS)
        self.medium_tokens = RecentMean(MEDIUM_TOKENS)
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._queue_timeout_s = queue_timeout_s
        self._rooms = {role: WaitingRoom[_Waiter](max_queue) for role in Role}

    def expected_answer(self, limit: int | None) -> int:
        """Return the expected length of an answer of at most ``limit`` tokens."""
        mean = round(self.answer_tokens.value)
        return mean if limit is None else max(0, min(limit, mean))

    def waiting(self, role: Role) -> int:
        """Return how many requests wait for a role."""
        return len(self._rooms[role])

    def longest_wait(self, role: Role) -> float | None:
        """Return for how many seconds the first in the queue has waited; None if nobody waits."""
        first = self._rooms[role].head()
        return None if first is None else _now() - first.since_s

    async def place(self, role: Role, work: Work, tried: Collection[str] = ()) -> Ticket:
        """Return an open ticket at an instance, as soon as one has room.

        Args:
            role: The stage.
            work: What the instance is asked.
            tried: Instances that have failed this request; asked again only if there is no other.

        Raises:
            RefusedError: No instance is up, the queue is full, or the wait was too long.
        """

        def take(exclude: Collection[str]) -> list[Ticket] | None:
            now = _now()
            chosen = self._dispatcher.choose(role, work, now, exclude)
            return None if chosen is None else [self.ledger.open(chosen, work, now)]

        return (await self._wait(role, take, tried))[0]

    async def spread(self, images: Sequence[int], tried: Collection[str] = ()) -> list[Ticket]:
        """Return an open ticket at an encoder for each image of a request.

        Args:
            images: Encoder tokens of each.
            tried: Instances that have failed this request.

        Raises:
            RefusedError: As `place`.
        """

        def take(exclude: Collection[str]) -> list[Ticket] | None:
            now = _now()
            chosen = self._dispatcher.spread(images, now, exclude)
            if chosen is None:
                return None
            works = (Work(encoder_tokens=tokens) for tokens in images)
            return [
                self.ledger.open(one, work, now) for one, work in zip(chosen, works, strict=True)
            ]

        return await self._wait(Role.ENCODE, take, tried)

    @contextmanager
    def held(self, *tickets: Ticket) -> Iterator[None]:
        """Close tickets at the end, however it comes, and give their room to the queue."""
        try:
            yield
        finally:
            self.close(*tickets)

    def close(self, *tickets: Ticket) -> None:
        """Close tickets of one role, and give their room to the queue."""
        for ticket in tickets:
            ticket.close()
        self.admit(tickets[0].role)

    def admit(self, role: Role) -> None:
        """Let requests of a role out of the queue for which there is room now.

        None takes the place that an earlier one waits for; only what that one avoids is free.
        """
        room = self._rooms[role]
        serving = {one.id for one in self.fleet.serving(role)}
        free = set(serving)
        for waiter in room:
            avoided = self._avoided(role, waiter.tried)
            if waiter.served.done():
                room.leave(waiter)
            elif (tickets := waiter.take((serving - free) | avoided)) is not None:
                room.admit(waiter, _now())
                self._metrics.queue(role, len(room))
                waiter.served.set_result(tickets)
            elif not (free := free & avoided):
                return

    def admit_all(self) -> None:
        """Let requests out of all queues, after instances have come or changed."""
        for role in Role:
            self.admit(role)

    def failed(self, instance: Instance) -> None:
        """Count a failed request or probe against an instance."""
        if self.health.failed(instance, _now()):
            logger.warning("%s (%s) is down", instance.id, instance.active)
            self.ledger.forget(instance)

    def succeeded(self, instance: Instance) -> None:
        """Count a probe that was answered."""
        if self.health.succeeded(instance):
            logger.warning("%s (%s) is back", instance.id, instance.active)
            self.admit_all()

    def _avoided(self, role: Role, tried: Collection[str]) -> set[str]:
        """Return the instances that have failed a request, unless there is no other."""
        serving = {one.id for one in self.fleet.serving(role)}
        return serving.intersection(tried) if serving.difference(tried) else set()

    async def _wait(self, role: Role, take: _Take, tried: Collection[str]) -> list[Ticket]:
        room = self._rooms[role]
        if not len(room) and (tickets := take(self._avoided(role, tried))) is not None:
            return tickets
        if not self.fleet.serving(role):
            raise RefusedError(503, f"no {role} instance is up", "no_instance", retry_after_s=1.0)
        waiter = _Waiter(take, tried, _now())
        try:
            room.enter(waiter, waiter.since_s)
        except QueueFull as full:
            raise RefusedError(503, str(full), "queue_full", full.retry_after_s) from None
        self._metrics.queue(role, len(room))
        self.admit(role)
        return await self._served(role, waiter)

    async def _served(self, role: Role, waiter: _Waiter) -> list[Ticket]:
        room = self._rooms[role]
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                return await waiter.served
        except TimeoutError:
            self._give_up(role, waiter)
            message = f"no {role} instance had room within {self._queue_timeout_s:g} s"
            raise RefusedError(503, message, "queue_timeout", room.retry_after(_now())) from None
        except asyncio.CancelledError:
            self._give_up(role, waiter)
            raise

    def _give_up(self, role: Role, waiter: _Waiter) -> None:
        if self._rooms[role].leave(waiter):
            self._metrics.queue(role, len(self._rooms[role]))
        elif not waiter.served.cancelled():
            # The tickets came in the moment in which the client left.
            for ticket in waiter.served.result():
                ticket.close()
        self.admit(role)


def _now() -> float:
    return asyncio.get_running_loop().time()
