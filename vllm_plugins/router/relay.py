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
from vllm_plugins.router.continued import BrokenPart, Sent
from vllm_plugins.router.events import EventSplitter
from vllm_plugins.router.upstream import InstanceFailure
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
        """Return the whole answer."""
        body = await self._services.upstream.read(self._instance, self._answer)
        found = _COMPLETION_TOKENS.search(body)
        if found:
            self._services.desk.lengths.note(int(found[1]))
        return body

    async def first(self) -> bytes:
        """Wait for the first piece of a stream, which shows that the instance has the prompt's KV.

        Raises:
            InstanceFailure: There is none, or it is an error.
        """
        chunk = await self._services.upstream.chunk(self._instance, self._answer)
        if not chunk:
            raise InstanceFailure(self._instance, "ended a stream before it began")
        if chunk.startswith(b'data: {"error"'):
            reason = "began a stream with an error"
            raise InstanceFailure(self._instance, reason, sick=False, suspects_transfer=True)
        return chunk

    async def pass_on(self, first: bytes) -> None:
        """Pass a stream on byte by byte.

        Raises:
            InstanceFailure: It breaks off, or ends without having said that it is complete.
        """
        count = await self._copy(first, self._client.write)
        if self._answer.content_type == "text/event-stream" and not self._client.done:
            raise InstanceFailure(self._instance, "ended a stream before it was complete")
        self._services.desk.lengths.note(count)

    async def follow(self, first: bytes, sent: Sent) -> None:
        """Pass a stream on in whole events, and note its tokens.

        Raises:
            InstanceFailure: As `pass_on`.
        """
        splitter = EventSplitter()

        async def take(chunk: bytes) -> None:
            for event in splitter.feed(chunk):
                sent.observe(event)
                await self._client.write(event)

        await self._copy_events(first, take)
        if not self._client.done:
            raise InstanceFailure(self._instance, "ended a stream before it was complete")
        self._services.desk.lengths.note(len(sent.token_ids))

    async def continue_from(self, first: bytes, sent: Sent) -> None:
        """Write a completion's events as the rest of the answer that was begun.

        Raises:
            InstanceFailure: As `pass_on`.
        """
        splitter = EventSplitter()

        async def take(chunk: bytes) -> None:
            for event in splitter.feed(chunk):
                written = sent.part(event)
                if written:
                    await self._client.write(written)

        await self._copy_events(first, take)
        if not sent.finished:
            raise InstanceFailure(self._instance, "ended a stream before it was complete")
        await self._client.write(sent.end())
        self._services.desk.lengths.note(len(sent.token_ids))

    async def _copy_events(self, first: bytes, take: Callable[[bytes], Awaitable[None]]) -> None:
        try:
            await self._copy(first, take)
        except (BrokenPart, ValueError) as error:
            raise InstanceFailure(self._instance, str(error), sick=False) from None

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
                raise ConnectionResetError("the client takes nothing any more") from None
            raise InstanceFailure(instance, f"sent nothing for {stall_s:g} s") from None
        return count
