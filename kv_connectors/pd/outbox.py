"""What a prefill worker keeps for others to pull: leases that end, whoever dies.

The paper's code frees a prompt's blocks on the reader's word alone, and never without it. Here a
lease ends when every reader has all it wants, when somebody releases it, or when nobody renewed it
in time; and it does not end under a reader. A prompt may be read while it is still being computed,
layer by layer: its blocks are vLLM's own then, and may be taken back, for which `cancel` waits
until no copy of them is under way.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from vllm_plugins.kv_connectors.pd.protocol import Span

# Ended transfers that are remembered, so that a late reader hears at once that there is nothing.
REMEMBERED = 8192
# Time in which a prompt that a reader asks for has to be announced, in s: the answer that names it
# overtakes the worker's next step, and with `stream_layers` the prefill itself.
ANNOUNCE_S = 10.0

Blocks = Sequence[Sequence[int]]


class GoneError(LookupError):
    """There is no such transfer, or no more."""


@dataclass
class Outgoing:
    """One prompt's KV, kept for its readers.

    Attributes:
        digest: `reference.prompt_digest` of its tokens.
        blocks: Block ids by KV cache group, in order of position; 0 is vLLM's null block.
        ready: Positions that are computed, by layer; None once all are.
        request_id: Name by which vLLM keeps the blocks; None while it computes them.
        deadline: When the lease ends, on the monotonic clock.
        held_at: When it began, on the monotonic clock.
        prefilled: Whether the prompt is computed to its end; vLLM keeps it one step later.
        reading: Readers at work.
        copying: Copies under way.
        done: Ranks of the readers that have all they want.
        complete: Whether all readers have; they may have before vLLM says who keeps the blocks.
        ended: Whether it must not be read any more.
    """

    digest: str
    blocks: Blocks
    ready: dict[str, int] | None
    request_id: str | None
    deadline: float
    held_at: float = 0.0
    prefilled: bool = False
    reading: int = 0
    copying: int = 0
    done: set[int] = field(default_factory=set)
    complete: bool = False
    ended: bool = False


class Outbox:
    """The prompts that one worker keeps; thread-safe.

    Args:
        groups: KV cache group of each layer.
        lease_s: Time without a renewal after which a lease ends, in s.
        clock: The monotonic clock.
        announce_s: Time that a reader waits for an unknown transfer, in s.
    """

    def __init__(
        self,
        groups: Mapping[str, int],
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
        announce_s: float = ANNOUNCE_S,
    ) -> None:
        self._groups, self._lease_s = dict(groups), lease_s
        self._clock, self._announce_s = clock, announce_s
        self._entries: dict[str, Outgoing] = {}
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._freed: list[str] = []
        self._expired = 0
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._entries)

    def announce(self, transfer_id: str, digest: str, blocks: Blocks) -> None:
        """Let a prompt be read while it is computed; further calls bring its further blocks.

        Of two prompts under one name the second is not to be had.
        """
        with self._changed:
            entry = self._entries.get(transfer_id)
            if entry is not None:
                if entry.request_id is None and entry.digest == digest:
                    entry.blocks = blocks
            elif transfer_id not in self._gone:
                self._entries[transfer_id] = Outgoing(digest, blocks, {}, None, 0.0)
            self._changed.notify_all()

    def computed(self, ready: Mapping[str, Sequence[int]], layer: str) -> None:
        """Note up to where the announced prompts have their KV in a layer.

        Args:
            ready: Positions by KV cache group, of each transfer that the step computes.
            layer: Name of the layer.
        """
        with self._changed:
            for transfer_id, positions in ready.items():
                entry = self._entries.get(transfer_id)
                if entry is not None and entry.ready is not None:
                    entry.ready[layer] = positions[self._groups[layer]]
            self._changed.notify_all()

    def prefilled(self, transfer_ids: Iterable[str]) -> None:
        """Note that the last step of announced prompts is over."""
        with self._changed:
            for transfer_id in transfer_ids:
                entry = self._entries.get(transfer_id)
                if entry is not None:
                    entry.prefilled = True

    def hold(self, transfer_id: str, request_id: str, digest: str, blocks: Blocks) -> None:
        """Start the lease of a prompt that is computed; one released before ends at once."""
        with self._changed:
            entry = self._entries.get(transfer_id)
            released = transfer_id in self._gone
            if entry is None:
                if released:
                    self._freed.append(request_id)
                    return
                entry = Outgoing(digest, blocks, None, None, 0.0)
                self._entries[transfer_id] = entry
            elif entry.request_id is not None or entry.digest != digest:
                # Two requests under one name, of which the first stays.
                self._freed.append(request_id)
                return
            entry.blocks, entry.ready, entry.request_id = blocks, None, request_id
            entry.held_at = self._clock()
            entry.deadline = entry.held_at + self._lease_s
            entry.ended = released or entry.complete
            self._free_if_ended(transfer_id, entry)
            self._changed.notify_all()

    def cancel(self, transfer_ids: Iterable[str]) -> None:
        """Forget prompts that vLLM stopped computing; no copy of their blocks is under way then."""
        with self._changed:
            for transfer_id in transfer_ids:
                entry = self._entries.get(transfer_id)
                if entry is not None and entry.request_id is not None:
                    # Another request's, under the same name.
                    continue
                if entry is not None:
                    entry.ended = True
                    self._changed.notify_all()
                    self._await_copies(entry)
                    del self._entries[transfer_id]
                self._remember(transfer_id)
            self._changed.notify_all()

    def renew(self, transfer_ids: Iterable[str]) -> list[str]:
        """Prolong leases; return those that have not ended.

        The answer that names a prompt overtakes the order to hold it, by a step of any length: one
        that is not known yet counts too.
        """
        with self._changed:
            live = [name for name in transfer_ids if name not in self._gone]
            for name in live:
                if name in self._entries:
                    self._entries[name].deadline = self._clock() + self._lease_s
            return live

    def release(self, transfer_ids: Iterable[str]) -> None:
        """End leases, also those that have yet to start."""
        with self._changed:
            for transfer_id in transfer_ids:
                self._remember(transfer_id)
                entry = self._entries.get(transfer_id)
                if entry is not None and entry.request_id is not None:
                    entry.ended = True
                    self._free_if_ended(transfer_id, entry)
            self._changed.notify_all()

    def take_freed(self) -> set[str]:
        """End the leases that nobody renewed; return the requests whose blocks may be freed."""
        with self._changed:
            now = self._clock()
            late = [
                name
                for name, entry in self._entries.items()
                if entry.request_id is not None and entry.deadline <= now and not entry.reading
            ]
            self._expired += len(late)
            for name in late:
                self._entries[name].ended = True
                self._free_if_ended(name, self._entries[name])
            freed, self._freed = self._freed, []
            return set(freed)

    def take_expired(self) -> int:
        """Return how many leases nobody renewed since the last call."""
        with self._changed:
            expired, self._expired = self._expired, 0
            return expired

    @contextmanager
    def reading(self, transfer_id: str, digest: str) -> Iterator[Reading]:
        """Read a prompt's KV, which stays meanwhile; waits until it is announced.

        Raises:
            GoneError: It has ended, is another prompt's, or was not announced in time.
        """
        with self._changed:
            entry = self._find(transfer_id, digest)
            entry.reading += 1
        try:
            yield Reading(self._changed, self._groups, entry, self._lease_s, self._clock)
        finally:
            with self._changed:
                entry.reading -= 1
                entry.deadline = self._clock() + self._lease_s
                if entry.request_id is not None:
                    self._free_if_ended(transfer_id, entry)

    def _find(self, transfer_id: str, digest: str) -> Outgoing:
        known = self._changed.wait_for(
            lambda: transfer_id in self._entries or transfer_id in self._gone, self._announce_s
        )
        entry = self._entries.get(transfer_id)
        if entry is None or entry.ended or transfer_id in self._gone:
            raise GoneError("the lease has ended" if known else "no such transfer was announced")
        if entry.digest != digest:
            raise GoneError("the transfer is another prompt's")
        return entry

    def _await_copies(self, entry: Outgoing) -> None:
        self._changed.wait_for(lambda: not entry.copying)

    def _free_if_ended(self, transfer_id: str, entry: Outgoing) -> None:
        if entry.ended and not entry.reading and self._entries.get(transfer_id) is entry:
            del self._entries[transfer_id]
            assert entry.request_id is not None
            self._freed.append(entry.request_id)
            self._remember(transfer_id)

    def _remember(self, transfer_id: str) -> None:
        self._gone[transfer_id] = None
        self._gone.move_to_end(transfer_id)
        if len(self._gone) > REMEMBERED:
            self._gone.popitem(last=False)


class Reading:
    """One reader's view of a prompt.

    Args:
        changed: Guards the entry, and is notified when it changes.
        groups: KV cache group of each layer.
        entry: The prompt.
        patience_s: Longest wait for the next layer, in s, and longest time that the reader may
            take for all of them once the prompt is kept: it must not keep blocks for ever.
        clock: The monotonic clock.
    """

    def __init__(
        self,
        changed: threading.Condition,
        groups: Mapping[str, int],
        entry: Outgoing,
        patience_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._changed, self._groups, self._entry = changed, groups, entry
        self._patience_s, self._clock, self._started_at = patience_s, clock, clock()
        self._sent: dict[str, int] = {}

    @property
    def computing(self) -> bool:
        """Whether the prompt is still being computed."""
        return self._entry.request_id is None and not self._entry.prefilled

    def next(self, layers: Sequence[str], spans: Sequence[Span]) -> list[tuple[str, Span]]:
        """Wait for layers with positions that were not returned yet; empty when there are none.

        Args:
            layers: The layers that the reader wants.
            spans: The positions that it wants, by KV cache group.

        Raises:
            GoneError: The prompt is not computed to its end, or nothing happened in a lease's time.
        """
        fresh: list[tuple[str, Span]] = []

        def over() -> bool:
            fresh[:] = [(name, span) for name in layers if (span := self._fresh(name, spans))]
            return self._entry.ended or bool(fresh) or self._all_sent(layers, spans)

        with self._changed:
            if not self._changed.wait_for(over, self._patience_s):
                raise GoneError("the prefill does not go on")
            if self._entry.ended:
                raise GoneError("the prefill was given up")
            for name, span in fresh:
                self._sent[name] = span.last
            return fresh

    def _fresh(self, layer: str, spans: Sequence[Span]) -> Span | None:
        span = spans[self._groups[layer]]
        ready = self._entry.ready
        last = span.last if ready is None else min(span.last, ready.get(layer, 0))
        fresh = Span(max(span.first, self._sent.get(layer, 0)), last)
        return fresh if len(fresh) else None

    def _all_sent(self, layers: Sequence[str], spans: Sequence[Span]) -> bool:
        return all(
            not len(spans[self._groups[name]])
            or self._sent.get(name, 0) >= spans[self._groups[name]].last
            for name in layers
        )

    @contextmanager
    def copying(self, layer: str, span: Span) -> Iterator[Sequence[int]]:
        """Give the blocks of some positions, which are not overwritten meanwhile.

        Raises:
            GoneError: The prefill was given up, the reader has had a lease's time, or the positions
                are not the prompt's.
        """
        with self._changed:
            blocks = self._blocks(layer, span)
            self._entry.copying += 1
        try:
            yield blocks
        finally:
            with self._changed:
                self._entry.copying -= 1
                self._changed.notify_all()

    def blocks(self, layer: str, span: Span) -> Sequence[int]:
        """Return the blocks of some positions, for a reader that copies them itself.

        Under a lease they stay until the reader has left. While the prompt is computed they are
        vLLM's: `cancel`, on the engine's thread, waits for copies of this process but cannot wait
        for a reader that may have died, so they may be overwritten under the reader's copy. It
        therefore asks `check_kept` once it has copied all, and drops everything if that raises.

        Raises:
            GoneError: As in `copying`.
        """
        with self._changed:
            return self._blocks(layer, span)

    def check_kept(self) -> None:
        """Make sure that what `blocks` returned was the prompt's until now.

        Raises:
            GoneError: The prefill was given up meanwhile.
        """
        with self._changed:
            # An entry that has ended under its lease is still whole until its last reader leaves.
            if self._entry.ended and self._entry.request_id is None:
                raise GoneError("the prefill was given up")

    def _blocks(self, layer: str, span: Span) -> Sequence[int]:
        self.check_kept()
        kept_since = max(self._started_at, self._entry.held_at)
        if self._entry.request_id is not None and self._clock() > kept_since + self._patience_s:
            raise GoneError("the reader takes longer than a lease")
        blocks = self._entry.blocks[self._groups[layer]]
        if span.last > len(blocks):
            raise GoneError("the prompt has fewer blocks")
        if 0 in blocks[span.first : span.last]:
            raise GoneError("the prompt does not keep these blocks")
        return blocks[span.first : span.last]

    def finish(self, reader: int, readers: int) -> None:
        """Note that a reader has all that it wants; with all readers' the lease ends."""
        with self._changed:
            self._entry.done.add(reader)
            self._entry.complete |= len(self._entry.done) >= readers
            self._entry.ended |= self._entry.request_id is not None and self._entry.complete
