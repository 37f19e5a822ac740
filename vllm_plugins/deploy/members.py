"""Which instances the router should have, and the steps from those that it has.

Instances announce themselves again and again, so whoever keeps the list may start anew at any time
and knows them all within one round.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from vllm_plugins.routing import Role, State

Verb = Literal["add", "drain", "resume", "remove"]


@dataclass(frozen=True)
class Seen:
    """An instance as the router shows it.

    Attributes:
        id: Its name at the router.
        url: Its base address.
        role: What it serves.
        state: Whether it gets requests.
    """

    id: str
    url: str
    role: Role
    state: State


@dataclass(frozen=True)
class Step:
    """Something to ask of the router.

    Attributes:
        verb: What.
        url: The instance's base address.
        role: What it serves.
        id: Its name at the router; empty for one that the router does not have.
    """

    verb: Verb
    url: str
    role: Role
    id: str = ""


@dataclass
class _Member:
    """An instance that has announced itself: its role, when it last spoke, whether it goes."""

    role: Role
    announced_s: float
    leaving: bool = False


class Members:
    """The instances that have announced themselves.

    Args:
        patience_s: An instance that the router calls down and that has been silent for so long, in
            s, is forgotten.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._members: dict[str, _Member] = {}
        # Not at the router either, as far as it is up to us; it may still have some of them.
        self._gone: set[str] = set()

    def announce(self, url: str, role: Role, now: float) -> None:
        """Note that an instance is up and wants requests."""
        member = self._members.setdefault(url, _Member(role, now))
        member.announced_s = now
        self._gone.discard(url)

    def leave(self, url: str) -> None:
        """Note that an instance wants no new requests."""
        if url in self._members:
            self._members[url].leaving = True

    def remove(self, url: str) -> None:
        """Note that an instance has ended."""
        self._members.pop(url, None)
        self._gone.add(url)

    def fresh(self, now: float) -> dict[Role, list[str]]:
        """Return the instances of each role that have announced themselves lately."""
        found: dict[Role, list[str]] = {}
        for url, member in self._members.items():
            if not member.leaving and now - member.announced_s <= self._patience_s:
                found.setdefault(member.role, []).append(url)
        return found

    def plan(self, seen: Iterable[Seen], now: float) -> list[Step]:
        """Return what to ask of the router next.

        Instances that others have added there are left alone. What the router refuses comes again
        in the next plan.

        Args:
            seen: All that the router has.
            now: Time in s, of the clock of `announce`.
        """
        there = {one.url: one for one in seen}
        self._forget_silent(there, now)
        self._gone &= there.keys()
        steps = [Step("remove", url, there[url].role, there[url].id) for url in sorted(self._gone)]
        for url, member in self._members.items():
            one = there.get(url)
            if one is None and not member.leaving:
                steps.append(Step("add", url, member.role))
            elif one is not None and member.leaving and one.state is State.UP:
                steps.append(Step("drain", url, member.role, one.id))
        return steps

    def _forget_silent(self, there: dict[str, Seen], now: float) -> None:
        for url, member in list(self._members.items()):
            silent = now - member.announced_s > self._patience_s
            # Silence alone is no death: Ray's controller, which lets instances speak, may be down.
            if silent and (url not in there or there[url].state is State.DOWN):
                self.remove(url)
