"""The prefill side in a worker: serves the blocks of finished prompts to decode workers."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_plugins.kv_connectors.pd.geometry import Heads
from vllm_plugins.kv_connectors.pd.outbox import GoneError, Outbox, Reading
from vllm_plugins.kv_connectors.pd.protocol import (
    DIRECT_BYTES,
    GONE,
    MAX_PIECE_BLOCKS,
    PIECE_BYTES,
    SLOTS,
    Kind,
    PullRequest,
    Span,
    text,
    transfers,
)
from vllm_plugins.wire.errors import WireRefusedError
from vllm_plugins.wire.shared_memory import SharedBuffer

if TYPE_CHECKING:
    from vllm_plugins.kv_connectors.pd.direct import CacheHandles
    from vllm_plugins.kv_connectors.pd.orders import Orders
    from vllm_plugins.kv_connectors.pd.pages import Pages
    from vllm_plugins.wire.connection import Connection
    from vllm_plugins.wire.frame import Frame

logger = init_logger("vllm.vllm_plugins.pd")


class PrefillWorker:
    """Serves one worker's blocks.

    Args:
        pages: The worker's KV cache.
        groups: KV cache group of each layer.
        generation: Of this run of the worker.
        lease_s: Time after which unrenewed leases end, in s.
        handles: With which readers on this host map the cache; None where they cannot.
    """

    def __init__(
        self,
        pages: Pages,
        groups: dict[str, int],
        generation: str,
        lease_s: float,
        handles: CacheHandles | None = None,
    ) -> None:
        self._pages, self._groups, self._generation = pages, groups, generation
        self._handles = handles
        self.outbox = Outbox(groups, lease_s)
        self._ready: dict[str, tuple[int, ...]] = {}
        self._last: list[str] = []
        self._counts = threading.Lock()
        self._sent = self._early = 0
        self._answers: dict[int, Callable[[Connection, Frame], None]] = {
            Kind.DESCRIBE: self._describe,
            Kind.CACHES: self._caches,
            Kind.PULL: self._pull,
            Kind.RENEW: self._renew,
            Kind.RELEASE: self._release,
        }

    def begin_step(self, orders: Orders) -> None:
        """Take a step's orders, before its forward writes any block."""
        self.outbox.cancel(orders.cancelled)
        for hold in orders.holds:
            self.outbox.hold(hold.transfer_id, hold.request_id, hold.digest, hold.blocks)
        for chunk in orders.chunks:
            self.outbox.announce(chunk.transfer_id, chunk.digest, chunk.blocks)
        self._ready = {chunk.transfer_id: chunk.ready for chunk in orders.chunks}
        self._last = [chunk.transfer_id for chunk in orders.chunks if chunk.last]

    def layer_computed(self, layer: str) -> None:
        """Note that the step's chunks have their KV in a layer."""
        if self._ready and layer in self._groups:
            self._pages.mark_written()
            self.outbox.computed(self._ready, layer)

    def end_step(self) -> None:
        """Note that the forward of the step is over: on CUDA, that all of it is on its way."""
        if self._last:
            self.outbox.prefilled(self._last)

    def take_counts(self) -> tuple[int, int]:
        """Return the bytes sent since the last call, and how many before their prompt's end."""
        with self._counts:
            counts = self._sent, self._early
            self._sent = self._early = 0
            return counts

    def serve(self, connection: Connection) -> None:
        """Answer the messages of one decode worker, or router, until it closes."""
        while True:
            frame = connection.receive()
            if frame.kind not in self._answers:
                raise WireRefusedError(f"unexpected message {frame.kind}")
            if text(frame.header, "generation") != self._generation:
                raise WireRefusedError(f"{GONE}this worker has been restarted")
            self._answers[frame.kind](connection, frame)

    def _describe(self, connection: Connection, frame: Frame) -> None:
        connection.send(Kind.SHARD, self._pages.shard.to_json())

    def _caches(self, connection: Connection, frame: Frame) -> None:
        handles = self._handles if connection.local else None
        connection.send(Kind.HANDLES, {} if handles is None else handles.to_json())

    def _renew(self, connection: Connection, frame: Frame) -> None:
        live = self.outbox.renew(transfers(frame.header))
        connection.send(Kind.RENEWED, {"transfers": live})

    def _release(self, connection: Connection, frame: Frame) -> None:
        self.outbox.release(transfers(frame.header))
        connection.send(Kind.RELEASED, {})

    def _pull(self, connection: Connection, frame: Frame) -> None:
        wanted = PullRequest.from_json(frame.header)
        self._check(wanted, local=connection.local)
        # Between two pulls a reader may be silent for long; within one it may not.
        idle_timeout_s, connection.idle_timeout_s = connection.idle_timeout_s, None
        try:
            with self.outbox.reading(wanted.transfer_id, wanted.digest) as reading:
                if wanted.direct:
                    _DirectSender(self, connection, wanted, reading, None).run()
                elif wanted.shared:
                    descriptor = connection.receive_descriptor()
                    with SharedBuffer.attach(descriptor, wanted.shared) as shared:
                        _Sender(self, connection, wanted, reading, shared.view).run()
                else:
                    _Sender(self, connection, wanted, reading, None).run()
        except GoneError as error:
            raise WireRefusedError(f"{GONE}{error}") from None
        finally:
            connection.idle_timeout_s = idle_timeout_s

    def _check(self, wanted: PullRequest, *, local: bool) -> None:
        """Refuse what this worker does not have."""
        heads, mine = Heads(*wanted.heads), self._pages.shard.heads
        if not len(heads) or (heads & mine) != heads:
            raise WireRefusedError("this worker has no such heads")
        for layer, group in wanted.layers:
            if self._groups.get(layer) != group:
                raise WireRefusedError("this worker has no such layer in such a group")
        if wanted.direct and (wanted.shared or self._handles is None or not local):
            raise WireRefusedError("this worker's caches are not to be mapped so")
        if wanted.shared not in (0, SLOTS * self.slot_bytes(wanted)):
            raise WireRefusedError("the shared memory has another size than agreed")

    def slot_bytes(self, wanted: PullRequest) -> int:
        """Return the bytes of the largest piece of a pull."""
        heads = Heads(*wanted.heads)
        sizes = (self._pages.block_bytes(layer, heads) for layer, _ in wanted.layers)
        return max(PIECE_BYTES, *sizes)

    def count(self, sent: int, *, early: bool) -> None:
        """Count bytes that have left, early if their prompt is still being computed."""
        with self._counts:
            self._sent += sent
            self._early += sent if early else 0

    @property
    def pages(self) -> Pages:
        """The worker's KV cache."""
        return self._pages


