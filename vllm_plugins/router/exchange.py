"""The life of one request: prefill, hand-over, decode, and what happens when an instance fails.

```
client ──► place at P ──► P computes the prompt, holds its KV ──► place at D ──► D pulls, answers
             │  P fails: another P                                  │  D fails before the first
             │                                                      │  byte: same KV or new prefill
             └─ the client leaves: all is broken off, the KV that P holds is released
```
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_plugins.router.answers import RefusedError
from vllm_plugins.router.bodies import COMPLETIONS, Call, decode_body, prefill_body, prompt_tokens
from vllm_plugins.router.client import Client
from vllm_plugins.router.continued import Sent, begun_by, first_token
from vllm_plugins.router.encoding import Encoding
from vllm_plugins.router.first_token import why_alone, why_not_early
from vllm_plugins.router.held import PD_REFERENCE, Held
from vllm_plugins.router.media import media_of, warming_body
from vllm_plugins.router.relay import Relay
from vllm_plugins.router.repeated import Kept, Repeat
from vllm_plugins.router.upstream import InstanceError, answer_headers, request_headers
from vllm_plugins.routing import Role, Ticket, Work

if TYPE_CHECKING:
    import aiohttp
    from aiohttp import web

    from vllm_plugins.router.services import Services

logger = logging.getLogger(__name__)

EVENT_STREAM = {"Content-Type": "text/event-stream; charset=utf-8"}


class Exchange:
    """One request of a client.

    Args:
        services: The router's parts.
        call: The request.
        client: Gets the answer.
    """

    def __init__(self, services: Services, call: Call, client: Client) -> None:
        self._services = services
        self._call = call
        self._client = client
        self._headers = request_headers(call.headers, call.request_id)
        self._held: Held | None = None
        self._sent: Sent | Repeat | None = None
        self._kept = Kept(call)
        self._tried: set[str] = set()
        self._alone = services.colocated or self._goes_alone()
        self._early = not self._alone and self._wants_early()
        self._elsewhere_s = 0.0
        self._media = media_of(call) if services.settings.encode else []
        self._encoded = not self._media
        self._asked = call
        self._reserved: Ticket | None = None

    async def run(self) -> web.StreamResponse:
        """Serve the request.

        Returns:
            The answer, which is on its way already if it is a stream.

        Raises:
            RefusedError: The router cannot serve it.
            RejectedError: An instance refuses it.
            ConnectionResetError: The client has gone.
        """
        try:
            async with asyncio.timeout_at(self._call.deadline):
                return await self._answered()
        except TimeoutError:
            seconds = self._services.settings.request_timeout_s
            raise RefusedError(504, f"no complete answer within {seconds:g} s", "timeout") from None
        finally:
            self._release()
            if self._reserved is not None:
                self._services.desk.close(self._reserved)

    def _goes_alone(self) -> bool:
        reason = why_alone(self._call.body)
        if reason:
            self._services.metrics.alone(reason)
        return reason is not None

    def _wants_early(self) -> bool:
        if self._services.settings.first_token != "prefill":
            return False
        reason = why_not_early(self._call)
        if reason:
            self._services.metrics.late(reason)
        return reason is None

    async def _answered(self) -> web.StreamResponse:
        failures = 0
        while True:
            try:
                return await self._attempt()
            except InstanceError as failure:
                failures += 1
                self._note(failure)
                if failures > self._services.settings.retries or not self._can_go_on():
                    raise self._refusal(failure) from None
                self._tried.add(failure.instance.id)
                if failure.suspects_transfer or self._asks_anew():
                    self._release()
                    # What was encoded may be lost as well as the KV.
                    self._encoded = not self._media
                self._services.metrics.retried(Role.DECODE)
                if self._client.begun:
                    self._services.metrics.resumed()

    def _can_go_on(self) -> bool:
        if self._client.begun and self._sent is None:
            self._sent = self._kept.repeat()
        return self._sent is not None or not self._client.begun

    def _asks_anew(self) -> bool:
        return isinstance(self._sent, Repeat) and not self._sent.finished

    async def _attempt(self) -> web.StreamResponse:
        """Ask a decode instance, after a prefill unless one still holds the prompt."""
        if not self._encoded:
            await self._encode(self._services.settings.overlap)
        if not self._alone and (not self._client.begun or self._asks_anew()):
            await self._prefill()
        if self._sent is not None and self._sent.finished:
            await self._client.write(self._sent.end())
            return await self._client.end()
        ticket = await self._place_decode()
        with self._services.desk.held(ticket):
            return await self._decode(ticket)

    async def _encode(self, overlap: bool) -> None:
        """Have the media encoded; with overlap, prefill begins meanwhile where that can be."""
        encoding = Encoding(self._services, self._asked, self._media, self._headers)
        try:
            with self._elsewhere():
                await encoding.place()
            awaiting = encoding.awaiting_body() if overlap and not self._alone else None
            if awaiting is not None:
                await self._encode_and_prefill(encoding, awaiting)
            else:
                await self._encode_first(encoding, overlap)
        except InstanceError as failure:
            raise self._refusal(failure) from None
        finally:
            encoding.close()
        self._encoded = True

    async def _encode_first(self, encoding: Encoding, overlap: bool) -> None:
        """Wait for the media; the text before the first one may be computed meanwhile."""
        warming = await self._warm(encoding) if overlap else None
        try:
            with self._elsewhere():
                self._call = replace(self._asked, body=await encoding.run())
                if warming is not None:
                    # What is not in the prefix cache yet would be computed twice.
                    await warming
        finally:
            if warming is not None:
                warming.cancel()

    async def _warm(self, encoding: Encoding) -> asyncio.Task[None] | None:
        """Begin to prefill the text before the first medium where that pays."""
        beginning = None
        if self._services.colocated or not self._alone:
            beginning = warming_body(self._asked, self._media[0])
        if beginning is None:
            return None
        self._reserved = await self._place_prefill(set())
        return asyncio.create_task(encoding.warm(self._reserved.instance, beginning))

    async def _encode_and_prefill(self, encoding: Encoding, body: Mapping[str, Any]) -> None:
        """Ask a prefill instance at once; it waits for each image where the prompt has it.

        If an encode instance fails, the prefill instance would wait in vain: it is asked again when
        everything is encoded.
        """
        ticket = await self._place_prefill(set())
        with self._services.desk.held(ticket), self._elsewhere():
            encode = asyncio.create_task(encoding.run())
            prefill = asyncio.create_task(self._ask_one(ticket, replace(self._asked, body=body)))
            try:
                await asyncio.wait((encode, prefill), return_when=asyncio.FIRST_COMPLETED)
                if encode.done() and not encode.exception() and encoding.undisturbed:
                    await asyncio.wait((prefill,))
                answer = self._answer_of(prefill)
                if answer is not None:
                    await self._hold(answer)
                self._call = replace(self._asked, body=await encode)
            finally:
                encode.cancel()
                prefill.cancel()

    def _answer_of(self, prefill: asyncio.Task[dict[str, Any]]) -> dict[str, Any] | None:
        """Return a prefill instance's answer; None where it is not there and will not be."""
        if not prefill.done():
            return None
        failure = prefill.exception()
        if not isinstance(failure, InstanceError):
            return prefill.result()
        self._note(failure)
        self._services.metrics.retried(Role.PREFILL)
        return None

    async def _prefill(self) -> None:
        held = self._held
        if held is not None and held.until > self._now():
            return
        self._release()
        await self._hold(await self._ask_prefill())

    async def _hold(self, answer: Mapping[str, Any]) -> None:
        """Note what a prefill instance holds, and send its token if that is wanted."""
        transfer = answer.get("kv_transfer_params")
        if not isinstance(transfer, dict):
            transfer = None
            self._services.metrics.alone("not_held")
        usage = answer.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if not isinstance(counted, int) or counted < 0:
            counted = prompt_tokens(self._call.body)
        self._held = Held(transfer, counted, self._now() + self._services.settings.lease_s)
        if transfer is not None:
            self._services.held.add(self._held)
        if self._early:
            await self._send_first(answer)

    async def _ask_prefill(self) -> dict[str, Any]:
        """Return a prefill instance's answer, after as many others as may be tried."""
        failures, tried = 0, set[str]()
        while True:
            ticket, self._reserved = self._reserved, None
            if ticket is None:
                ticket = await self._place_prefill(tried)
            try:
                with self._services.desk.held(ticket), self._elsewhere():
                    return await self._ask_one(ticket, self._call)
            except InstanceError as failure:
                failures += 1
                tried.add(failure.instance.id)
                self._note(failure)
                if failures > self._services.settings.retries:
                    raise self._refusal(failure) from None
                self._services.metrics.retried(Role.PREFILL)
                if self._media and failure.suspects_transfer:
                    await self._encode(overlap=False)

    async def _ask_one(
        self, ticket: Ticket, call: Call, streamed: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return a prefill instance's answer; its layers may be read under a name meanwhile."""
        body, releaser = prefill_body(call, self._early), self._services.releaser
        named = streamed or releaser.name(ticket.instance.id)
        if named is not None:
            chosen = {"transfer_id": named[PD_REFERENCE]["transfer_id"]}
            if streamed is not None:
                chosen["stream"] = True
            body["kv_transfer_params"][PD_REFERENCE] = chosen
        if self._early:
            # Its token goes to the client, so it must be that of the whole prompt.
            body["kv_transfer_params"].setdefault(PD_REFERENCE, {})["continued"] = True
        try:
            answer = await self._services.upstream.post_json(
                ticket.instance, call.path, body, self._headers
            )
        except (asyncio.CancelledError, InstanceError):
            # The prompt may be held, or soon be, although nobody hears of it any more.
            releaser.start(named)
            raise
        releaser.learn(ticket.instance, answer.get("kv_transfer_params"))
        return answer

    async def _place_prefill(self, tried: set[str]) -> Ticket:
        work = Work(prompt_tokens=prompt_tokens(self._asked.body))
        with self._elsewhere():
            return await self._services.desk.place(Role.PREFILL, work, tried)

    async def _send_first(self, answer: Mapping[str, Any]) -> None:
        """Send the prefill instance's token, if it can be."""
        found = first_token(self._call, answer)
        if isinstance(found, str):
            self._early = False
            self._services.metrics.late(found)
            return
        sent, token = found
        await self._begin(EVENT_STREAM)
        self._sent = sent
        await self._client.write(sent.first(token))

    async def _place_decode(self) -> Ticket:
        reserved, self._reserved = self._reserved, None
        if reserved is not None:
            return reserved
        role = Role.PREFILL if self._services.colocated else Role.DECODE
        known = self._held.prompt_tokens if self._held else prompt_tokens(self._call.body)
        expected = self._services.desk.expected_answer(self._call.max_tokens)
        work = Work(prompt_tokens=known, output_tokens=expected)
        with self._elsewhere():
            return await self._services.desk.place(role, work, self._tried)

    async def _decode(
        self, ticket: Ticket, transfer: Mapping[str, Any] | None = None
    ) -> web.StreamResponse:
        if transfer is None and self._held is not None:
            transfer = self._held.transfer
        path, body = self._call.path, decode_body(self._call, transfer)
        if isinstance(self._sent, Sent):
            path, body = COMPLETIONS, self._sent.continued_body(transfer)
        asked_s = self._now()
        async with self._services.upstream.post(
            ticket.instance, path, body, self._headers
        ) as answer:
            relay = Relay(self._services, self._client, ticket, answer)
            if not self._call.streams:
                whole = await relay.whole()
                self._elsewhere_s += self._now() - asked_s
                self._taken(ticket)
                self._first_byte()
                return self._client.whole(answer.status, answer_headers(answer.headers), whole)
            first = await relay.first()
            self._elsewhere_s += self._now() - asked_s
            self._taken(ticket)
            await self._stream(relay, answer, first)
        return await self._client.end()

    async def _stream(self, relay: Relay, answer: aiohttp.ClientResponse, first: bytes) -> None:
        if self._sent is not None:
            await relay.continue_from(first, self._sent)
            return
        await self._begin(answer_headers(answer.headers))
        known = self._call.body.get("return_token_ids") and why_not_early(self._call) is None
        sent = self._sent = begun_by(self._call, first) if known else None
        if sent is None:
            await relay.pass_on(first, self._kept)
        else:
            await relay.follow(first, sent)

    async def _begin(self, headers: Mapping[str, str]) -> None:
        self._first_byte()
        await self._client.begin(headers)

    def _first_byte(self) -> None:
        passed = self._now() - self._call.arrival
        self._services.metrics.first_byte(passed, passed - self._elsewhere_s)

    def _taken(self, ticket: Ticket) -> None:
        """Note that the decode instance has what the prefill instance held."""
        self._no_longer_held()
        if ticket.role is Role.PREFILL:
            ticket.progress(ticket.work.prompt_tokens)

    def _release(self) -> None:
        held = self._no_longer_held()
        if held is not None:
            self._services.releaser.start(held.transfer)

    def _no_longer_held(self) -> Held | None:
        held, self._held = self._held, None
        if held is not None:
            self._services.held.discard(held)
        return held

    def _note(self, failure: InstanceError) -> None:
        logger.warning("request %s: %s", self._call.request_id, failure)
        if failure.sick:
            self._services.desk.failed(failure.instance)

    def _refusal(self, failure: InstanceError) -> RefusedError:
        if self._client.begun:
            return RefusedError(502, f"the answer broke off: {failure.reason}", "broken")
        if not failure.sick and not failure.suspects_transfer:
            return RefusedError(503, f"all instances are busy: {failure.reason}", "failed", 1.0)
        return RefusedError(502, f"no instance could serve the request: {failure.reason}", "failed")

    @contextmanager
    def _elsewhere(self) -> Iterator[None]:
        """Count the time of the block as not the router's own."""
        began = self._now()
        try:
            yield
        finally:
            self._elsewhere_s += self._now() - began

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
