"""A server of the wire: a thread for each connection, over TCP and a Unix socket at once."""

from __future__ import annotations

import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from vllm_plugins.errors import PluginError
from vllm_plugins.wire.address import UNIX_PREFIX, Address, host_id
from vllm_plugins.wire.connection import Connection, peer_is_same_user
from vllm_plugins.wire.errors import WireClosedError, WireError, WireRefusedError
from vllm_plugins.wire.frame import HANDSHAKE_LIMITS, Limits, printable
from vllm_plugins.wire.handshake import Hello, greet_client
from vllm_plugins.wire.refusals import refuse
from vllm_plugins.wire.stream import FrameStream

logger = logging.getLogger("vllm.vllm_plugins.wire")

# What a stranger may keep a thread for.
HANDSHAKE_TIMEOUT_S = 5.0
_REFUSAL_TIMEOUT_S = 0.1
# Without free descriptors a pending connection stays pending, and accepting would spin.
_RETRY_S = 0.1


class Server:
    """Listens, and hands each client that knows the secret to a function in a thread of its own.

    Args:
        serve: Talks with one client until it returns or raises; usually a loop around
            `Connection.receive`, which ends with the `WireClosedError` of a client that has left.
            A `WireRefusedError` or `ValueError` is sent to the client as an error; any other
            exception is logged. Both close the connection.
        secret: The secret of both ends (`load_secret`).
        host: Address or name to bind TCP to. Behind a wildcard, others need an address with a
            host of theirs: `dataclasses.replace(server.address, host=...)`.
        port: TCP port; 0 takes a free one.
        unix: Whether to listen on an abstract Unix socket too.
        limits: What is accepted from clients.
        timeout_s: Time within which each frame must have been sent, or have arrived, whole.
        idle_timeout_s: Time that a client may be silent between two frames.
        max_connections: Further clients are refused.
        name: What the server is, for peers and logs: at most 64 letters, digits, blanks, dots,
            dashes and underscores.

    Attributes:
        address: Where it listens.

    Raises:
        PluginError: It cannot listen there.
        ValueError: The name is too long or has other characters.
    """

    def __init__(
        self,
        serve: Callable[[Connection], None],
        secret: bytes,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        unix: bool = True,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        timeout_s: float = 30.0,
        idle_timeout_s: float = 600.0,
        max_connections: int = 64,
        name: str = "server",
    ) -> None:
        self._serve, self._secret, self._limits = serve, secret, limits
        self._timeout_s, self._idle_timeout_s = timeout_s, idle_timeout_s
        self._max_connections, self._name = max_connections, name
        # Before anybody connects, rather than in front of the first client.
        Hello.new(name, limits)
        self._lock = threading.Lock()
        self._streams: dict[threading.Thread, FrameStream] = {}
        self._acceptor = threading.Thread(
            target=self._accept_all, name=f"{name}-accept", daemon=True
        )
        self._listeners = [_listen_tcp(host, port)]
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        unix_name = f"{UNIX_PREFIX}{secrets.token_hex(16)}" if unix else ""
        if unix:
            self._listeners.append(_listen_unix(unix_name))
        bound = self._listeners[0].getsockname()[1]
        self.address = Address(host, bound, unix_name, host_id() if unix else "")

    def start(self) -> None:
        """Begin to accept connections."""
        self._acceptor.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End all connections and wait for their threads; harmless where that has been done.

        Args:
            timeout_s: Longest time to wait. A function that serves and does not return when its
                connection has ended is then left alone, in a daemon thread.
        """
        deadline = time.monotonic() + timeout_s
        if self._wake < 0:
            return
        os.eventfd_write(self._wake, 1)
        if self._acceptor.is_alive():
            self._acceptor.join()
        for listener in self._listeners:
            listener.close()
        os.close(self._wake)
        self._wake = -1
        with self._lock:
            threads = list(self._streams)
            for stream in self._streams.values():
                stream.interrupt()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        late = sum(thread.is_alive() for thread in threads)
        if late:
            logger.warning(
                "%s: %d connections have not ended within %g s", self._name, late, timeout_s
            )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _accept_all(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            for listener in self._listeners:
                selector.register(listener, selectors.EVENT_READ, listener)
            while True:
                for key, _ in selector.select():
                    if key.data is None:
                        return
                    self._accept(key.data)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, source = listener.accept()
        except (BlockingIOError, ConnectionError):
            # The client has left again.
            return
        except OSError as error:
            logger.warning("%s: cannot accept connections: %s", self._name, error.strerror)
            time.sleep(_RETRY_S)
            return
        local = sock.family == socket.AF_UNIX
        where = "unix" if local else f"{source[0]}:{source[1]}"
        if local and not peer_is_same_user(sock):
            logger.warning("%s: a client of another user was refused", self._name)
            sock.close()
            return
        if not local:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._admit(FrameStream(sock, HANDSHAKE_LIMITS, where))

    def _admit(self, stream: FrameStream) -> None:
        thread = threading.Thread(
            target=self._attend, args=(stream,), name=f"{self._name}-{stream.peer}", daemon=True
        )
        with self._lock:
            full = len(self._streams) >= self._max_connections
            if not full:
                self._streams[thread] = stream
        if full:
            reason = f"{self._max_connections} connections are open, which is the limit"
            logger.warning("%s: %s was refused: %s", self._name, stream.peer, reason)
            refuse(stream, reason, time.monotonic() + _REFUSAL_TIMEOUT_S)
            stream.close()
            return
        try:
            thread.start()
        except RuntimeError as error:
            logger.warning("%s: %s was refused: %s", self._name, stream.peer, error)
            self._forget(thread)
            stream.close()

    def _forget(self, thread: threading.Thread) -> None:
        with self._lock:
            del self._streams[thread]

    def _attend(self, stream: FrameStream) -> None:
        try:
            connection = self._greet(stream)
            if connection is not None:
                self._talk(connection)
        finally:
            self._forget(threading.current_thread())
            stream.close()

    def _greet(self, stream: FrameStream) -> Connection | None:
        deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
        try:
            hello = greet_client(stream, self._secret, self._name, self._limits, deadline)
        except WireError as error:
            logger.warning("%s: %s was refused: %s", self._name, stream.peer, printable(error))
            return None
        stream.peer = f"{hello.role} at {stream.peer}"
        return Connection(stream, hello.limits, self._timeout_s, self._idle_timeout_s)

    def _talk(self, connection: Connection) -> None:
        try:
            self._serve(connection)
        except WireClosedError as error:
            logger.debug("%s: %s", self._name, error)
        except (WireRefusedError, ValueError) as error:
            reason = printable(error)
            logger.warning("%s: %s was refused: %s", self._name, connection.peer, reason)
            _tell(connection, error)
        except WireError as error:
            logger.warning("%s: %s", self._name, error)
        except Exception:
            logger.exception("%s: serving %s failed", self._name, connection.peer)


def _tell(connection: Connection, error: Exception) -> None:
    try:
        connection.send_error(error)
    except WireError as unsent:
        logger.debug("%s", unsent)


def _listen_tcp(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(where[:2], family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else ""
        raise PluginError(
            f"server on {host}:{port}",
            f"cannot listen there: {reason or error}",
            "choose an address of this host and a free port",
        ) from None
    listener.setblocking(False)
    return listener


def _listen_unix(name: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0{name}")
    listener.listen(128)
    listener.setblocking(False)
    return listener
