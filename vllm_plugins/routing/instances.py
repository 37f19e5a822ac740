"""The instances behind a router: what each can do, what it does now, and how many must stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from vllm_plugins.errors import PluginError


class Role(StrEnum):
    """A stage of a request, which an instance serves.

    An instance that prefills and decodes a request itself (colocated) is one of role ``prefill``
    whose tickets stay open until the answer has ended.
    """

    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE = "decode"


class State(StrEnum):
    """Whether an instance gets new work: only while it is up."""

    UP = "up"
    DRAINING = "draining"
    DOWN = "down"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an instance can hold, and from where on it counts as full.

    Attributes:
        kv_blocks: Blocks of its KV cache; 0 while unknown, which sets no limit.
        block_size: Tokens of a KV block.
        kv_fraction: Share of the KV blocks that may be in use and promised at a decode instance;
            over 1 where not every promise is kept.
        max_prefill_tokens: Queued prompt tokens from which on it is full; 0 for no limit.
        max_encoder_tokens: The same for encoder tokens.
    """

    kv_blocks: int = 0
    block_size: int = 16
    kv_fraction: float = 1.0
    max_prefill_tokens: int = 0
    max_encoder_tokens: int = 0

    def blocks(self, tokens: int) -> int:
        """Return the KV blocks that hold so many tokens."""
        return -(-tokens // self.block_size)

    def limit(self, role: Role) -> float:
        """Return the backlog that may not be exceeded, in the unit of the role."""
        limits = {
            Role.ENCODE: self.max_encoder_tokens,
            Role.PREFILL: self.max_prefill_tokens,
            Role.DECODE: self.kv_blocks * self.kv_fraction,
        }
        return limits[role] or float("inf")


@dataclass(slots=True, eq=False)
class Instance:
    """One engine behind the router.

    Attributes:
        id: Its name, unique in the fleet.
        url: Where it is reached.
        active: The role it serves now.
        roles: Every role it can take without a restart; the active one alone by default.
        capacity: What it can hold; replaced as a whole when more becomes known.
        state: Set by the fleet alone.
    """

    id: str
    url: str
    active: Role
    roles: frozenset[Role] = frozenset()
    capacity: Capacity = field(default_factory=Capacity)
    state: State = State.UP

    def __post_init__(self) -> None:
        self.roles |= {self.active}


class Fleet:
    """All instances; they come and go while requests are served.

    Args:
        instances: The first ones.
        min_per_stage: No order of an operator or of the role monitor leaves a role with fewer
            instances that are up. Failures are not asked.
    """

    def __init__(self, instances: Iterable[Instance] = (), min_per_stage: int = 1) -> None:
        self.min_per_stage = min_per_stage
        self._instances: dict[str, Instance] = {}
        for instance in instances:
            self.add(instance)

    def __iter__(self) -> Iterator[Instance]:
        return iter(list(self._instances.values()))

    def __len__(self) -> int:
        return len(self._instances)

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self._instances

    def __getitem__(self, instance_id: str) -> Instance:
        """Return an instance.

        Raises:
            PluginError: There is none of this name.
        """
        try:
            return self._instances[instance_id]
        except KeyError:
            known = ", ".join(self._instances) or "none"
            raise PluginError(
                f"instance {instance_id}", "is not in the fleet", f"name one of: {known}"
            ) from None

    def serving(self, role: Role) -> list[Instance]:
        """Return the instances that take new work of this role, in the order they were added."""
        return [
            one for one in self._instances.values() if one.active is role and one.state is State.UP
        ]

    def counts(self) -> dict[Role, int]:
        """Return how many instances take new work, by role."""
        return {role: len(self.serving(role)) for role in Role}

    def add(self, instance: Instance) -> None:
        """Take in an instance.

        Raises:
            PluginError: Its name or address is taken.
        """
        for other in self._instances.values():
            if other.id == instance.id or other.url == instance.url:
                raise PluginError(
                    f"instance {instance.id}",
                    f"{other.id} at {other.url} is in the fleet already",
                    "remove that one first",
                )
        instance.state = State.UP
        self._instances[instance.id] = instance

    def drain(self, instance_id: str) -> Instance:
        """Give an instance no new work; what it has goes on.

        Raises:
            PluginError: Its role would be left with too few, or it is down.
        """
        instance = self[instance_id]
        if instance.state is State.DOWN:
            raise PluginError(
                f"instance {instance_id}", "is down and cannot be drained", "remove it"
            )
        self._spare(instance)
        instance.state = State.DRAINING
        return instance

    def resume(self, instance_id: str) -> Instance:
        """Give an instance new work again, after a drain or a failure."""
        instance = self[instance_id]
        instance.state = State.UP
        return instance

    def fail(self, instance_id: str) -> Instance:
        """Mark an instance as down."""
        instance = self[instance_id]
        instance.state = State.DOWN
        return instance

    def remove(self, instance_id: str) -> Instance:
        """Forget an instance; its open tickets are the caller's to close.

        Raises:
            PluginError: Its role would be left with too few.
        """
        instance = self[instance_id]
        self._spare(instance)
        instance.state = State.REMOVED
        return self._instances.pop(instance_id)

    def relabel(self, instance_id: str, role: Role) -> Instance:
        """Let an instance serve another role, from now on.

        It is up afterwards. The instance must be drained, as it may lack the role's requests.

        Raises:
            PluginError: It does not hold the role, or was not drained.
        """
        instance = self[instance_id]
        if role not in instance.roles:
            held = ", ".join(sorted(instance.roles))
            raise PluginError(
                f"instance {instance_id}",
                f"cannot serve {role}, it was started for {held}",
                "restart it for both roles or move another one",
            )
        if instance.state is not State.DRAINING:
            raise PluginError(
                f"instance {instance_id}", f"is {instance.state}, not draining", "drain it first"
            )
        instance.active, instance.state = role, State.UP
        return instance

    def _spare(self, instance: Instance) -> None:
        if instance.state is not State.UP:
            return
        left = len(self.serving(instance.active)) - 1
        if left < self.min_per_stage:
            raise PluginError(
                f"instance {instance.id}",
                f"only {left} of role {instance.active} would be left, {self.min_per_stage} must",
                "add another one first",
            )
