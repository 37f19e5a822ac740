"""HTTP to the instances: requests, and what counts as an instance's failure."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from vllm_plugins.router.bodies import needs_others
from vllm_plugins.routing import Instance

if TYPE_CHECKING:
    import aiohttp

# Below the 5 s after which vLLM's server closes an idle connection, so that no request is sent on
# one that is being closed.
KEEP_ALIVE_S = 3.0
# A host that has gone, or a network between, is as silent as an instance that computes. After so
# long a silence it is asked for a sign of life, again and again, and after so long it has gone.
QUIET_S, GONE_S = 15, 30
_ASKED_EVERY_S = 5
# Status by which an instance says that another one may do better.
BUSY = frozenset({408, 425, 429})
# An answer that is taken in whole: far above any of vLLM's, logprobs of long prompts included.
MAX_ANSWER_BYTES = 256 << 20
MAX_HEADER_BYTES = 32 << 10
HOP_BY_HOP = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
        "te", "trailer", "transfer-encoding", "upgrade",
    }
)  # fmt: skip
_OWN_REQUEST_HEADERS = HOP_BY_HOP | {
    "accept-encoding", "content-encoding", "content-length", "content-type", "expect", "host",
    "x-request-id",
}  # fmt: skip
_OWN_ANSWER_HEADERS = HOP_BY_HOP | {"content-length", "date", "server", "x-request-id"}


class InstanceError(Exception):
    """An instance did not serve a request, and another one may.

    Args:
        instance: Which.
        reason: What happened, in a few words.
        sick: It counts against the instance's health; a busy one is not sick.
        suspects_transfer: The hand-over may be the cause, so that it should not be tried again.
            With a 500 the instance is not called sick then: the one it fetches from may be.
    """

    def __init__(
        self, instance: Instance, reason: str, sick: bool = True, suspects_transfer: bool = False
    ) -> None:
        super().__init__(f"{instance.id}: {reason}")
        self.instance = instance
        self.reason = reason
        self.sick = sick
        self.suspects_transfer = suspects_transfer


class RejectedError(Exception):
    """An instance refused the request itself (4xx), as every other one would.

    Args:
        status: HTTP status.
        headers: Of the answer, without those of the connection.
        body: Goes to the client unchanged.
    """

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(f"rejected with {status}")
        self.status = status
        self.headers = headers
        self.body = body


def request_headers(headers: Mapping[str, str], request_id: str) -> dict[str, str]:
    """Return a client's headers as an instance gets them: with its API key, for this hop."""
    # The header may come several times, of which a look-up finds one.
    lists = [value for name, value in headers.items() if name.lower() == "connection"]
    named = ",".join(lists).lower().replace(" ", "").split(",")
    kept = {
        name: value
        for name, value in headers.items()
        if name.lower() not in _OWN_REQUEST_HEADERS and name.lower() not in named
    }
    kept["Content-Type"] = "application/json"
    # A compressed stream would be held back until a block of it is full.
    kept["Accept-Encoding"] = "identity"
    kept["X-Request-Id"] = request_id
    return kept


def answer_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return an instance's headers as the client gets them."""
    return {
        name: value for name, value in headers.items() if name.lower() not in _OWN_ANSWER_HEADERS
    }


