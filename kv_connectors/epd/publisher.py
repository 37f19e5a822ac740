"""The encode server's end of the wire: sends embeddings, keeps leases."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from vllm_plugins.kv_connectors.epd import metrics, protocol
from vllm_plugins.wire.errors import WireClosedError, WireRefusedError

if TYPE_CHECKING:
    from vllm_plugins.kv_connectors.epd.arena import Arena
    from vllm_plugins.kv_connectors.epd.metrics import Ledger
    from vllm_plugins.kv_connectors.epd.shared_memory import SharedMemory
    from vllm_plugins.wire.connection import Connection


class Publisher:
    """Answers prefill servers; one call of `serve` per connection, each in a thread.

    Args:
        arena: What there is to send.
        memory: Where its bytes are.
        generation: Name of this server's life, in hexadecimal.
        lease_s: Seconds for which a renewed lease runs.
        ledger: Metrics.
    """

    def __init__(
        self,
        arena: Arena,
        memory: SharedMemory,
        generation: str,
        lease_s: float,
        ledger: Ledger,
    ) -> None:
        self.generation = generation
        self._arena = arena
        self._memory = memory
        self._lease_s = lease_s
        self._ledger = ledger
        self._numbers = itertools.count()

    def serve(self, connection: Connection) -> None:
        """Answer one prefill server until it closes.

        Raises:
            WireRefusedError: It asked for something that is not in the protocol.
        """
        while True:
            try:
                frame = connection.receive()
            except WireClosedError:
                return
            self._answer(connection, frame.kind, frame.header)

    def _answer(self, connection: Connection, kind: int, header: dict[str, Any]) -> None:
        if kind not in (protocol.FETCH, protocol.RENEW, protocol.RELEASE):
            raise WireRefusedError(f"frames of kind {kind} are not known here")
        if header.get("generation") != self.generation:
            reason = "the encode server was restarted"
            connection.send(protocol.MISSING, {"reason": reason, "lasting": True})
        elif kind == protocol.FETCH:
            self._send_rows(connection, header)
        elif kind == protocol.RELEASE:
            self._arena.end_lease(_text(header, "lease"), _text(header, "media"))
            connection.send(protocol.DONE, {})
        elif self._arena.renew(_text(header, "lease"), self._lease_s):
            connection.send(protocol.DONE, {})
        else:
            connection.send(protocol.MISSING, {"reason": "the lease has ended"})

    def _send_rows(self, connection: Connection, header: dict[str, Any]) -> None:
        media = _text(header, "media")
        first, count = _count(header, "first"), _count(header, "rows")
        if header.get("wait") is True:
            self._arena.wait_for(media, protocol.WAIT_S)
        # While it is sent its blocks must not be given to another, whatever becomes of the lease.
        holder = f"send {next(self._numbers)}"
        entry = self._arena.hold(media, holder)
        if entry is None:
            connection.send(protocol.MISSING, {"reason": "the item is not here"})
            return
        try:
            if first + count > entry.shape.num_tokens:
                raise WireRefusedError("rows were asked for that the item does not have")
            rows = self._memory.rows(entry.blocks, entry.shape, first, count)
            answer = {**entry.shape.to_json(), "checksum": entry.digest}
            connection.send(protocol.ROWS, answer, *rows)
        finally:
            self._arena.release(media, holder)
        self._ledger.inc(metrics.SENT_BYTES, count * entry.shape.row_bytes)


def _text(header: dict[str, Any], name: str) -> str:
    value = header.get(name)
    if not isinstance(value, str):
        raise WireRefusedError(f"{name} is not a text")
    return value


def _count(header: dict[str, Any], name: str) -> int:
    value = header.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise WireRefusedError(f"{name} is not a count")
    return value