class _Sender:
    """Sends the pieces of one pull as they become ready."""

    def __init__(
        self,
        worker: PrefillWorker,
        connection: Connection,
        wanted: PullRequest,
        reading: Reading,
        shared: memoryview | None,
    ) -> None:
        self._worker, self._connection = worker, connection
        self._wanted, self._reading, self._shared = wanted, reading, shared
        self._heads = Heads(*wanted.heads)
        self._slot_bytes = worker.slot_bytes(wanted)
        self._buffer = bytearray(0 if shared or wanted.direct else self._slot_bytes)
        self._unacknowledged = self._pieces = 0

    def run(self) -> None:
        layers = [layer for layer, _ in self._wanted.layers]
        while fresh := self._reading.next(layers, self._wanted.groups):
            self._send_all(fresh)
        self._connection.send(Kind.END, {"pieces": self._pieces})
        while self._unacknowledged:
            self._acknowledged()
        if self._connection.receive().kind != Kind.DONE:
            raise WireRefusedError("expected the reader's word that it has all")
        self._finish()

    def _send_all(self, fresh: list[tuple[str, Span]]) -> None:
        for layer, span in fresh:
            size = self._worker.pages.block_bytes(layer, self._heads)
            for piece in span.pieces(size, PIECE_BYTES):
                self._send(layer, piece, len(piece) * size)

    def _finish(self) -> None:
        self._reading.finish(self._wanted.reader, self._wanted.readers)

    def _send(self, layer: str, piece: Span, size: int) -> None:
        header = {"layer": layer, "first": piece.first, "count": len(piece)}
        if self._shared is None:
            target = memoryview(self._buffer)[:size]
            self._copy(layer, piece, target)
            self._connection.send(Kind.PIECE, header, target)
        else:
            slot = self._pieces % SLOTS
            while self._unacknowledged == SLOTS:
                self._acknowledged()
            target = self._shared[slot * self._slot_bytes :][:size]
            self._copy(layer, piece, target)
            check = zlib.crc32(target)
            self._connection.send(Kind.PIECE, header | {"slot": slot, "checksum": check})
            self._unacknowledged += 1
        self._pieces += 1
        self._worker.count(size, early=self._reading.computing)

    def _copy(self, layer: str, piece: Span, target: memoryview) -> None:
        with self._reading.copying(layer, piece) as blocks:
            self._worker.pages.gather(layer, blocks, self._heads, target)

    def _acknowledged(self) -> None:
        if self._connection.receive().kind != Kind.ACK:
            raise WireRefusedError("expected an acknowledgement")
        self._unacknowledged -= 1


class _DirectSender(_Sender):
    """Names blocks of the mapped caches in place of sending what is in them.

    A piece is of all the group's layers that are ready, which the reader copies at once. It is at
    most `SLOTS` pieces behind, and has the time of a message for each; a reader that is slower
    loses the connection, and with it the word that its copies are whole. Bytes count as sent once
    their blocks are named.
    """

    def _send_all(self, fresh: list[tuple[str, Span]]) -> None:
        numbers = {layer: index for index, (layer, _) in enumerate(self._wanted.layers)}
        groups = dict(self._wanted.layers)
        together: dict[tuple[int, Span], list[str]] = {}
        for layer, span in fresh:
            together.setdefault((groups[layer], span), []).append(layer)
        for (_, span), layers in together.items():
            sizes = [self._worker.pages.block_bytes(layer, self._heads) for layer in layers]
            for piece in span.pieces(max(*sizes, DIRECT_BYTES // MAX_PIECE_BLOCKS), DIRECT_BYTES):
                places = [numbers[layer] for layer in layers]
                self._offer(layers[0], places, piece, len(piece) * sum(sizes))

    def _offer(self, layer: str, places: list[int], piece: Span, size: int) -> None:
        while self._unacknowledged == SLOTS:
            self._acknowledged()
        blocks = list(self._reading.blocks(layer, piece))
        self._worker.pages.await_written()
        header = {"layers": places, "first": piece.first, "count": len(piece), "blocks": blocks}
        self._connection.send(Kind.PIECE, header)
        self._unacknowledged += 1
        self._pieces += 1
        self._worker.count(size, early=self._reading.computing)

    def _finish(self) -> None:
        self._reading.check_kept()
        super()._finish()
        self._connection.send(Kind.KEPT, {})
