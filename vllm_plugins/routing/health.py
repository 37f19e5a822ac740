"""Which instances are down, and when to ask each again."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_plugins.routing.instances import Fleet, Instance, State

LONGEST_PROBE_S = 30.0


@dataclass(slots=True)
class _Record:
    """Failures in a row, the time of the next probe, and the state to return to."""

    failures: int = 0
    next_probe_s: float = 0.0
    before: State = State.UP


class Health:
    """Marks instances of a fleet as down after failures in a row, and as up after a success.

    An instance that is up is probed every ``probe_s``; one that is down after 1, 2, 4, ... times
    that, so that a dead address costs little. Failed requests count like failed probes. A draining
    instance that fails and comes back is draining again.

    Args:
        fleet: The instances.
        fail_threshold: Failures in a row that mean down.
        probe_s: Seconds between probes.
        longest_probe_s: Most seconds between probes of an instance that is down.
    """

    def __init__(
        self,
        fleet: Fleet,
        fail_threshold: int = 3,
        probe_s: float = 1.0,
        longest_probe_s: float = LONGEST_PROBE_S,
    ) -> None:
        self._fleet = fleet
        self._fail_threshold = fail_threshold
        self._probe_s = probe_s
        self._longest_probe_s = max(probe_s, longest_probe_s)
        self._records: dict[str, _Record] = {}

    def due(self, now: float) -> list[Instance]:
        """Return the instances to probe now; each is due again only later."""
        self._records = {one.id: self._records.get(one.id, _Record()) for one in self._fleet}
        due = [one for one in self._fleet if self._records[one.id].next_probe_s <= now]
        for instance in due:
            self._records[instance.id].next_probe_s = now + self._wait_s(instance.id)
        return due

    def failed(self, instance: Instance, now: float) -> bool:
        """Count a failed probe or request; return True if the instance is down because of it."""
        if instance.state is State.REMOVED:
            return False
        record = self._records.setdefault(instance.id, _Record())
        record.failures += 1
        if record.failures < self._fail_threshold:
            return False
        record.next_probe_s = now + self._wait_s(instance.id)
        if instance.state is State.DOWN:
            return False
        record.before = instance.state
        self._fleet.fail(instance.id)
        return True

    def succeeded(self, instance: Instance) -> bool:
        """Count a success; return True if the instance was down and is back."""
        if instance.state is State.REMOVED:
            return False
        record = self._records.setdefault(instance.id, _Record())
        record.failures = 0
        if instance.state is not State.DOWN:
            return False
        self._fleet.resume(instance.id)
        if record.before is State.DRAINING:
            instance.state = State.DRAINING
        return True

    def _wait_s(self, instance_id: str) -> float:
        over = max(0, self._records[instance_id].failures - self._fail_threshold)
        # The exponent is bounded, so that years of failures do not overflow.
        return min(self._longest_probe_s, self._probe_s * 2.0 ** min(over, 32))
