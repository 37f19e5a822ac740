"""The memory behind an arena: one anonymous file that an engine's scheduler and workers map.

The scheduler's process makes it with ``memfd_create`` and a worker opens it as
``/proc/PID/fd/N``. A file in ``/dev/shm`` would need a name, which stays behind when the process
is killed between making and unlinking it, and counts against that file system's limit, which is
64 MiB in a container. An anonymous file goes with its last mapping, however its owners die, only
processes of the same user can open it, and its pages are taken when they are first written.

Layout: a header with a random name, by which a worker knows that it mapped the right file; one
word per worker, in which it reports the last step whose copies are done; one stamp per block, by
which reader and writer of an entry agree; then the blocks.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.epd.media import DIGEST_BYTES, Shape

_NAME_BYTES = 16
_STEP = struct.Struct("<Q")
_STAMP = struct.Struct(f"<Q{DIGEST_BYTES}s8x")
_PAGE = mmap.PAGESIZE


@dataclass(frozen=True)
class Location:
    """Where a worker finds the memory.

    Args:
        path: Opens it, while the scheduler's process lives.
        name: What its header must say, in hexadecimal.
        num_workers: Workers that report.
        num_blocks: Blocks.
        block_bytes: Bytes of a block.
    """

    path: str
    name: str
    num_workers: int
    num_blocks: int
    block_bytes: int

    @property
    def steps_at(self) -> int:
        """Offset of the workers' words."""
        return _NAME_BYTES

    @property
    def stamps_at(self) -> int:
        """Offset of the blocks' stamps."""
        return self.steps_at + self.num_workers * _STEP.size

    @property
    def blocks_at(self) -> int:
        """Offset of the blocks, on a page of its own."""
        end = self.stamps_at + self.num_blocks * _STAMP.size
        return -(-end // _PAGE) * _PAGE

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self.blocks_at + self.num_blocks * self.block_bytes


class SharedMemory:
    """A mapping of an arena's memory.

    Args:
        location: Where it is and how it is divided.
        descriptor: Of the open file; this object owns it.
    """

    def __init__(self, location: Location, descriptor: int) -> None:
        self.location = location
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, location.nbytes)
        self._view = memoryview(self._map)

    @classmethod
    def create(cls, num_workers: int, num_blocks: int, block_bytes: int) -> SharedMemory:
        """Make the memory, in the scheduler's process."""
        descriptor = os.memfd_create("vllm-plugins-epd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        name = secrets.token_hex(_NAME_BYTES)
        location = Location(path, name, num_workers, num_blocks, block_bytes)
        os.ftruncate(descriptor, location.nbytes)
        # A file that somebody shrinks would kill whoever has it mapped.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        memory = cls(location, descriptor)
        memory._view[:_NAME_BYTES] = bytes.fromhex(name)
        return memory

    @classmethod
    def open(cls, location: Location) -> SharedMemory:
        """Map it in a worker.

        Raises:
            PluginError: It cannot be opened or is not the scheduler's.
        """
        try:
            descriptor = os.open(Path(location.path), os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise PluginError(
                "--plugin epd",
                f"a worker cannot map the scheduler's arena: {error.strerror}",
                "run workers on the scheduler's host, as its user and in its process namespace",
            ) from error
        if os.fstat(descriptor).st_size == location.nbytes:
            memory = cls(location, descriptor)
            if memory._view[:_NAME_BYTES] == bytes.fromhex(location.name):
                return memory
            memory.close()
        else:
            os.close(descriptor)
        raise PluginError(
            "--plugin epd", "what a worker mapped is not the scheduler's arena", "restart both"
        )

    def close(self) -> None:
        """Let go of it; it is unmapped once nobody has any of the pieces handed out."""
        del self._view, self._map
        os.close(self._descriptor)

    def report(self, worker: int, step: int) -> None:
        """Say, as a worker, that the copies of all steps up to this one are done."""
        _STEP.pack_into(self._view, self.location.steps_at + worker * _STEP.size, step)

    def steps_done(self) -> int:
        """Return the step up to which all workers have done their copies."""
        location = self.location
        end = location.steps_at + location.num_workers * _STEP.size
        return min(step for (step,) in _STEP.iter_unpack(self._view[location.steps_at : end]))

    def stamp(self, block: int, sequence: int, digest: str) -> None:
        """Say that the entry which begins with a block is complete.

        Args:
            block: Its first block.
            sequence: Number of its reservation.
            digest: Of its rows, in hexadecimal.
        """
        at = self.location.stamps_at + block * _STAMP.size
        _STAMP.pack_into(self._view, at, sequence, bytes.fromhex(digest))

    def stamped(self, block: int) -> tuple[int, str]:
        """Return reservation number and digest of the entry that was last completed at a block."""
        sequence, digest = _STAMP.unpack_from(
            self._view, self.location.stamps_at + block * _STAMP.size
        )
        return sequence, digest.hex()

    def runs(self, blocks: tuple[int, ...], shape: Shape) -> list[tuple[int, int, memoryview]]:
        """Return an entry's bytes in as few pieces as its blocks allow.

        Returns:
            First row, number of rows and bytes of each piece, in order.
        """
        rows_per_block = self.location.block_bytes // shape.row_bytes
        # Rows of blocks that follow one another are in one piece only where they fill a block.
        joins = rows_per_block * shape.row_bytes == self.location.block_bytes
        pieces = []
        row = 0
        for first, count in _consecutive(blocks) if joins else ((b, 1) for b in blocks):
            rows = min(count * rows_per_block, shape.num_tokens - row)
            at = self.location.blocks_at + first * self.location.block_bytes
            pieces.append((row, rows, self._view[at : at + rows * shape.row_bytes]))
            row += rows
        return pieces

    def rows(
        self, blocks: tuple[int, ...], shape: Shape, first: int, count: int
    ) -> list[memoryview]:
        """Return the bytes of some of an entry's rows in as few pieces as its blocks allow."""
        found = []
        for row, rows, piece in self.runs(blocks, shape):
            start, end = max(row, first), min(row + rows, first + count)
            if start < end:
                found.append(piece[(start - row) * shape.row_bytes : (end - row) * shape.row_bytes])
        return found

    def digest(self, blocks: tuple[int, ...], shape: Shape) -> str:
        """Return the digest of an entry's rows, in hexadecimal."""
        return digest_of(piece for _, _, piece in self.runs(blocks, shape))


def digest_of(pieces: Iterable[memoryview]) -> str:
    """Return the first 16 bytes of the SHA-256 of all pieces, in hexadecimal.

    SHA-256 has instructions of its own on current CPUs and is twice as fast there as BLAKE2.
    """
    digest = sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()[: 2 * DIGEST_BYTES]


def _consecutive(blocks: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield first block and length of each run of consecutive blocks."""
    first, count = blocks[0], 1
    for block in blocks[1:]:
        if block == first + count:
            count += 1
        else:
            yield first, count
            first, count = block, 1
    yield first, count
