"""The decode side in a worker: pulls prompts' KV into blocks that vLLM has set aside for it."""

from __future__ import annotations

import threading
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_plugins.kv_connectors.pd.geometry import Pull, Shard, plan_pulls, readers_of
from vllm_plugins.kv_connectors.pd.protocol import (
    MAX_BLOCKS,
    PIECE_BYTES,
    SLOTS,
    Kind,
    PullRequest,
    integers,
    says_gone,
    text,
)
from vllm_plugins.wire.errors import WireDamagedError, WireError, WireRefusedError
from vllm_plugins.wire.shared_memory import SharedBuffer

if TYPE_CHECKING:
    from vllm_plugins.kv_connectors.pd.orders import Load
    from vllm_plugins.kv_connectors.pd.pages import Pages
    from vllm_plugins.kv_connectors.pd.peers import PeerConnections
    from vllm_plugins.kv_connectors.pd.reference import Peer
    from vllm_plugins.wire.connection import Connection
    from vllm_plugins.wire.frame import Frame

logger = init_logger("vllm.vllm_plugins.pd")

# Prompts that are pulled at a time, so that a slow peer does not hold up another's.
PARALLEL_PULLS = 4


class CancelledError(Exception):
    """Nobody wants the prompt any more."""


class DecodeWorker:
    """Pulls KV for one worker.

    Args:
        pages: The worker's KV cache.
        groups: KV cache group of each layer.
        rank: The worker's number among all of the instance.
        connections: Connections to prefill workers, which it owns from now on.
        share_memory: Whether data may come through shared memory on one host.
    """

    def __init__(
        self,
        pages: Pages,
        groups: dict[str, int],
        rank: int,
        connections: PeerConnections,
        *,
        share_memory: bool,
    ) -> None:
        self._pages, self._groups, self._rank = pages, groups, rank
        self._connections, self._share_memory = connections, share_memory
        self._readers: tuple[Shard, ...] = (pages.shard,)
        self._plans: dict[tuple[Peer, ...], _Plan] = {}
        self._pool = ThreadPoolExecutor(PARALLEL_PULLS, thread_name_prefix="pd-pull")
        # Guards what follows.
        self._lock = threading.Lock()
        self._cancel: dict[str, threading.Event] = {}
        self._finished: set[str] = set()
        self._failed: set[str] = set()
        self._received: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._seconds: list[float] = []

    def introduce(self, readers: Sequence[Shard]) -> None:
        """Learn what all workers of this instance hold."""
        self._readers = tuple(readers)

    def start(self, load: Load) -> None:
        """Pull a prompt in the background."""
        cancelled = threading.Event()
        with self._lock:
            self._cancel[load.request_id] = cancelled
        self._pool.submit(self._run, load, cancelled)

    def take_finished(self, ended: set[str]) -> tuple[set[str], set[str]]:
        """Return the requests whose pull is over, and those of them that failed.

        Args:
            ended: Requests that vLLM has ended; their pulls stop.
        """
        with self._lock:
            for request_id in ended & self._cancel.keys():
                self._cancel[request_id].set()
            results = self._finished, self._failed
            self._finished, self._failed = set(), set()
            return results

    def take_counts(self) -> tuple[Counter[str], Counter[str], list[float]]:
        """Return bytes by way, failures by reason and durations in s since the last call."""
        with self._lock:
            counts = self._received, self._failures, self._seconds
            self._received, self._failures, self._seconds = Counter(), Counter(), []
            return counts

    def close(self) -> None:
        """Stop pulling."""
        with self._lock:
            for cancelled in self._cancel.values():
                cancelled.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._connections.close()

    def _run(self, load: Load, cancelled: threading.Event) -> None:
        start, reason = time.monotonic(), ""
        unread: tuple[Peer, ...] = ()
        try:
            plan = self._plan(load.reference.peers)
            unread = plan.unread
            for peer, pull, readers in plan.pulls:
                self._pull(load, peer, pull, readers, cancelled)
        except CancelledError:
            reason = "cancelled"
        except WireError as error:
            reason = _reason(error)
            logger.warning("vllm-plugins: pd: %s: %s", load.request_id, error)
        except ValueError as error:
            reason = "incompatible"
            logger.warning("vllm-plugins: pd: %s: %s", load.request_id, error)
        except Exception:
            # The request must come back whatever happens: vLLM waits for it.
            reason = "error"
            logger.exception("vllm-plugins: pd: %s: the pull broke off", load.request_id)
        with self._lock:
            del self._cancel[load.request_id]
            self._finished.add(load.request_id)
            if reason:
                self._failed.add(load.request_id)
                self._failures[reason] += 1
            else:
                self._seconds.append(time.monotonic() - start)
        if reason:
            self._connections.release_later(load.reference)
        elif unread and self._rank == 0:
            self._connections.release_later(replace(load.reference, peers=unread))

    def _plan(self, peers: tuple[Peer, ...]) -> _Plan:
        plan = self._plans.get(peers)
        if plan is None:
            writers = [self._describe(peer) for peer in peers]
            counts = [readers_of(index, self._readers, writers) for index in range(len(peers))]
            plan = self._plans[peers] = _Plan(
                [
                    (peers[pull.writer], pull, counts[pull.writer])
                    for pull in plan_pulls(self._pages.shard, writers)
                ],
                tuple(peer for peer, count in zip(peers, counts, strict=True) if not count),
            )
        return plan

    def _describe(self, peer: Peer) -> Shard:
        with self._connections.to(peer) as connection:
            header = {"generation": peer.generation}
            return Shard.from_json(connection.request(Kind.DESCRIBE, header).header)

    def _pull(
        self, load: Load, peer: Peer, pull: Pull, readers: int, cancelled: threading.Event
    ) -> None:
        with self._connections.to(peer) as connection:
            shared = None
            if self._share_memory and connection.local:
                shared = SharedBuffer.create(SLOTS * self._slot_bytes(pull))
            try:
                _Receiver(self._pages, self._groups, load, pull, shared, cancelled).run(
                    connection, self._request(load, pull, readers, shared), peer.generation
                )
            finally:
                if shared is not None:
                    shared.close()
            size = self._size(load, pull)
            way = "shared_memory" if shared else "unix" if connection.local else "tcp"
        with self._lock:
            self._received[way] += size

    def _request(
        self, load: Load, pull: Pull, readers: int, shared: SharedBuffer | None
    ) -> PullRequest:
        return PullRequest(
            load.reference.transfer_id,
            load.digest,
            load.spans,
            tuple((layer, self._groups[layer]) for layer in pull.layers),
            (pull.heads.first, pull.heads.last),
            self._rank,
            readers,
            shared.size if shared is not None else 0,
        )

    def _slot_bytes(self, pull: Pull) -> int:
        sizes = (self._pages.block_bytes(layer, pull.heads) for layer in pull.layers)
        return max(PIECE_BYTES, *sizes)

    def _size(self, load: Load, pull: Pull) -> int:
        return sum(
            len(load.spans[self._groups[layer]]) * self._pages.block_bytes(layer, pull.heads)
            for layer in pull.layers
        )


