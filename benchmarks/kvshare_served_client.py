"""The client of the KVShare benchmark over HTTP: sends requests and notes what comes back when."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvshare_served_requests import Request

from vllm_plugins.bench.errors import ProcessFailedError
from vllm_plugins.bench.server import Server

if TYPE_CHECKING:
    import aiohttp

WATCH_S = 1.0
# A line of the stream; the first one repeats the prompt's token ids.
LINE_BYTES = 2**20


@dataclass
class Outcome:
    """What came back for a request.

    Attributes:
        sent_s: When it was sent; all times are on one clock.
        chunk_s: When each chunk with a token arrived.
        tokens: Token ids of the answer so far.
        finished: Whether the server said that the answer ends here.
        error: What went wrong; empty if nothing did.
    """

    sent_s: float
    chunk_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.chunk_s[0] - self.sent_s

    def take(self, message: Mapping[str, Any], now: float) -> None:
        """Add one message of the stream."""
        if "error" in message:
            self.error = str(message["error"])[:300]
            return
        for choice in message["choices"]:
            self.finished |= choice.get("finish_reason") is not None
            if choice.get("token_ids"):
                self.tokens += choice["token_ids"]
                self.chunk_s.append(now)


async def send_all(
    server: Server,
    requests: Sequence[Request],
    starts: Sequence[float],
    limit: int,
    patience: float,
) -> list[Outcome]:
    """Send requests, each at its time and never more than `limit` at once.

    Args:
        server: Server to load.
        requests: What is sent; who waits for a turn gets it in this order.
        starts: Seconds after the first one, shape (requests,).
        limit: Most requests under way.
        patience: Seconds until a request without an end counts as failed.

    Raises:
        ProcessFailedError: The server died, or answered nothing at all.
    """
    import aiohttp

    turn, begin = asyncio.Semaphore(limit), time.perf_counter()
    # A connection each: reuse would race with the server's closing of idle ones.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    no_limit = aiohttp.ClientTimeout(total=None)

    async def one(request: Request, start: float) -> Outcome:
        await asyncio.sleep(begin + start - time.perf_counter())
        async with turn:
            return await _ask(session, server, request, patience)

    async with aiohttp.ClientSession(
        connector=connector, timeout=no_limit, read_bufsize=LINE_BYTES
    ) as session:
        answers = asyncio.gather(*(one(r, s) for r, s in zip(requests, starts, strict=True)))
        watch = asyncio.create_task(_watch(server))
        both: set[asyncio.Future[Any]] = {answers, watch}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
            outcomes = await answers
        finally:
            watch.cancel()
            answers.cancel()
            await asyncio.gather(*both, return_exceptions=True)
    _check(server, outcomes)
    return outcomes


async def _watch(server: Server) -> None:
    while True:
        server.check()
        await asyncio.sleep(WATCH_S)


def _check(server: Server, outcomes: Sequence[Outcome]) -> None:
    server.check()
    if all(outcome.error for outcome in outcomes):
        what = f"every request to the server of '{server.label}' failed, the first with: "
        raise ProcessFailedError(what + outcomes[0].error, server.log)


async def _ask(
    session: aiohttp.ClientSession, server: Server, request: Request, patience: float
) -> Outcome:
    import aiohttp

    outcome = Outcome(time.perf_counter())
    stays = request.hang_up.seconds if request.hang_up else math.inf
    try:
        # Leaving the block in the middle of a stream closes the connection.
        async with asyncio.timeout(min(stays, patience)):
            await _read(session, server, request, outcome)
    except TimeoutError:
        if patience <= stays:
            outcome.error = f"no end after {patience:g} s (--request-timeout)"
    except aiohttp.ClientError as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


async def _read(
    session: aiohttp.ClientSession, server: Server, request: Request, outcome: Outcome
) -> None:
    enough = request.hang_up.tokens if request.hang_up else math.inf
    url = f"{server.url}/v1/completions"
    async with session.post(url, json=request.body(server.model)) as response:
        if response.status != 200:
            outcome.error = f"HTTP {response.status}: {(await response.text())[:300]}"
            return
        async for line in response.content:
            if line.startswith(b"data: {"):
                outcome.take(json.loads(line[6:]), time.perf_counter())
                if len(outcome.tokens) >= enough or outcome.error:
                    response.close()
                    return
    if not (outcome.finished and outcome.tokens):
        outcome.error = "the stream ended before the answer"
