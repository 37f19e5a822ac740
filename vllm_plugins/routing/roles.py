"""When an instance should change its role, and how it does so without losing a request.

The rule is the one of EPD's public code (arXiv 2501.05460): the stage with the longest queue gets
an instance of another stage, unless all stages are busy. It has no memory of its own moves, so
that it can move an instance forth and back; `RoleMonitor` adds a pause between moves and asks that
a move shortens the longest queue by a share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from vllm_plugins.routing.instances import Fleet, Instance, Role, State
from vllm_plugins.routing.ledger import Ledger

SAMPLE_S = 1.0
SAMPLES = 20


@dataclass(frozen=True)
class Move:
    """An instance that is to change from one role to another."""

    instance: Instance
    source: Role
    target: Role


def needed_move(
    loads: Mapping[Role, float], counts: Mapping[Role, int], min_per_stage: int = 1
) -> tuple[Role, Role] | None:
    """Return from which role to which an instance should move, by EPD's rule; None for no move.

    Args:
        loads: Requests that wait, by stage, averaged.
        counts: Instances of each stage.
        min_per_stage: Instances that no stage falls below.
    """
    target = max(loads, key=lambda role: loads[role])
    most = loads[target]
    if all(load >= most / 2 for load in loads.values()):
        return None
    sources = [
        role
        for role in loads
        if role is not target and loads[role] < most and counts[role] > min_per_stage
    ]
    if not sources:
        return None
    return max(sources, key=lambda role: counts[role]), target


def predicted_gain(
    loads: Mapping[Role, float], counts: Mapping[Role, int], source: Role, target: Role
) -> float:
    """Return by which share a move shortens the longest queue per instance; negative if it grows.

    Args:
        loads: Requests that wait, by stage.
        counts: Instances of each stage; the source has at least two.
        source: Stage that gives an instance.
        target: Stage that gets it.
    """
    after = {**counts, source: counts[source] - 1, target: counts[target] + 1}
    # A stage without instances has all of its queue before it, as if it had one.
    before_most = max(loads[role] / max(1, counts[role]) for role in loads)
    after_most = max(loads[role] / max(1, after[role]) for role in loads)
    return 1.0 - after_most / before_most if before_most else 0.0


class RoleMonitor:
    """Averages the queues of the stages and says when an instance should move.

    Args:
        fleet: The instances.
        ledger: Their load: of several instances that could move, the one with the fewest requests
            does.
        interval_s: Seconds between decisions.
        cooldown_s: Seconds after a move without another one.
        min_gain: Share by which a move must shorten the longest queue per instance.
    """

    def __init__(
        self,
        fleet: Fleet,
        ledger: Ledger,
        interval_s: float = 5.0,
        cooldown_s: float = 30.0,
        min_gain: float = 0.1,
    ) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._interval_s = interval_s
        self._cooldown_s = cooldown_s
        self._min_gain = min_gain
        self._samples: deque[dict[Role, float]] = deque(maxlen=SAMPLES)
        self._sampled_s = self._decided_s = self._moved_s = float("-inf")

    def sample(self, loads: Mapping[Role, float], now: float) -> None:
        """Take in the number of waiting requests of each stage; once a second, more is ignored.

        Args:
            loads: The stages that the fleet has; always the same ones.
            now: Seconds.
        """
        if now - self._sampled_s >= SAMPLE_S:
            self._sampled_s = now
            self._samples.append(dict(loads))

    def averages(self) -> dict[Role, float]:
        """Return the mean of the last samples by stage; empty before the first one."""
        if not self._samples:
            return {}
        count = len(self._samples)
        return {role: sum(s[role] for s in self._samples) / count for role in self._samples[-1]}

    def decide(self, now: float) -> Move | None:
        """Return the move to make now; None between decisions, in the pause, or for no move."""
        if now - self._decided_s < self._interval_s or not self._samples:
            return None
        self._decided_s = now
        if now - self._moved_s < self._cooldown_s:
            return None
        loads, counts = self.averages(), self._fleet.counts()
        roles = needed_move(loads, counts, self._fleet.min_per_stage)
        if roles is None or predicted_gain(loads, counts, *roles) < self._min_gain:
            return None
        move = self._pick(*roles)
        if move:
            self._moved_s = now
        return move

    def _pick(self, source: Role, target: Role) -> Move | None:
        able = [one for one in self._fleet.serving(source) if target in one.roles]
        if not able:
            return None
        idlest = min(able, key=lambda one: self._ledger.load(one).requests)
        return Move(idlest, source, target)


class Phase(StrEnum):
    """Where a change of role stands."""

    DRAINING = "draining"
    ACTIVE = "active"
    ABANDONED = "abandoned"


class RoleSwitch:
    """Carries one move out: drain, then relabel, then serve.

    The instance holds both roles and is only relabelled; after the deadline it is relabelled with
    what it still has, which goes on beside the new work.

    Args:
        move: What to do.
        fleet: The instances.
        ledger: Says when the instance is empty.
        now: Seconds; the drain begins now.
        drain_s: Longest time to drain, in seconds.

    Raises:
        PluginError: The stage would be left with too few instances.
    """

    def __init__(
        self,
        move: Move,
        fleet: Fleet,
        ledger: Ledger,
        now: float,
        drain_s: float = 30.0,
    ) -> None:
        self.move = move
        self.phase = Phase.DRAINING
        self._fleet = fleet
        self._ledger = ledger
        self._deadline_s = now + drain_s
        fleet.drain(move.instance.id)

    def step(self, now: float) -> Phase:
        """Go on as far as possible, and return the phase."""
        instance = self.move.instance
        if self.phase is not Phase.DRAINING:
            return self.phase
        if instance.state in (State.UP, State.REMOVED):
            self.phase = Phase.ABANDONED
        # One that is down comes back draining, and the move goes on.
        if instance.state is not State.DRAINING:
            return self.phase
        drained = self._ledger.load(instance).requests == 0
        if not drained and now < self._deadline_s:
            return self.phase
        self._fleet.relabel(instance.id, self.move.target)
        self.phase = Phase.ACTIVE
        return self.phase
