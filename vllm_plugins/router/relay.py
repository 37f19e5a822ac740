"""An answer of a decode instance on its way to the client.

A stream is passed on as it comes, every piece at once and unchanged. Only where the router has to
know or to change what it says (a first token that came from elsewhere, or token ids to resume
from) it is cut into events.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from vllm_plugins.router.client import Client, Patience
from vllm_plugins.router.continued import BrokenStreamError, Sent
from vllm_plugins.router.events import EventSplitter
from vllm_plugins.router.repeated import Kept, Repeat
from vllm_plugins.router.upstream import InstanceError
from vllm_plugins.routing import Ticket

if TYPE_CHECKING:
    import aiohttp

    from vllm_plugins.router.services import Services

# Chunks of a stream after which its growth is noted; one chunk is about one token.
NOTED_EVERY = 16
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens": ?(\d{1,9})')


class Relay:
    """Carries one instance's answer to the client.

    Args:
        services: The router's parts.
        client: Gets the answer.
        ticket: Of the request at the instance.
        answer: The instance's, with nothing of its body read.
    """

    def __init__(
        self, services: Services, client: Client, ticket: Ticket, answer: aiohttp.ClientResponse
    ) -> None:
        self._services = services
        self._client = client
        self._ticket = ticket
        self._answer = answer
        self._instance = ticket.instance

    async def whole(self) -> bytes:
        """Return the whole answer.

        Raises:
            InstanceError: It breaks off, or is of another kind.
        """
        self._require("application/json")
        body = await self._services.upstream.read(self._instance, self._answer)
        found = _COMPLETION_TOKENS.search(body)
        if found:
            self._services.desk.answer_tokens.note(int(found[1]))
        return body

    async def first(self) -> bytes:
        """Wait for the first piece of a stream, which shows that the instance has the prompt's KV.

        Raises:
            InstanceError: There is none, or it is an error.
        """
        self._require("text/event-stream")
        chunk = await self._services.upstream.chunk(self._instance, self._answer)
        if not chunk:
            raise InstanceError(self._instance, "ended a stream before it began")
        if chunk.startswith(b'data: {"error"'):
            reason = "began a stream with an error"
            raise InstanceError(self._instance, reason, sick=False, suspects_transfer=True)
        return chunk

    async def pass_on(self, first: bytes, kept: Kept) -> None:
        """Pass a stream on byte by byte.

        Args:
            first: Its first piece.
            kept: Gets what was sent, if it wants it.

        Raises:
            InstanceError: It breaks off, or ends without having said that it is complete.
        """

        async def take(chunk: bytes) -> None:
            """Pass a piece on and keep it."""
            await self._client.write(chunk)
            kept.add(chunk)

        count = await self._copy(first, take if kept.wanted else self._client.write)
        if not self._client.done:
            raise InstanceError(self._instance, "ended a stream before it was complete")
        self._services.desk.answer_tokens.note(count)

    async def follow(self, first: bytes, sent: Sent) -> None:
        """Pass a stream on in whole events, and note its tokens.

        Raises:
            InstanceError: As `pass_on`.
        """
        splitter = EventSplitter()

        async def take(chunk: bytes) -> None:
            """Pass on the events that are whole now."""
            for event in splitter.feed(chunk):
                sent.observe(event)
                await self._client.write(event)

        await self._copy_events(first, take)
        if not self._client.done:
            raise InstanceError(self._instance, "ended a stream before it was complete")
        self._services.desk.answer_tokens.note(len(sent.token_ids))

    async def continue_from(self, first: bytes, sent: Sent | Repeat) -> None:
        """Write another instance's events as the rest of the answer that was begun.

        Raises:
            InstanceError: As `pass_on`.
        """
        splitter = EventSplitter()
        if isinstance(sent, Repeat):
            sent.rewind()

        async def take(chunk: bytes) -> None:
            """Write the events that are whole now in the answer's form."""
            for event in splitter.feed(chunk):
                written = sent.part(event)
                if written:
                    await self._client.write(written)

        await self._copy_events(first, take)
        if not sent.finished:
            raise InstanceError(self._instance, "ended a stream before it was complete")
        await self._client.write(sent.end())
        self._services.desk.answer_tokens.note(len(sent.token_ids))

    def _require(self, content_type: str) -> None:
        """Refuse an answer of somebody who is no instance, or not any more."""
        if self._answer.content_type != content_type:
            raise InstanceError(self._instance, f"answers with {self._answer.content_type}")

    async def _copy_events(self, first: bytes, take: Callable[[bytes], Awaitable[None]]) -> None:
        try:
            await self._copy(first, take)
        except (BrokenStreamError, ValueError) as error:
            raise InstanceError(self._instance, str(error), sick=False) from None

    async def _copy(self, chunk: bytes, take: Callable[[bytes], Awaitable[None]]) -> int:
        """Hand every piece of the answer over as it arrives, and return how many there were."""
        count, stall_s = 0, self._services.settings.stall_timeout_s
        read, answer, instance = self._services.upstream.chunk, self._answer, self._instance
        try:
            async with Patience(stall_s) as patience:
                while chunk:
                    await take(chunk)
                    patience.moved()
                    count += 1
                    if not count % NOTED_EVERY:
                        self._ticket.progress(count)
                    chunk = await read(instance, answer)
        except TimeoutError:
            if self._client.stalls:
                self._client.cut()
                raise ConnectionResetError("the client takes nothing any more") from None
            raise InstanceError(instance, f"sent nothing for {stall_s:g} s") from None
        return count
