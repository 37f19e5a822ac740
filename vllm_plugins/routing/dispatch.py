"""Which instance gets a request."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from vllm_plugins.routing.instances import Fleet, Instance, Role
from vllm_plugins.routing.ledger import Ledger, Work

# Stands in for the size of a KV cache that is not known yet, so that shares can be compared.
UNKNOWN_KV_BLOCKS = 16384


class Dispatcher(Protocol):
    """A rule that picks instances; it opens no tickets itself."""

    def choose(
        self, role: Role, work: Work, now: float, exclude: Collection[str] = ()
    ) -> Instance | None:
        """Return the instance for a request; None where every one is full, so that it waits.

        Args:
            role: The stage.
            work: What the request asks of the instance.
            now: Seconds.
            exclude: Names of instances that have failed this request.
        """
        ...

    def spread(
        self, images: Sequence[int], now: float, exclude: Collection[str] = ()
    ) -> list[Instance] | None:
        """Return an encoder for each image of one request; None where every encoder is full.

        Args:
            images: Encoder tokens of each image.
            now: Seconds.
            exclude: Names of instances that have failed this request.
        """
        ...


class _Rotation:
    """Candidates in turn: what was chosen last comes last in the next choice."""

    def __init__(self, fleet: Fleet, ledger: Ledger) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._last: dict[Role, str] = {}

    def _candidates(
        self, role: Role, work: Work, now: float, exclude: Collection[str]
    ) -> list[Instance]:
        """Instances with room for the work, beginning after the one that was chosen last."""
        serving = self._fleet.serving(role)
        last = self._last.get(role)
        start = next((i + 1 for i, one in enumerate(serving) if one.id == last), 0)
        turned = serving[start:] + serving[:start]
        return [one for one in turned if one.id not in exclude and self._has_room(one, work, now)]

    def _has_room(self, instance: Instance, work: Work, now: float) -> bool:
        role, capacity = instance.active, instance.capacity
        limit = capacity.limit(role)
        if limit == float("inf"):
            return True
        backlog = self._ledger.backlog(instance, now)
        asked = (
            capacity.blocks(work.prompt_tokens + work.output_tokens)
            if role is Role.DECODE
            else work.steady(role)
        )
        # A request larger than the limit would wait for ever: it goes where nothing else is.
        return backlog == 0 or backlog + asked <= limit


class RoundRobin(_Rotation):
    """Each in turn, whatever its load, as long as it is not full.

    Args:
        fleet: The instances.
        ledger: Their load.
    """

    def choose(
        self, role: Role, work: Work, now: float, exclude: Collection[str] = ()
    ) -> Instance | None:
        """Return the next instance that is not full."""
        candidates = self._candidates(role, work, now, exclude)
        if not candidates:
            return None
        self._last[role] = candidates[0].id
        return candidates[0]

    def spread(
        self, images: Sequence[int], now: float, exclude: Collection[str] = ()
    ) -> list[Instance] | None:
        """Return the encoders in turn, image by image."""
        chosen = [
            self.choose(Role.ENCODE, Work(encoder_tokens=image), now, exclude) for image in images
        ]
        kept = [one for one in chosen if one is not None]
        return kept if len(kept) == len(images) else None


class LeastBacklog(_Rotation):
    """The instance with the least before it.

    That is the fewest queued prompt tokens (prefill), the smallest share of the KV cache in use and
    promised (decode), or the fewest queued encoder tokens (encode); among equals the one with the
    fewest requests, and among those each in turn. Prefixes that an instance may have cached are not
    considered.

    Args:
        fleet: The instances.
        ledger: Their load.
    """

    def choose(
        self, role: Role, work: Work, now: float, exclude: Collection[str] = ()
    ) -> Instance | None:
        """Return the instance with the least backlog that is not full."""
        candidates = self._candidates(role, work, now, exclude)
        if not candidates:
            return None
        best = min(candidates, key=lambda one: self._order(one, now))
        self._last[role] = best.id
        return best

    def spread(
        self, images: Sequence[int], now: float, exclude: Collection[str] = ()
    ) -> list[Instance] | None:
        """Return the encoders, longest image first to the least backlog."""
        largest = Work(encoder_tokens=max(images, default=0))
        candidates = self._candidates(Role.ENCODE, largest, now, exclude)
        if not candidates:
            return None
        backlogs = {one.id: self._ledger.backlog(one, now) for one in candidates}
        chosen = [self._fleet[name] for name in assign_images(images, backlogs)]
        if chosen:
            self._last[Role.ENCODE] = chosen[-1].id
        return chosen

    def _order(self, instance: Instance, now: float) -> tuple[float, int]:
        backlog = self._ledger.backlog(instance, now)
        if instance.active is Role.DECODE:
            backlog /= instance.capacity.kv_blocks or UNKNOWN_KV_BLOCKS
        return backlog, self._ledger.load(instance).requests


def assign_images(images: Sequence[int], encoders: Mapping[str, float]) -> list[str]:
    """Spread the images of one request over encoders, the longest first to the least backlog.

    Equal images go round robin over equally loaded encoders. From empty encoders the last image
    ends no later than 4/3 of the earliest possible time.

    Args:
        images: Encoder tokens of each image.
        encoders: Backlog of each encoder in encoder tokens, at least one encoder.

    Returns:
        The encoder's name for each image, in the order of the images. Of equal encoders the one
        that has fewer of these images is taken, then the first.
    """
    backlog = dict(encoders)
    given = dict.fromkeys(encoders, 0)
    chosen = [""] * len(images)
    for index in sorted(range(len(images)), key=lambda i: -images[i]):
        name = min(backlog, key=lambda one: (backlog[one], given[one]))
        backlog[name] += images[index]
        given[name] += 1
        chosen[index] = name
    return chosen


DISPATCHERS: dict[str, type[LeastBacklog] | type[RoundRobin]] = {
    "backlog": LeastBacklog,
    "round-robin": RoundRobin,
}
"""Dispatchers by the names that users write."""
