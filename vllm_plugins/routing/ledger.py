"""What each instance has before it: the router's own requests, and others' as far as seen.

The router knows at once what it sends and what has ended. What reaches an instance from elsewhere
shows only in the instance's metrics, some time later; that excess is added to the own requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_plugins.routing.instances import Instance, Role

# An observation older than this says nothing about now.
STALE_S = 5.0


@dataclass(frozen=True, slots=True)
class Work:
    """What a request asks of an instance; each role counts its own.

    Attributes:
        prompt_tokens: Length of the prompt, placeholders of images included.
        output_tokens: Expected length of the answer.
        encoder_tokens: Embeddings to compute from images.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    encoder_tokens: int = 0

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.output_tokens, self.encoder_tokens) < 0:
            raise ValueError(f"work cannot be negative: {self}")

    def steady(self, role: Role) -> int:
        """Return the tokens that a role has to compute before it is free of them."""
        return self.encoder_tokens if role is Role.ENCODE else self.prompt_tokens


@dataclass(slots=True)
class Load:
    """What is open at one instance.

    Attributes:
        requests: Open tickets of all roles.
        prefill_tokens: Prompt tokens not yet computed.
        kv_blocks: KV blocks in use and promised to decodes: prompt plus the larger of the expected
            and the actual answer.
        kv_blocks_in_use: Of these, the ones that hold tokens.
        encoder_tokens: Embeddings not yet computed.
    """

    requests: int = 0
    prefill_tokens: int = 0
    kv_blocks: int = 0
    kv_blocks_in_use: int = 0
    encoder_tokens: int = 0

    def of(self, role: Role) -> int:
        """Return the load in the unit of a role."""
        if role is Role.DECODE:
            return self.kv_blocks
        return self.encoder_tokens if role is Role.ENCODE else self.prefill_tokens


class Ticket:
    """One request at one instance, from the moment it is sent there; made by `Ledger.open`.

    Attributes:
        instance: Where it is.
        capacity: The instance's when it was sent.
        role: The instance's role when it was sent.
        work: What was asked.
        opened_s: When.
        done: Tokens of the role's own work that are done: computed of the prompt, produced, or
            encoded.
        closed: True once it counts no longer.
    """

    __slots__ = ("_account", "capacity", "closed", "done", "instance", "opened_s", "role", "work")

    def __init__(
        self, account: _Account, instance: Instance, role: Role, work: Work, now: float
    ) -> None:
        self._account = account
        self.instance = instance
        # What is taken off must be what was added, though more becomes known of the instance.
        self.capacity = instance.capacity
        self.role = role
        self.work = work
        self.opened_s = now
        self.done = 0
        self.closed = False

    def progress(self, done: int) -> None:
        """Note how many tokens are done in all; fewer than before, or after the end, is ignored.

        Args:
            done: Prompt tokens computed (prefill), tokens produced (decode), embeddings computed
                (encode).
        """
        if done <= self.done or self.closed:
            return
        self._account.add(self, -1)
        self.done = done
        self._account.add(self, 1)

    def close(self) -> None:
        """Take the request off the ledger; a second time does nothing."""
        if self.closed:
            return
        self.closed = True
        self._account.add(self, -1)
        del self._account.tickets[self]
        self._account.load.requests -= 1


@dataclass(slots=True)
class _Account:
    """The open tickets of one instance and their sums."""

    load: Load = field(default_factory=Load)
    tickets: dict[Ticket, None] = field(default_factory=dict)

    def add(self, ticket: Ticket, sign: int) -> None:
        """Add what is left of a ticket, or with sign -1 take it off."""
        work, load = ticket.work, self.load
        if ticket.role is Role.DECODE:
            blocks = ticket.capacity.blocks
            produced = max(work.output_tokens, ticket.done)
            load.kv_blocks += sign * blocks(work.prompt_tokens + produced)
            load.kv_blocks_in_use += sign * blocks(work.prompt_tokens + ticket.done)
            return
        left = sign * max(0, work.steady(ticket.role) - ticket.done)
        if ticket.role is Role.ENCODE:
            load.encoder_tokens += left
        else:
            load.prefill_tokens += left


@dataclass(frozen=True, slots=True)
class _Foreign:
    """Load that others gave an instance: waiting requests and KV blocks, seen at a time."""

    waiting: float
    kv_blocks: float
    seen_s: float


class Ledger:
    """The open tickets of all instances, and what was observed beside them."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._foreign: dict[str, _Foreign] = {}
        self._opened = dict.fromkeys(Role, 0)
        self._tokens = dict.fromkeys(Role, 0)

    def open(self, instance: Instance, work: Work, now: float) -> Ticket:
        """Note that a request goes to an instance, for the role that it has now."""
        role = instance.active
        account = self._accounts.setdefault(instance.id, _Account())
        ticket = Ticket(account, instance, role, work, now)
        account.tickets[ticket] = None
        account.load.requests += 1
        account.add(ticket, 1)
        self._opened[role] += 1
        self._tokens[role] += work.steady(role)
        return ticket

    def load(self, instance: Instance) -> Load:
        """Return what this router has open at an instance; not to be changed."""
        account = self._accounts.get(instance.id)
        return account.load if account else Load()

    def tickets(self, instance: Instance) -> list[Ticket]:
        """Return the open tickets of an instance, oldest first."""
        account = self._accounts.get(instance.id)
        return list(account.tickets) if account else []

    def backlog(self, instance: Instance, now: float) -> float:
        """Return the whole load of an instance in the unit of its role.

        That is prompt tokens, KV blocks or encoder tokens. Load from elsewhere is counted in
        requests of the mean size that this router sends, as only their number is observed.
        """
        role = instance.active
        own = self.load(instance).of(role)
        foreign = self._foreign.get(instance.id)
        if foreign is None or now - foreign.seen_s > STALE_S:
            return own
        if role is Role.DECODE:
            return own + foreign.kv_blocks
        return own + foreign.waiting * self._tokens[role] / max(1, self._opened[role])

    def observe(
        self, instance: Instance, running: int, waiting: int, kv_usage: float, now: float
    ) -> None:
        """Take in an instance's own metrics.

        Args:
            instance: Whose.
            running: Requests being computed.
            waiting: Requests that wait for it.
            kv_usage: Share of its KV blocks in use, 0 to 1.
            now: When the metrics were read, in seconds.
        """
        own = self.load(instance)
        # A ticket opens before the instance has the request and closes after it is done there, so
        # that whatever exceeds the tickets is others'. A running request has little prompt left.
        extra = max(0, running + waiting - own.requests)
        blocks = kv_usage * instance.capacity.kv_blocks - own.kv_blocks_in_use
        self._foreign[instance.id] = _Foreign(min(extra, waiting), max(0.0, blocks), now)

    def forget(self, instance: Instance) -> list[Ticket]:
        """Close every ticket of an instance that died or was removed, and return them."""
        gone = self.tickets(instance)
        for ticket in gone:
            ticket.close()
        self._accounts.pop(instance.id, None)
        self._foreign.pop(instance.id, None)
        return gone
