"""The router's open port: how many clients may be connected, and how slowly they may speak."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from vllm_plugins.router.upstream import MAX_HEADER_BYTES

# Time for a client to send a request's headers, and between two of its requests.
HEADERS_TIMEOUT_S, KEEP_ALIVE_S = 10.0, 75.0
MAX_HEADERS = 128


class Connection(web.RequestHandler):
    """A client's connection, which is cut when it keeps the router waiting for too long.

    That is when the headers of a request take too long, or when nothing is taken of an answer.

    Args:
        manager: Of the server.
        stall_s: Seconds without movement after which an answer is cut off.
        options: As of the base class.
    """

    __slots__ = ("_busy", "_late", "_stall_s", "_untaken")

    def __init__(self, manager: web.Server, *, stall_s: float, **options: Any) -> None:
        super().__init__(manager, **options)
        self._stall_s = stall_s
        self._untaken: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._busy = False
        self._late: asyncio.TimerHandle | None = None
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Begin to wait for a further request with its first byte."""
        super().data_received(data)
        if not self._busy and self._late is None:
            self._expect()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Wait for nothing any more."""
        self._arrived()
        self._taken()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Begin to wait for the client to take what it is sent."""
        super().pause_writing()
        self._expect_taken()

    def resume_writing(self) -> None:
        """Wait for that no longer."""
        super().resume_writing()
        self._taken()

    def begin(self) -> None:
        """Note that a request's headers have arrived."""
        self._busy = True
        self._arrived()

    def end(self) -> None:
        """Note that a request is answered."""
        self._busy = False

    def _expect(self) -> None:
        loop = asyncio.get_running_loop()
        self._late = loop.call_later(HEADERS_TIMEOUT_S, self.force_close)

    def _arrived(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _expect_taken(self) -> None:
        assert self.transport is not None
        unsent = self.transport.get_write_buffer_size()
        loop = asyncio.get_running_loop()
        self._untaken = loop.call_later(self._stall_s, self._check_taken, unsent)

    def _check_taken(self, unsent: int) -> None:
        assert self.transport is not None
        if self.transport.get_write_buffer_size() < unsent:
            self._expect_taken()
        else:
            self.transport.abort()

    def _taken(self) -> None:
        if self._untaken is not None:
            self._untaken.cancel()
            self._untaken = None


class _Refused(asyncio.Protocol):
    """A connection beyond the limit."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


@web.middleware
async def headers_in_time(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Tell a request's connection that its headers have arrived."""
    connection = request.protocol
    assert isinstance(connection, Connection)
    connection.begin()
    try:
        return await handler(request)
    finally:
        connection.end()


async def listen(
    runner: web.AppRunner, host: str, port: int, max_connections: int, stall_timeout_s: float
) -> asyncio.Server:
    """Open the port.

    Args:
        runner: Set up; answers requests.
        host: To bind.
        port: To bind; 0 takes any.
        max_connections: Further ones are closed at once.
        stall_timeout_s: Longest time that a client may take nothing of an answer, in seconds.

    Raises:
        OSError: The port cannot be had.
    """
    manager, loop = runner.server, asyncio.get_running_loop()
    assert manager is not None
    options: dict[str, Any] = {
        "stall_s": stall_timeout_s,
        "access_log": None,
        "keepalive_timeout": KEEP_ALIVE_S,
        "max_line_size": MAX_HEADER_BYTES,
        "max_field_size": MAX_HEADER_BYTES,
        "max_headers": MAX_HEADERS,
    }

    def accept() -> asyncio.Protocol:
        if len(manager.connections) >= max_connections:
            return _Refused()
        return Connection(manager, loop=loop, **options)

    return await loop.create_server(accept, host, port, backlog=1024)
