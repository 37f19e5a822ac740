"""The KV of stored segments in one worker, one shard in each.

The scheduler's part decides what is stored and what is evicted; this only holds it, in up to three
tiers, of which each is a cache of the next: device memory, host memory, disk. Without a disk tier,
host memory is the store. Keys are kept as attention reads them, rotated at the position where they
were computed.

With a disk tier, host memory is bounded. What no request reads and is written may be dropped; where
that does not make enough room, a new segment is lost at once, and a request waits for its reads.
Ranks need not agree on what is in which tier.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import IntEnum

import torch
from vllm.logger import init_logger

from vllm_plugins.engine.kv_pages import KVPages
from vllm_plugins.kv_connectors.kvshare.device_tier import DeviceTier
from vllm_plugins.kv_connectors.kvshare.disk import DiskTier
from vllm_plugins.kv_connectors.kvshare.segment_file import DamagedFileError, KVShape
from vllm_plugins.kv_connectors.kvshare.transfer import Save

logger = init_logger("vllm.vllm_plugins.kvshare")

PATIENCE_SECONDS = 10.0
"""Time that a request waits for a slow disk, or for room in host memory, before it is computed."""


class State(IntEnum):
    """Whether a request's sources can be loaded; of several ranks' states the least counts."""

    FAILED = 0
    WAITING = 1
    READY = 2


@dataclass(frozen=True)
class Piece:
    """Tokens ``[offset, offset + length)`` of a stored segment."""

    key: int
    offset: int
    length: int


@dataclass(eq=False)
class Lease:
    """Segments that one request reads; once granted, they stay in memory until it is released.

    Attributes:
        pieces: What it reads.
        keys: The segments, each once.
        deadline: Time after which it is not waited for any more.
        granted: Whether its segments are in memory or being read.
    """

    pieces: tuple[Piece, ...]
    keys: tuple[int, ...]
    deadline: float
    granted: bool = False


class Payloads:
    """KV of segments by key; each of shape (layers, 2, tokens, kv heads, head size).

    Args:
        pages: The paged cache from which it is read; gives all sizes.
        limit: Most bytes in host memory; None where the index alone bounds them.
        disk: The disk tier; needs a limit.
        device: The device tier.
        clock: Time in seconds.

    Attributes:
        bytes: Host memory of what is stored and of what is being read.
    """

    def __init__(
        self,
        pages: KVPages,
        limit: int | None = None,
        disk: DiskTier | None = None,
        device: DeviceTier | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pages = pages
        self._shape = KVShape(pages.num_layers, pages.num_heads, pages.head_size, pages.dtype)
        self._pinned = pages.device.type == "cuda"
        self._limit, self._disk, self._device, self._clock = limit, disk, device, clock
        # What was idle longest first.
        self._stored: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._reads: dict[int, tuple[Future[torch.Tensor], int]] = {}
        self._held: Counter[int] = Counter()
        self._waiting: deque[Lease] = deque()
        self._used: set[int] = set()
        self._lost: set[int] = set()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def save(self, saves: Sequence[Save], slots: torch.Tensor) -> None:
        """Copy KV out of the paged cache; what finds no room is lost.

        The copies are enqueued on the current stream. Whoever reads them on the same stream need
        not wait.

        Args:
            saves: The new segments, in the order of ``slots``.
            slots: Slots of all their tokens, int64, shape (sum of lengths,).
        """
        new = [self._allocate(save) for save in saves]
        sizes = [save.length for save in saves]
        for layer in range(self._pages.num_layers):
            for half, rows in enumerate(self._pages.read(layer, slots)):
                for target, part in zip(new, rows.split(sizes), strict=True):
                    if target is not None:
                        target[layer, half].copy_(part, non_blocking=True)
        computed = None
        if self._pinned and self._disk is not None:
            # The writer's thread sleeps until the copies are done.
            computed = torch.cuda.Event(blocking=True)
            computed.record()
        for save, payload in zip(saves, new, strict=True):
            if payload is not None:
                self._stored[save.key] = payload
                if self._disk is not None:
                    assert save.label is not None
                    self._disk.write(save.key, save.label, payload, computed)

    def _allocate(self, save: Save) -> torch.Tensor | None:
        size = save.length * self._shape.bytes_per_token
        # Who waits for room goes before text that nobody may ask for.
        if self._waiting or not self._make_room(size):
            self._lost.add(save.key)
            return None
        shape = self._shape.of(save.length)
        try:
            payload = torch.empty(shape, dtype=self._shape.dtype, pin_memory=self._pinned)
        except (MemoryError, RuntimeError):
            # Page-locked memory is scarcer than host_gib says.
            self._lost.add(save.key)
            return None
        self.bytes += size
        return payload

    def _make_room(self, size: int) -> bool:
        """Drop what was idle longest until ``size`` bytes fit; nothing where they cannot."""
        missing = 0 if self._limit is None else self.bytes + size - self._limit
        victims: list[int] = []
        for key, payload in self._stored.items():
            if missing <= 0:
                break
            if not self._held[key] and not self._is_writing(key):
                victims.append(key)
                missing -= payload.nbytes
        if missing > 0:
            return False
        for key in victims:
            self._drop(key)
            if not self._on_disk(key):
                # It could not be written.
                self._lost.add(key)
        return True

    def _is_writing(self, key: int) -> bool:
        return self._disk is not None and self._disk.is_writing(key)

    def _on_disk(self, key: int) -> bool:
        return self._disk is not None and key in self._disk

    def _drop(self, key: int) -> None:
        """Drop a segment from host memory, and so from the device."""
        payload = self._stored.pop(key, None)
        if payload is not None:
            self.bytes -= payload.nbytes
        if self._device is not None:
            self._device.forget(key)

    def forget(self, key: int) -> None:
        """Drop a segment from all tiers, if it is there."""
        self._drop(key)
        self._used.discard(key)
        if key in self._reads:
            read, size = self._reads.pop(key)
            read.cancel()
            self.bytes -= size
        if self._disk is not None:
            self._disk.forget(key)

    def keep_only(self, keys: Iterable[int]) -> None:
        """Forget what an earlier life left on disk and is not known; what is missing is lost."""
        if self._disk is not None:
            self._lost |= self._disk.keep_only(keys)

    def take_lost(self) -> set[int]:
        """Return the segments that were lost since the last call."""
        lost, self._lost = self._lost, set()
        return lost

    def lease(self, pieces: Sequence[Piece]) -> Lease:
        """Ask for pieces to be kept in memory, after those who wait already."""
        keys = tuple(dict.fromkeys(piece.key for piece in pieces))
        lease = Lease(tuple(pieces), keys, self._clock() + PATIENCE_SECONDS)
        if self._limit is not None and sum(map(self._size, keys)) > self._limit:
            # It would wait in vain, and others behind it.
            lease.deadline = self._clock()
        else:
            self._waiting.append(lease)
            self._grant_in_order()
        return lease

    def _size(self, key: int) -> int:
        """Return the bytes that a segment takes, or will take, in host memory."""
        if key in self._stored:
            return self._stored[key].nbytes
        return self._disk.size(key) if self._disk is not None and key in self._disk else 0

    def release(self, lease: Lease) -> None:
        """Let go of a lease, granted or not."""
        if lease.granted:
            lease.granted = False
            self._let_go(lease.keys)
        elif lease in self._waiting:
            self._waiting.remove(lease)

    def _let_go(self, keys: Iterable[int]) -> None:
        self._held.subtract(keys)
        # Without those that nobody holds any more.
        self._held = +self._held

    def poll(self) -> None:
        """Take note of what was read and written meanwhile; call it once between two steps."""
        if self._disk is not None:
            self._disk.poll()
        for key, (read, size) in list(self._reads.items()):
            if read.done():
                del self._reads[key]
                self.bytes -= size
                self._arrived(key, read)
        self._grant_in_order()

    def _arrived(self, key: int, read: Future[torch.Tensor]) -> None:
        try:
            payload = read.result()
        except (DamagedFileError, OSError, MemoryError, RuntimeError) as error:
            logger.warning("kvshare: the file of segment %d %s", key, error)
            self._lose(key)
        else:
            self._stored[key] = payload
            self.bytes += payload.nbytes

    def _lose(self, key: int) -> None:
        self.forget(key)
        self._lost.add(key)

    def _grant_in_order(self) -> None:
        while self._waiting and self._grant(self._waiting[0]):
            self._waiting.popleft()

    def _grant(self, lease: Lease) -> bool:
        """Keep what a lease names, and begin to read what is not in memory; all of it or none."""
        absent = [k for k in lease.keys if k not in self._stored and k not in self._reads]
        sizes = {key: self._size(key) for key in absent if self._on_disk(key)}
        self._held.update(lease.keys)
        if not self._make_room(sum(sizes.values())):
            self._let_go(lease.keys)
            return False
        for key, size in sizes.items():
            assert self._disk is not None
            self._reads[key] = self._disk.read(key), size
            self.bytes += size
        lease.granted = True
        return True

    def state(self, lease: Lease) -> State:
        """Return whether a lease's pieces can be loaded; a segment that is not there is lost."""
        waiting = not lease.granted
        for piece in lease.pieces:
            payload = self._stored.get(piece.key)
            if payload is None:
                if piece.key not in self._reads and (lease.granted or not self._on_disk(piece.key)):
                    self._lose(piece.key)
                    return State.FAILED
                waiting = True
            elif not self._holds(payload, piece):
                self._lose(piece.key)
                return State.FAILED
        if not waiting:
            return State.READY
        return State.WAITING if self._clock() < lease.deadline else State.FAILED

    def _holds(self, payload: torch.Tensor, piece: Piece) -> bool:
        """Whether a payload is what it should be and reaches as far as a piece."""
        tokens = payload.shape[2]
        return (
            payload.dtype == self._shape.dtype
            and payload.shape == self._shape.of(tokens)
            and tokens >= piece.offset + piece.length
        )

    def start(self, lease: Lease) -> None:
        """Count a use of a lease's segments; who is used again goes to the device tier too."""
        for key in lease.keys:
            payload = self._stored[key]
            self._stored.move_to_end(key)
            if self._device is not None and key in self._used:
                self._device.put(key, payload)
            self._used.add(key)

    def load(self, layer: int, half: int, pieces: Sequence[Piece]) -> torch.Tensor:
        """Return one layer's keys (half 0) or values (half 1) of pieces, one after the other.

        Args:
            layer: Index of the layer.
            half: 0 for keys, 1 for values.
            pieces: What to return, of a lease that is ready.

        Returns:
            Shape (sum of lengths, kv heads, head size), on the cache's device.
        """
        row = (self._shape.kv_heads, self._shape.head_size)
        total = sum(piece.length for piece in pieces)
        loaded = torch.empty((total, *row), dtype=self._shape.dtype, device=self._pages.device)
        for piece, part in zip(pieces, loaded.split([p.length for p in pieces]), strict=True):
            if self._device is not None and piece.key in self._device:
                self._device.load(piece.key, piece.offset, layer, half, part)
            else:
                end = piece.offset + piece.length
                rows = self._stored[piece.key][layer, half, piece.offset : end]
                part.copy_(rows, non_blocking=True)
        return loaded

    def close(self) -> None:
        """Finish writing, as far as there is time."""
        if self._disk is not None:
            self._disk.close()
