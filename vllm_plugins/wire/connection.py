"""A connection between two ends that have proved to each other that they know the secret."""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from vllm_plugins.wire.address import Address, host_id
from vllm_plugins.wire.errors import (
    WireClosedError,
    WireDamagedError,
    WireError,
    WireRefusedError,
    WireTimeoutError,
)
from vllm_plugins.wire.frame import (
    DESCRIPTOR,
    ERROR,
    HANDSHAKE_LIMITS,
    RESERVED_KINDS,
    Frame,
    Limits,
    encode_header,
    printable,
)
from vllm_plugins.wire.handshake import greet_server
from vllm_plugins.wire.refusals import refusal, send
from vllm_plugins.wire.stream import Destination, FrameStream

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    Buffer = ReadableBuffer

logger = logging.getLogger("vllm.vllm_plugins.wire")

_CREDENTIALS = struct.Struct("3i")


class Connection:
    """Frames to and from one peer; a connection belongs to one thread at a time.

    After a `WireError` other than `WireRefusedError` the connection is closed.

    Args:
        stream: The socket's frames, after the handshake.
        peer_limits: What the peer accepts.
        timeout_s: Time within which each frame must have been sent, or have arrived, whole.
        idle_timeout_s: Time that `receive` waits for a frame to begin, before `timeout_s` counts;
            None counts all of it in `timeout_s`.

    Attributes:
        timeout_s: As above; may be set between frames.
        idle_timeout_s: As above; may be set between frames.
    """

    def __init__(
        self,
        stream: FrameStream,
        peer_limits: Limits,
        timeout_s: float,
        idle_timeout_s: float | None = None,
    ) -> None:
        self._stream = stream
        self._peer_limits = peer_limits
        self.timeout_s = timeout_s
        self.idle_timeout_s = idle_timeout_s

    @property
    def peer(self) -> str:
        """Description of the other end: its role and where it is."""
        return self._stream.peer

    @property
    def local(self) -> bool:
        """Whether the connection is a Unix socket, over which descriptors can be sent."""
        return self._stream.local

    @property
    def is_quiet(self) -> bool:
        """Whether nothing has arrived: between two requests, that the peer is still there."""
        return self._stream.is_quiet()

    def send(self, kind: int, header: Mapping[str, Any], *payload: Buffer) -> None:
        """Send a frame; the buffers of its payload are gathered without a copy.

        Args:
            kind: Below `RESERVED_KINDS`; what it means is the two ends' affair.
            header: Values that JSON has, NaN and infinities excepted.
            payload: C-contiguous buffers, sent one behind another.

        Raises:
            WireRefusedError: It exceeds what the peer accepts (nothing was sent), or the peer has
                closed the connection and said why.
            WireError: It was not sent.
        """
        if not 0 <= kind < RESERVED_KINDS:
            raise ValueError(f"{kind} is not a kind of frame for users")
        self._check_size(header, payload)
        with self._guarded():
            send(self._stream, kind, header, payload, self._deadline())

    def receive(self, into: Destination | None = None) -> Frame:
        """Receive a frame.

        Args:
            into: Called with the payload's length in bytes and the header where there is a payload,
                before any of it is read; gives a writable C-contiguous buffer of exactly that size,
                in which the payload then stands. Until `receive` returns, what stands there is not
                checked. What it raises is raised here, and the connection remains usable. Without
                it the payload gets a buffer of its own.

        Raises:
            WireRefusedError: The frame exceeds this end's limits, or the peer sent an error.
            WireError: No whole and correct frame arrived in time.
        """
        with self._guarded():
            self._await_frame()
            frame = self._stream.receive(self._deadline(), into)
            if frame.kind == ERROR:
                raise refusal(frame)
            if frame.kind >= RESERVED_KINDS:
                raise WireDamagedError(f"a frame of kind {frame.kind:#x} has no place here")
        return frame

    def request(
        self,
        kind: int,
        header: Mapping[str, Any],
        *payload: Buffer,
        into: Destination | None = None,
    ) -> Frame:
        """Send a frame and receive the answer to it.

        Raises:
            WireRefusedError: The peer answered with an error.
            WireError: There is no answer.
        """
        self.send(kind, header, *payload)
        return self.receive(into)

    def send_error(self, text: object) -> None:
        """Send an error, which the peer's `receive` raises as a `WireRefusedError`.

        Raises:
            WireError: It was not sent.
        """
        with self._guarded():
            self._stream.send(ERROR, {"error": printable(text)}, (), self._deadline())

    def send_descriptor(self, descriptor: int) -> None:
        """Share an open file with the peer, which must be in `receive_descriptor`.

        Raises:
            WireRefusedError: The connection is not local, or the peer has closed it and said why.
            WireError: It was not sent.
        """
        self._check_local()
        with self._guarded():
            send(self._stream, DESCRIPTOR, {}, (), self._deadline(), descriptor)

    def receive_descriptor(self) -> int:
        """Receive an open file, which the caller closes.

        Raises:
            WireRefusedError: The connection is not local, or the peer sent an error.
            WireError: No file arrived in time.
        """
        self._check_local()
        found: list[int] = []
        try:
            with self._guarded():
                self._await_frame()
                frame = self._stream.receive(self._deadline(), None, found)
                if frame.kind == ERROR:
                    raise refusal(frame)
                if frame.kind != DESCRIPTOR or len(found) != 1:
                    raise WireDamagedError("a frame came that does not share one file")
                return found.pop()
        finally:
            for descriptor in found:
                os.close(descriptor)

    def interrupt(self) -> None:
        """End the connection from any thread; the one that uses it gets a `WireClosedError`."""
        self._stream.interrupt()

    def close(self) -> None:
        """Close the connection; harmless where it is closed."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _deadline(self) -> float:
        return time.monotonic() + self.timeout_s

    def _await_frame(self) -> None:
        if self.idle_timeout_s is not None:
            self._stream.wait(time.monotonic() + self.idle_timeout_s)

    def _check_size(self, header: Mapping[str, Any], payload: tuple[Buffer, ...]) -> None:
        limits = self._peer_limits
        length = sum(memoryview(buffer).nbytes for buffer in payload)
        header_length = len(encode_header(header))
        if length > limits.payload_bytes or header_length > limits.header_bytes:
            raise WireRefusedError(
                f"{self.peer}: accepts headers of {limits.header_bytes} and payloads of "
                f"{limits.payload_bytes} bytes, not of {header_length} and {length}"
            )

    def _check_local(self) -> None:
        if not self.local:
            raise WireRefusedError(f"{self.peer}: descriptors travel over Unix sockets only")

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Name the peer in errors, and close the connection after those that end it."""
        try:
            yield
        except WireError as error:
            error.peer = error.peer or self.peer
            if not isinstance(error, WireRefusedError):
                self.close()
            raise


