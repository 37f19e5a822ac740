"""The multimedia token cache: a paged store of embeddings, counted in blocks.

This is the bookkeeping alone, apart from the memory that the blocks stand for. An entry holds the
embeddings of one media item under its content id and stays while somebody holds it or a lease on
it runs; after that it is kept as a cache and goes, least recently used first, when room is needed.
All methods may be called from any thread.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from vllm_plugins.kv_connectors.epd.media import Shape


@dataclass(eq=False)
class Entry:
    """Embeddings of one item, or the room for them.

    Attributes:
        media: Content id of the item.
        shape: What its rows look like.
        blocks: Blocks that hold its rows, in order.
        sequence: Number of the reservation, never used twice by one arena.
        digest: Digest of its rows in hexadecimal; empty until they are complete.
        holders: Names of those who need it.
        leases: End of each lease on it, on the arena's clock, by the lease's name.
    """

    media: str
    shape: Shape
    blocks: tuple[int, ...]
    sequence: int
    digest: str = ""
    holders: set[str] = field(default_factory=set)
    leases: dict[str, float] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether its rows are there."""
        return bool(self.digest)


class Arena:
    """Blocks, who has them, and for how long.

    Args:
        num_blocks: How many there are.
        block_bytes: Bytes of one block.
        clock: Monotonic time in seconds.
    """

    def __init__(
        self, num_blocks: int, block_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self._clock = clock
        self._free = list(range(num_blocks))
        # Least recently used first.
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._held: dict[str, set[str]] = {}
        self._leased: dict[str, set[str]] = {}
        self._sequence = 0
        self._lock = threading.RLock()
        self._completed = threading.Condition(self._lock)

    def blocks_for(self, shape: Shape) -> int:
        """Return how many blocks an item takes; rows are never split over two."""
        rows = self.block_bytes // shape.row_bytes
        return -(-shape.num_tokens // rows) if rows else self.num_blocks + 1

    @property
    def used_bytes(self) -> int:
        """Bytes of all blocks that hold something, reclaimable or not."""
        return (self.num_blocks - len(self._free)) * self.block_bytes

    @property
    def available_blocks(self) -> int:
        """Blocks that are free, or would be once everything that nobody needs is evicted."""
        with self._lock:
            now = self._clock()
            spare = (len(e.blocks) for e in self._entries.values() if self._is_spare(e, now))
            return len(self._free) + sum(spare)

    def find(self, media: str) -> Entry | None:
        """Return a complete entry, which is thereby the most recently used."""
        with self._lock:
            entry = self._entries.get(media)
            if entry is None or not entry.is_complete:
                return None
            self._entries.move_to_end(media)
            return entry

    def is_writing(self, media: str) -> bool:
        """Whether an entry exists that is not complete."""
        with self._lock:
            entry = self._entries.get(media)
            return entry is not None and not entry.is_complete

    def fits(self, wanted: Iterable[Shape]) -> bool:
        """Whether all of these could be reserved now."""
        needed = sum(map(self.blocks_for, wanted))
        return needed <= len(self._free) or needed <= self.available_blocks

    def reserve(self, media: str, shape: Shape, holder: str) -> Entry | None:
        """Make room for an item and hold it; None where there is no room.

        Raises:
            ValueError: The arena has an entry of that name.
        """
        with self._lock:
            if media in self._entries:
                raise ValueError(f"{media!r} has an entry")
            needed = self.blocks_for(shape)
            if not self._make_room(needed):
                return None
            self._sequence += 1
            entry = Entry(media, shape, self._take(needed), self._sequence)
            self._entries[media] = entry
            self._hold(entry, holder)
            return entry

    def complete(self, entry: Entry, digest: str) -> None:
        """Say that an entry's rows are there, with their digest in hexadecimal."""
        with self._lock:
            entry.digest = digest
            self._completed.notify_all()

    def wait_for(self, media: str, seconds: float) -> None:
        """Wait until an entry is complete, but not for longer than so many seconds."""
        with self._lock:
            self._completed.wait_for(lambda: self.find(media) is not None, seconds)

    def discard(self, entry: Entry) -> None:
        """Give back the room of an entry, whoever holds it; nothing happens to one that is gone."""
        with self._lock:
            if self._entries.get(entry.media) is not entry:
                return
            for holder in list(entry.holders):
                self.release(entry.media, holder)
            for lease in list(entry.leases):
                self._end(entry, lease)
            self._remove(entry)

    def hold(self, media: str, holder: str) -> Entry | None:
        """Hold a complete entry under a name; None where there is none."""
        with self._lock:
            entry = self.find(media)
            if entry is not None:
                self._hold(entry, holder)
            return entry

    def share(self, media: str, holder: str) -> Entry | None:
        """Hold an entry under a name, whether it is complete or still being written."""
        with self._lock:
            entry = self._entries.get(media)
            if entry is not None:
                self._hold(entry, holder)
            return entry

    def release(self, media: str, holder: str) -> None:
        """Let go of one entry; a complete one stays as a cache."""
        with self._lock:
            entry = self._entries.get(media)
            if entry is not None:
                entry.holders.discard(holder)
            names = self._held.get(holder)
            if names is not None:
                names.discard(media)
                if not names:
                    del self._held[holder]

    def release_all(self, holder: str) -> None:
        """Let go of everything that is held under a name."""
        with self._lock:
            for media in list(self._held.get(holder, ())):
                self.release(media, holder)

    def lease(self, media: Iterable[str], lease: str, seconds: float) -> None:
        """Promise to keep complete entries for a time."""
        with self._lock:
            now = self._clock()
            for name in media:
                entry = self._entries[name]
                # Leases that nobody ended would pile up on an item that is asked for all the time.
                for old in [old for old, until in entry.leases.items() if until <= now]:
                    self._end(entry, old)
                entry.leases[lease] = now + seconds
                self._leased.setdefault(lease, set()).add(name)

    def renew(self, lease: str, seconds: float) -> bool:
        """Extend a lease from now; False where it has ended and something may be gone."""
        with self._lock:
            now = self._clock()
            entries = [self._entries[name] for name in self._leased.get(lease, ())]
            if not entries or any(entry.leases[lease] <= now for entry in entries):
                return False
            for entry in entries:
                entry.leases[lease] = max(entry.leases[lease], now + seconds)
            return True

    def end_lease(self, lease: str, media: str) -> None:
        """Take back the promise to keep one entry."""
        with self._lock:
            entry = self._entries.get(media)
            if entry is not None and lease in entry.leases:
                self._end(entry, lease)

    def forget(self) -> None:
        """Drop what nobody holds, leases or not, as when what was encoded is no longer right."""
        with self._lock:
            for entry in list(self._entries.values()):
                if entry.is_complete and not entry.holders:
                    self._remove(entry)

    def _end(self, entry: Entry, lease: str) -> None:
        del entry.leases[lease]
        names = self._leased[lease]
        names.discard(entry.media)
        if not names:
            del self._leased[lease]

    def _hold(self, entry: Entry, holder: str) -> None:
        entry.holders.add(holder)
        self._held.setdefault(holder, set()).add(entry.media)

    def _is_spare(self, entry: Entry, now: float) -> bool:
        """Whether nobody needs an entry; one that is not complete is somebody's to discard."""
        if not entry.is_complete or entry.holders:
            return False
        return not any(until > now for until in entry.leases.values())

    def _make_room(self, needed: int) -> bool:
        if needed > len(self._free) and needed > self.available_blocks:
            return False
        now = self._clock()
        for entry in list(self._entries.values()):
            if needed <= len(self._free):
                break
            if self._is_spare(entry, now):
                self._remove(entry)
        return True

    def _remove(self, entry: Entry) -> None:
        for lease in list(entry.leases):
            self._end(entry, lease)
        del self._entries[entry.media]
        for block in entry.blocks:
            bisect.insort(self._free, block)

    def _take(self, needed: int) -> tuple[int, ...]:
        """Take free blocks, in one run where there is one: a run is moved by one copy."""
        free = self._free
        start = 0
        for first in range(len(free) - needed + 1):
            if free[first + needed - 1] - free[first] == needed - 1:
                start = first
                break
        taken = tuple(free[start : start + needed])
        del free[start : start + needed]
        return taken

    def check(self) -> None:
        """Assert what must always hold: every block is in one place, every name leads both ways.

        Raises:
            AssertionError: It does not.
        """
        with self._lock:
            blocks = [b for entry in self._entries.values() for b in entry.blocks] + self._free
            assert sorted(blocks) == list(range(self.num_blocks)), "a block is lost or shared"
            assert self._free == sorted(self._free), "free blocks are out of order"
            for index, attribute in ((self._held, "holders"), (self._leased, "leases")):
                forth = {(name, media) for name, all_media in index.items() for media in all_media}
                back = {
                    (name, entry.media)
                    for entry in self._entries.values()
                    for name in getattr(entry, attribute)
                }
                assert forth == back, f"{attribute} do not match"
