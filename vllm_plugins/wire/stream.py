"""Frames on a socket: one after another, numbered, checked, each within a deadline."""

from __future__ import annotations

import array
import mmap
import os
import select
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_plugins.wire.errors import (
    WireClosedError,
    WireDamagedError,
    WireRefusedError,
    WireTimeoutError,
)
from vllm_plugins.wire.frame import (
    CHECKSUM,
    PRELUDE,
    SEQUENCES,
    Frame,
    Limits,
    Prelude,
    decode_header,
    encode_header,
    pack_prelude,
    unpack_prelude,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    Buffer = ReadableBuffer

Destination = Callable[[int, dict[str, Any]], memoryview]
"""Gives the buffer for a payload of so many bytes behind this header."""

# Small enough that a checksum finds the bytes in the processor's cache.
CHUNK_BYTES = 1 << 18
# A Unix socket's buffer does not grow by itself as that of TCP does.
_UNIX_BUFFER_BYTES = 1 << 20
# The system takes 1024 at once.
MOST_BUFFERS = 512
_DESCRIPTOR_SPACE = socket.CMSG_SPACE(2 * array.array("i").itemsize)


class FrameStream:
    """Sends and receives frames; one thread sends and receives, others may only interrupt.

    Args:
        sock: A connected stream socket, which it owns from now on.
        limits: What it accepts.
        peer: Description of the other end.

    Attributes:
        limits: What it accepts.
        peer: Description of the other end.
        local: Whether the other end is reached through a Unix socket.
    """

    def __init__(self, sock: socket.socket, limits: Limits, peer: str) -> None:
        sock.setblocking(False)
        self.limits, self.peer = limits, peer
        self.local = sock.family == socket.AF_UNIX
        if self.local:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER_BYTES)
        self._socket = sock
        # Shutting a socket down while it is closed could hit the next one of its number.
        self._ending = threading.Lock()
        self._sent = self._received = 0
        self._send_seed = self._receive_seed = 0
        # Set while a frame is under way: after an error in between, nobody knows where the next
        # one starts.
        self._sending = self._receiving = False

    def start_checksums(self, send_seed: int, receive_seed: int) -> None:
        """Start the checksums of all further frames from these values, one per direction."""
        self._send_seed, self._receive_seed = send_seed, receive_seed

    def send(
        self,
        kind: int,
        header: Mapping[str, Any],
        payload: Sequence[Buffer],
        deadline: float,
        descriptor: int | None = None,
    ) -> None:
        """Send a frame.

        Args:
            kind: 0 to 65535.
            header: A JSON object.
            payload: Contiguous buffers, sent one behind another.
            deadline: When it must be over, in seconds of `time.monotonic`.
            descriptor: A file to share with the peer.

        Raises:
            WireError: The frame, or a part of it, was not sent.
        """
        if self._sending:
            raise WireClosedError("an earlier frame was sent in part only")
        encoded, views = encode_header(header), list(_views(payload))
        length = sum(map(len, views))
        head = pack_prelude(kind, self._sent, encoded, length, self._send_seed) + encoded
        self._sending = True
        pending: list[Buffer] = [head]
        unsent, checksum = 0, self._send_seed
        for chunk in _chunks(views):
            if unsent + len(chunk) > CHUNK_BYTES or len(pending) == MOST_BUFFERS:
                self._write(pending, deadline)
                pending, unsent = [], 0
            checksum = zlib.crc32(chunk, checksum)
            pending.append(chunk)
            unsent += len(chunk)
        self._write([*pending, CHECKSUM.pack(checksum)], deadline, descriptor)
        self._sent = (self._sent + 1) % SEQUENCES
        self._sending = False

    def receive(
        self,
        deadline: float,
        into: Destination | None = None,
        descriptors: list[int] | None = None,
    ) -> Frame:
        """Receive a frame.

        Args:
            deadline: When it must have arrived, in seconds of `time.monotonic`.
            into: Gives the buffer for the payload where there is one. What it raises is raised
                here once the payload has been read and dropped; the next frame can be received.
            descriptors: Takes the files that came with the frame; without it they are closed.

        Raises:
            WireError: No whole and correct frame arrived in time.
        """
        if self._receiving:
            raise WireClosedError("an earlier frame was received in part only")
        self._receiving = True
        start = bytearray(PRELUDE.size)
        filled = (
            self._read_descriptors(start, deadline, descriptors) if descriptors is not None else 0
        )
        self._fill(memoryview(start)[filled:], deadline)
        prelude = unpack_prelude(start, self._receive_seed)
        self._check(prelude)
        encoded = bytearray(prelude.header_bytes)
        self._fill(memoryview(encoded), deadline)
        if zlib.crc32(encoded, self._receive_seed) != prelude.header_checksum:
            raise WireDamagedError("a frame's header is damaged")
        header = decode_header(encoded)
        payload = self._receive_payload(prelude.payload_bytes, header, into, deadline)
        return Frame(prelude.kind, header, payload)

    def wait(self, deadline: float) -> None:
        """Wait until a frame begins to arrive, or the peer has gone.

        Raises:
            WireTimeoutError: Neither happened before the deadline.
        """
        self._wait(select.POLLIN, deadline)

    def is_quiet(self) -> bool:
        """Return whether nothing has arrived, the end of the connection included."""
        ready = select.poll()
        ready.register(self._socket, select.POLLIN)
        return not ready.poll(0)

    def interrupt(self) -> None:
        """End the connection from any thread; whoever sends or receives gets an error at once."""
        with self._ending:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                # It has ended already.
                return

    def close(self) -> None:
        """Close the socket; only the thread that uses it may."""
        with self._ending:
            self._socket.close()

    def _check(self, prelude: Prelude) -> None:
        """Refuse a frame that is out of step or too large, before any of it is stored."""
        if prelude.sequence != self._received:
            raise WireDamagedError(f"frame {prelude.sequence} came instead of {self._received}")
        for name in ("header_bytes", "payload_bytes"):
            size, most = getattr(prelude, name), getattr(self.limits, name)
            if size > most:
                raise WireRefusedError(f"a frame of {size} {name} exceeds the limit of {most}")

    def _receive_payload(
        self, size: int, header: dict[str, Any], into: Destination | None, deadline: float
    ) -> memoryview:
        try:
            buffer = _buffer(size, header, into)
        except Exception:
            # Frames behind this one are still wanted.
            self._finish(size, memoryview(bytearray(min(size, CHUNK_BYTES))), deadline)
            raise
        self._finish(size, buffer, deadline)
        return buffer

    def _finish(self, size: int, buffer: memoryview, deadline: float) -> None:
        """Read a payload and check it; a buffer that is too small is used again and again."""
        filled, checksum = 0, self._receive_seed
        while filled < size:
            start = filled if len(buffer) == size else 0
            count = self._read(buffer[start : start + min(CHUNK_BYTES, size - filled)], deadline)
            checksum = zlib.crc32(buffer[start : start + count], checksum)
            filled += count
        trailer = bytearray(CHECKSUM.size)
        self._fill(memoryview(trailer), deadline)
        if CHECKSUM.unpack(trailer) != (checksum,):
            raise WireDamagedError("a frame's payload is damaged")
        self._received = (self._received + 1) % SEQUENCES
        self._receiving = False

    def _fill(self, view: memoryview, deadline: float) -> None:
        while view:
            view = view[self._read(view, deadline) :]

    def _read(self, view: memoryview, deadline: float) -> int:
        """Read at least one byte."""
        while True:
            try:
                count = self._socket.recv_into(view)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            except OSError as error:
                raise _closed(error) from None
            return self._progress(count, deadline)

    def _read_descriptors(self, start: bytearray, deadline: float, descriptors: list[int]) -> int:
        """Read the first bytes of a frame, and with them the files that came along."""
        flags = socket.MSG_CMSG_CLOEXEC
        while True:
            try:
                count, extra, _, _ = self._socket.recvmsg_into([start], _DESCRIPTOR_SPACE, flags)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            except OSError as error:
                raise _closed(error) from None
            for level, kind, data in extra:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    found = array.array("i")
                    found.frombytes(data[: len(data) - len(data) % found.itemsize])
                    descriptors.extend(found)
            return self._progress(count, deadline)

    def _progress(self, count: int, deadline: float) -> int:
        if not count:
            raise WireClosedError("the peer closed the connection")
        # A peer that trickles never lets the reader wait for long.
        if time.monotonic() > deadline:
            raise WireTimeoutError("the peer did not send a whole frame in time")
        return count

    def _write(self, buffers: list[Buffer], deadline: float, descriptor: int | None = None) -> None:
        extra = []
        if descriptor is not None:
            extra = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
        while buffers:
            try:
                sent = self._socket.sendmsg(buffers, extra, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
                continue
            except OSError as error:
                raise _closed(error) from None
            extra = []
            buffers = _rest(buffers, sent)
            if buffers and time.monotonic() > deadline:
                raise WireTimeoutError("the peer did not take a whole frame in time")

    def _wait(self, event: int, deadline: float) -> None:
        if self._socket.fileno() < 0:
            raise WireClosedError("this end has closed the connection")
        sending = event == select.POLLOUT
        ready = select.poll()
        # A peer that closes while its window is full never says that it takes no more.
        ready.register(self._socket, event | select.POLLRDHUP if sending else event)
        left = deadline - time.monotonic()
        found = ready.poll(left * 1000) if left > 0 else []
        if not found:
            doing = "take" if sending else "send"
            raise WireTimeoutError(f"the peer did not {doing} a whole frame in time")
        if sending and found[0][1] & select.POLLRDHUP:
            raise WireClosedError("the peer closed the connection")


def _buffer(size: int, header: dict[str, Any], into: Destination | None) -> memoryview:
    """Return the place for a payload.

    Raises:
        WireRefusedError: There is no memory for it.
        ValueError: The receiver named a buffer that cannot take it.
    """
    if size and into is not None:
        buffer = memoryview(into(size, header)).cast("B")
        if len(buffer) != size or buffer.readonly:
            raise ValueError(f"a payload of {size} bytes needs a writable buffer of that size")
        return buffer
    if size <= CHUNK_BYTES:
        return memoryview(bytearray(size))
    try:
        # Pages of a mapping exist only once they are written to: a length that is a lie costs none.
        return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except (MemoryError, OSError, OverflowError):
        raise WireRefusedError(f"there is no memory for a payload of {size} bytes") from None


def _views(payload: Sequence[Buffer]) -> Iterator[memoryview]:
    for buffer in payload:
        view = memoryview(buffer)
        # A view without elements may have a shape that cannot be cast.
        if view.nbytes:
            yield view.cast("B")


def _chunks(views: Sequence[memoryview]) -> Iterator[memoryview]:
    for view in views:
        for start in range(0, len(view), CHUNK_BYTES):
            yield view[start : start + CHUNK_BYTES]


def _rest(buffers: list[Buffer], sent: int) -> list[Buffer]:
    """Return what is left of buffers after so many bytes."""
    for i, buffer in enumerate(buffers):
        size = memoryview(buffer).nbytes
        if sent < size:
            return [memoryview(buffer)[sent:], *buffers[i + 1 :]]
        sent -= size
    return []


def _closed(error: OSError) -> WireClosedError | WireTimeoutError:
    reason = error.strerror or os.strerror(error.errno or 0)
    kind = WireTimeoutError if isinstance(error, TimeoutError) else WireClosedError
    return kind(f"the connection ended: {reason}")