def connect(
    address: Address,
    secret: bytes,
    *,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    connect_timeout_s: float = 5.0,
    timeout_s: float = 30.0,
    role: str = "client",
) -> Connection:
    """Connect to a server: by its Unix socket where that can be reached, else by TCP.

    Args:
        address: Where it listens.
        secret: The secret of both ends (`load_secret`).
        limits: What this end accepts.
        connect_timeout_s: Time for connecting and the handshake. Looking up a host name is up to
            the system's resolver and is not bounded by it; give an IP address to be sure.
        timeout_s: Time within which each frame must have been sent, or have arrived, whole.
        role: What this end is, for the server's log: at most 64 letters, digits, blanks, dots,
            dashes and underscores.

    Raises:
        WireClosedError: It cannot be reached.
        WireTimeoutError: It did not answer in time.
        WireRefusedError: Version or secret differ, or it has no place for another connection.
        WireDamagedError: What listens there does not speak this wire.
    """
    deadline = time.monotonic() + connect_timeout_s
    sock = _connect_unix(address) or _connect_tcp(address, deadline)
    where = f"unix:{address.unix}" if sock.family == socket.AF_UNIX else str(address)
    stream = FrameStream(sock, HANDSHAKE_LIMITS, where)
    try:
        hello = greet_server(stream, secret, role, limits, deadline)
    except WireError as error:
        error.peer = error.peer or where
        stream.close()
        raise
    stream.peer = f"{hello.role} at {where}"
    return Connection(stream, hello.limits, timeout_s)


def peer_is_same_user(sock: socket.socket) -> bool:
    """Return whether a Unix socket's other end belongs to this process's user."""
    size = _CREDENTIALS.size
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return int(_CREDENTIALS.unpack(data)[1]) == os.geteuid()


def _connect_unix(address: Address) -> socket.socket | None:
    """Connect to the server's Unix socket; None where only TCP can reach it."""
    if not address.unix or not address.host_id or address.host_id != host_id():
        return None
    sock = None
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Never waits: with its queue full, it fails.
        sock.setblocking(False)
        sock.connect(f"\0{address.unix}")
        if peer_is_same_user(sock):
            return sock
        reason = "it belongs to another user"
    except OSError as error:
        reason = str(error.strerror)
    if sock is not None:
        sock.close()
    logger.debug("no Unix socket to %s: %s", address, reason)
    return None


def _connect_tcp(address: Address, deadline: float) -> socket.socket:
    try:
        sock = _reach(address, deadline)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except UnicodeError as error:
        raise WireClosedError(f"{address}: is no host name: {error}") from None
    except OSError as error:
        timed_out = isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT
        kind = WireTimeoutError if timed_out else WireClosedError
        raise kind(f"{address}: cannot be reached: {error.strerror or error}") from None
    return sock


def _reach(address: Address, deadline: float) -> socket.socket:
    """Connect to the first of a host's addresses that answers, in an equal share of the time.

    Raises:
        OSError: None does.
    """
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    for left, (*_, where) in zip(range(len(found), 0, -1), found, strict=True):
        seconds = max(deadline - time.monotonic(), 0.001) / left
        try:
            return socket.create_connection((str(where[0]), where[1]), timeout=seconds)
        except OSError:
            if left == 1:
                raise
    raise AssertionError("a host that is found has an address")