class Upstream:
    """The connections to all instances.

    Args:
        connect_timeout_s: Longest time to look an address up and connect, in seconds.
    """

    def __init__(self, connect_timeout_s: float) -> None:
        import aiohttp

        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=KEEP_ALIVE_S, socket_factory=_watched_socket
            ),
            timeout=aiohttp.ClientTimeout(total=None, connect=connect_timeout_s),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            skip_auto_headers=("User-Agent", "Accept"),
        )
        self._faults = (aiohttp.ClientError, OSError, TimeoutError, asyncio.IncompleteReadError)

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    @asynccontextmanager
    async def post(
        self, instance: Instance, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request; leaving the context before the answer has ended breaks it off.

        Yields:
            An answer with status 2xx, its body not read yet.

        Raises:
            InstanceError: There is none, or it says that the instance failed or is busy.
            RejectedError: The instance refused the request.
        """
        data = json.dumps(body, separators=(",", ":")).encode()
        try:
            answer = await self._session.post(
                instance.url + path, data=data, headers=headers, allow_redirects=False
            )
        except self._faults as error:
            raise InstanceError(instance, _words(error)) from None
        try:
            if answer.status != 200:
                await self._raise_for(instance, answer, needs_others(body))
            yield answer
        finally:
            # Of an answer that was read to its end the connection is kept already.
            answer.close()

    async def read(self, instance: Instance, answer: aiohttp.ClientResponse) -> bytes:
        """Return an answer's whole body.

        Raises:
            InstanceError: It breaks off, or is too long.
        """
        parts, size = [], 0
        while chunk := await self.chunk(instance, answer):
            parts.append(chunk)
            size += len(chunk)
            if size > MAX_ANSWER_BYTES:
                raise InstanceError(instance, f"answer of over {MAX_ANSWER_BYTES} bytes")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def chunk(self, instance: Instance, answer: aiohttp.ClientResponse) -> bytes:
        """Return what has arrived of an answer, at least a byte; nothing at its end.

        Raises:
            InstanceError: The answer breaks off.
        """
        try:
            return await answer.content.readany()
        except self._faults as error:
            raise InstanceError(instance, _words(error)) from None

    async def post_json(
        self, instance: Instance, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> dict[str, Any]:
        """Send a request and return its answer, a JSON object.

        Raises:
            InstanceError: There is none.
            RejectedError: The instance refused the request.
        """
        async with self.post(instance, path, body, headers) as answer:
            return _json_object(instance, await self.read(instance, answer))

    async def get(
        self, instance: Instance, path: str, timeout_s: float, headers: Mapping[str, str] = {}
    ) -> bytes:
        """Return what an instance answers on one of its small routes.

        Raises:
            InstanceError: It does not answer in time, or with another status than 200.
        """
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.get(
                    instance.url + path, headers=headers, allow_redirects=False
                ) as answer,
            ):
                body = await self.read(instance, answer)
        except self._faults as error:
            raise InstanceError(instance, _words(error)) from None
        if answer.status != 200:
            raise InstanceError(instance, f"{path} answers {answer.status}")
        return body

    async def _raise_for(
        self, instance: Instance, answer: aiohttp.ClientResponse, fetches: bool
    ) -> None:
        if answer.status in BUSY or answer.status == 503:
            raise InstanceError(instance, f"answers {answer.status}", sick=False)
        if not 400 <= answer.status < 500:
            # An instance that could not get a prompt's KV or an image answers with 500 as well.
            # Whether it is well itself is for probes to say.
            sick = not fetches or answer.status != 500
            raise InstanceError(instance, f"answers {answer.status}", sick, fetches)
        body = await self.read(instance, answer)
        raise RejectedError(answer.status, answer_headers(answer.headers), body)


def _watched_socket(where: tuple[Any, ...]) -> socket.socket:
    """Return a socket that ends with an error when the other host is there no longer.

    Args:
        where: Family, type and protocol first, as `socket.getaddrinfo` returns them.
    """
    sock = socket.socket(*where[:3])
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, QUIET_S),
        (socket.TCP_KEEPINTVL, _ASKED_EVERY_S),
        (socket.TCP_KEEPCNT, (GONE_S - QUIET_S) // _ASKED_EVERY_S),
        # Nothing is asked while something sent is on its way; this holds for that too.
        (socket.TCP_USER_TIMEOUT, 1000 * GONE_S),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    return sock


def _json_object(instance: Instance, body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InstanceError(instance, "answers with no JSON object")
    return value


def _words(error: BaseException) -> str:
    """Return an error in one short line."""
    return " ".join((str(error) or type(error).__name__).split())[:200]
