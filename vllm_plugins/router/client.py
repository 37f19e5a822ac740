"""The client's side of a request: its answer as far as it is sent, and a watch over stalls."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from aiohttp import web

from vllm_plugins.router.answers import RefusedError, error_body, error_event
from vllm_plugins.router.events import Tail

# A stalled stream is noticed within this share of the time too early at most.
RENEWED = 0.25
# For a client to take the error that ends its stream.
LAST_WORDS_S = 5.0


class Patience:
    """A time-out that starts anew whenever something moves, at the cost of reading a clock.

    Args:
        stall_s: Seconds without movement after which the block is left with ``TimeoutError``.
    """

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._timeout = asyncio.timeout(stall_s)
        self._now = asyncio.get_running_loop().time
        self._renew_at = self._now() + stall_s * RENEWED

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self._timeout.__aexit__(kind, error, at)

    def moved(self) -> None:
        """Note that something moved. A timer is made only now and then, not for each token."""
        now = self._now()
        if now >= self._renew_at:
            self._timeout.reschedule(now + self._stall_s)
            self._renew_at = now + self._stall_s * RENEWED


class Client:
    """Where an answer goes.

    Args:
        request: The client's.
        request_id: Returned in a header.
    """

    def __init__(self, request: web.Request, request_id: str) -> None:
        self._request = request
        self._request_id = request_id
        self._response: web.StreamResponse | None = None
        self._tail = Tail()
        self.stalls = False
        """Whether the client is being waited for, to take what was sent."""

    @property
    def begun(self) -> bool:
        """Whether the answer's status and headers have been sent."""
        return self._response is not None

    async def begin(self, headers: Mapping[str, str]) -> None:
        """Send status 200 and headers of a stream."""
        self._response = web.StreamResponse(headers=self._headers(headers))
        await self._response.prepare(self._request)

    async def write(self, chunk: bytes) -> None:
        """Send a part of a stream at once.

        Raises:
            ConnectionResetError: The client has gone.
        """
        assert self._response is not None
        self._tail.feed(chunk)
        self.stalls = True
        await self._response.write(chunk)
        self.stalls = False

    @property
    def done(self) -> bool:
        """Whether the client has been told that the stream is complete."""
        return self._tail.done

    async def end(self) -> web.StreamResponse:
        """End a stream."""
        assert self._response is not None
        await self._response.write_eof()
        return self._response

    def whole(self, status: int, headers: Mapping[str, str], body: bytes) -> web.Response:
        """Return an answer that is sent in one piece."""
        return web.Response(status=status, headers=self._headers(headers), body=body)

    async def refuse(self, refusal: RefusedError) -> web.StreamResponse:
        """Return an error as the answer, or end a stream that has begun with one."""
        if self._response is None:
            headers = {"Content-Type": "application/json", **refusal.headers}
            return self.whole(refusal.status, headers, error_body(refusal.status, refusal.message))
        # A piece of an event must not swallow the error that follows it.
        end = b"" if self._tail.at_boundary else b"\n\n"
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                await self._response.write(end + error_event(refusal.status, refusal.message))
                return await self.end()
        except TimeoutError:
            self.cut()
            raise ConnectionResetError("the client takes nothing any more") from None

    def gone(self) -> web.StreamResponse:
        """Return what the server gets as the answer for a client that has left."""
        return self._response or web.Response()

    def cut(self) -> None:
        """Break the connection off, with what the client has not taken."""
        if self._request.transport is not None:
            self._request.transport.abort()

    def _headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        return {**headers, "X-Request-Id": self._request_id}