@dataclass(frozen=True)
class _Plan:
    """How a prompt comes from the workers of a prefill instance.

    Attributes:
        pulls: What this worker takes from whom, and how many of this instance's read there.
        unread: Workers whose heads others have as well, so that nobody reads there.
    """

    pulls: list[tuple[Peer, Pull, int]]
    unread: tuple[Peer, ...]


class _Receiver:
    """Takes the pieces of one pull, and sees to it that each position comes exactly once."""

    def __init__(
        self,
        pages: Pages,
        groups: dict[str, int],
        load: Load,
        pull: Pull,
        shared: SharedBuffer | None,
        cancelled: threading.Event,
    ) -> None:
        self._pages, self._groups, self._load = pages, groups, load
        self._heads, self._shared, self._cancelled = pull.heads, shared, cancelled
        self._slot_bytes = 0 if shared is None else shared.size // SLOTS
        self._next = {layer: load.spans[groups[layer]].first for layer in pull.layers}
        self._buffer = bytearray()

    def run(self, connection: Connection, request: PullRequest, generation: str) -> None:
        connection.send(Kind.PULL, request.to_json() | {"generation": generation})
        if self._shared is not None:
            connection.send_descriptor(self._shared.descriptor)
        try:
            self._receive_all(connection)
        except ValueError as error:
            raise WireDamagedError(f"a malformed piece: {error}") from None
        for layer, position in self._next.items():
            if position != self._load.spans[self._groups[layer]].last:
                raise WireDamagedError(f"the KV of {layer} ended at block {position}")
        connection.send(Kind.DONE, {})

    def _receive_all(self, connection: Connection) -> None:
        while True:
            frame = connection.receive(self._into)
            if self._cancelled.is_set():
                raise CancelledError
            if frame.kind == Kind.END:
                return
            if frame.kind != Kind.PIECE:
                raise WireDamagedError(f"unexpected message {frame.kind}")
            self._take(frame)
            if self._shared is not None:
                connection.send(Kind.ACK, {})

    def _into(self, size: int, header: dict[str, object]) -> memoryview:
        if len(self._buffer) < size:
            layer = text(header, "layer")
            if layer not in self._next:
                raise WireDamagedError("a piece is of no layer that was asked for")
            if size > max(PIECE_BYTES, self._pages.block_bytes(layer, self._heads)):
                raise WireDamagedError("a piece is larger than agreed")
            self._buffer = bytearray(size)
        return memoryview(self._buffer)[:size]

    def _take(self, frame: Frame) -> None:
        layer = text(frame.header, "layer")
        first, count = integers([frame.header.get(k) for k in ("first", "count")], 2, MAX_BLOCKS)
        if self._next.get(layer) != first or not count:
            raise WireDamagedError(f"blocks from {first} of {layer} are not the next")
        span = self._load.spans[self._groups[layer]]
        blocks = self._load.blocks[self._groups[layer]][first - span.first :][:count]
        size = count * self._pages.block_bytes(layer, self._heads)
        data = frame.payload if self._shared is None else self._slot(frame, size)
        if len(blocks) != count or len(data) != size:
            raise WireDamagedError(f"a piece of {layer} has another size than its blocks")
        self._pages.scatter(layer, blocks, self._heads, data)
        self._next[layer] = first + count

    def _slot(self, frame: Frame, size: int) -> memoryview:
        assert self._shared is not None
        slot, checksum = (frame.header.get(name) for name in ("slot", "checksum"))
        (slot,) = integers([slot], 1, SLOTS - 1)
        if size > self._slot_bytes:
            raise WireDamagedError("a piece is larger than agreed")
        data = self._shared.view[slot * self._slot_bytes :][:size]
        if zlib.crc32(data) != checksum:
            raise WireDamagedError("a piece in shared memory is damaged")
        return data


def _reason(error: WireError) -> str:
    """Return the name under which a failure is counted."""
    if isinstance(error, WireRefusedError):
        return "gone" if says_gone(error) else "refused"
    name = type(error).__name__
    return {"WireTimeoutError": "timeout", "WireDamagedError": "damaged"}.get(name, "closed")
