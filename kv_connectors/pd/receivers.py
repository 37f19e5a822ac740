"""How a decode worker takes the pieces of a pull: as data, or as blocks of mapped caches."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from vllm_plugins.kv_connectors.pd.protocol import (
    MAX_BLOCKS,
    SLOTS,
    Kind,
    PullRequest,
    integers,
    text,
)
from vllm_plugins.wire.errors import WireDamagedError

if TYPE_CHECKING:
    import threading

    from vllm_plugins.kv_connectors.pd.geometry import Pull
    from vllm_plugins.kv_connectors.pd.orders import Load
    from vllm_plugins.kv_connectors.pd.pages import Pages
    from vllm_plugins.wire.connection import Connection
    from vllm_plugins.wire.frame import Frame
    from vllm_plugins.wire.shared_memory import SharedBuffer


class CancelledError(Exception):
    """Nobody wants the prompt any more."""


class Receiver:
    """Takes the pieces of one pull, and sees to it that each position comes exactly once.

    Args:
        pages: The worker's KV cache.
        groups: KV cache group of each layer.
        load: The prompt.
        pull: What of it comes from this writer.
        cancelled: Set when nobody wants the prompt any more.
        piece_bytes: Bytes of the largest piece.
        shared: Shared memory of `SLOTS` such pieces, in which the data come; None for payloads.
    """

    def __init__(
        self,
        pages: Pages,
        groups: dict[str, int],
        load: Load,
        pull: Pull,
        cancelled: threading.Event,
        piece_bytes: int = 0,
        shared: SharedBuffer | None = None,
    ) -> None:
        self._pages, self._groups, self._load = pages, groups, load
        self._heads, self._shared, self._cancelled = pull.heads, shared, cancelled
        self._acknowledges = shared is not None
        self._piece_bytes = piece_bytes
        self._next = {layer: load.spans[groups[layer]].first for layer in pull.layers}
        self._buffer = bytearray()

    def run(self, connection: Connection, request: PullRequest, generation: str) -> None:
        """Pull.

        Raises:
            CancelledError: Nobody wants the prompt any more.
            WireError: It did not come, or not as it must.
        """
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
        self._finish(connection)

    def _finish(self, connection: Connection) -> None:
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
            if self._acknowledges:
                connection.send(Kind.ACK, {})

    def _into(self, size: int, header: dict[str, object]) -> memoryview:
        if len(self._buffer) < size:
            layer = text(header, "layer")
            if layer not in self._next:
                raise WireDamagedError("a piece is of no layer that was asked for")
            if size > self._piece_bytes:
                raise WireDamagedError("a piece is larger than agreed")
            self._buffer = bytearray(size)
        return memoryview(self._buffer)[:size]

    def _take(self, frame: Frame) -> None:
        layer = text(frame.header, "layer")
        first, blocks = self._targets(frame, layer)
        count = len(blocks)
        size = count * self._pages.block_bytes(layer, self._heads)
        data = frame.payload if self._shared is None else self._slot(frame, size)
        if len(data) != size:
            raise WireDamagedError(f"a piece of {layer} has another size than its blocks")
        self._pages.scatter(layer, blocks, self._heads, data)
        self._next[layer] = first + count

    def _targets(self, frame: Frame, *layers: str) -> tuple[int, list[int]]:
        """Return a piece's first position and this worker's blocks, all of which it must fill."""
        first, count = integers([frame.header.get(k) for k in ("first", "count")], 2, MAX_BLOCKS)
        for layer in layers:
            if self._next.get(layer) != first or not count:
                raise WireDamagedError(f"blocks from {first} of {layer} are not the next")
        group = self._groups[layers[0]]
        blocks = self._load.blocks[group][first - self._load.spans[group].first :][:count]
        if len(blocks) != count:
            raise WireDamagedError(f"a piece of {layers[0]} has more blocks than are wanted")
        return first, blocks

    def _slot(self, frame: Frame, size: int) -> memoryview:
        assert self._shared is not None
        slot, checksum = (frame.header.get(name) for name in ("slot", "checksum"))
        (slot,) = integers([slot], 1, SLOTS - 1)
        if size > self._piece_bytes:
            raise WireDamagedError("a piece is larger than agreed")
        data = self._shared.view[slot * self._piece_bytes :][:size]
        if zlib.crc32(data) != checksum:
            raise WireDamagedError("a piece in shared memory is damaged")
        return data


class DirectReceiver(Receiver):
    """Copies the blocks that the pieces name out of the writer's mapped caches.

    The writer is asked in the end whether they were the prompt's until the last copy was made.

    Args:
        pages: The worker's KV cache.
        groups: KV cache group of each layer.
        load: The prompt.
        pull: What of it comes from this writer.
        cancelled: Set when nobody wants the prompt any more.
        source: The writer's caches.
    """

    def __init__(
        self,
        pages: Pages,
        groups: dict[str, int],
        load: Load,
        pull: Pull,
        cancelled: threading.Event,
        source: Pages,
    ) -> None:
        super().__init__(pages, groups, load, pull, cancelled)
        self._source, self._layers = source, pull.layers
        self._acknowledges = True

    def _take(self, frame: Frame) -> None:
        layers = self._named(frame.header.get("layers"))
        first, targets = self._targets(frame, *layers)
        # The writer's blocks are looked up in what is mapped: none beyond it.
        count, most = len(targets), self._source.num_blocks - 1
        blocks = integers(frame.header.get("blocks"), count, most)
        self._pages.copy(self._source, layers, blocks, targets, self._heads)
        self._next.update(dict.fromkeys(layers, first + count))

    def _named(self, indices: object) -> list[str]:
        most = len(self._layers)
        if not isinstance(indices, list) or not 0 < len(indices) <= most:
            raise WireDamagedError("a piece is of no layers")
        layers = [self._layers[index] for index in integers(indices, len(indices), most - 1)]
        if len(set(layers)) < len(layers) or len({self._groups[layer] for layer in layers}) > 1:
            raise WireDamagedError("a piece's layers are not different ones of one group")
        return layers

    def _into(self, size: int, header: dict[str, object]) -> memoryview:
        raise WireDamagedError("a piece of mapped caches came with data")

    def _finish(self, connection: Connection) -> None:
        super()._finish(connection)
        if connection.receive(self._into).kind != Kind.KEPT:
            raise WireDamagedError("expected the word that the blocks were kept")
