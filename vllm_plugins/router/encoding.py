"""The encode stage of a request: its media spread over encode instances, all at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_plugins.router.bodies import CHAT, Call
from vllm_plugins.router.media import Encoded, Medium, encode_body, encoded, referring_body
from vllm_plugins.router.upstream import InstanceError, RejectedError
from vllm_plugins.routing import Instance, Role, Ticket, Work

if TYPE_CHECKING:
    from vllm_plugins.router.services import Services

logger = logging.getLogger(__name__)


class Encoding:
    """Has the media of one request encoded.

    Args:
        services: The router's parts.
        call: The request.
        media: Its media.
        headers: For the requests to instances.
    """

    def __init__(
        self,
        services: Services,
        call: Call,
        media: Sequence[Medium],
        headers: Mapping[str, str],
    ) -> None:
        self._services = services
        self._call = call
        self._media = media
        self._headers = headers

    async def run(self) -> dict[str, Any]:
        """Return the request for prefill and decode, once everything is encoded.

        Raises:
            RefusedError: No encode instance has room.
            RejectedError: An encode instance refuses a medium.
            InstanceError: Encode instances failed more often than may be retried.
        """
        # One image that occurs twice is encoded once.
        left = list({medium.name: medium for medium in self._media}.values())
        known: dict[str, Encoded] = {}
        tried: set[str] = set()
        failures = 0
        while left:
            done, failure = await self._round(left, tried)
            known.update(done)
            left = [medium for medium in left if medium.name not in done]
            if failure is not None:
                failures += 1
                tried.add(failure.instance.id)
                if failures > self._services.settings.retries:
                    raise failure
                self._services.metrics.retried(Role.ENCODE)
        return referring_body(
            self._call, self._media, {name: one for name, one in known.items() if one.key}
        )

    async def warm(self, instance: Instance, body: Mapping[str, Any]) -> None:
        """Have a prefill instance compute the text before the first medium meanwhile."""
        try:
            await self._services.upstream.post_json(instance, CHAT, body, self._headers)
        except (InstanceError, RejectedError) as error:
            # Nothing depends on it but the time: the text is computed with the whole prompt then.
            logger.info("%s did not compute a prompt's beginning: %s", instance.id, error)

    async def _round(
        self, media: Sequence[Medium], tried: set[str]
    ) -> tuple[dict[str, Encoded], InstanceError | None]:
        """Ask for all media; return what came, and one of the failures."""
        tickets = await self._place(len(media), tried)
        groups: dict[str, list[Medium]] = {}
        for medium, ticket in zip(media, tickets, strict=True):
            groups.setdefault(ticket.instance.id, []).append(medium)
        instances = {ticket.instance.id: ticket.instance for ticket in tickets}
        with self._services.desk.held(*tickets):
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._ask(instances[name], some))
                    for name, some in groups.items()
                ]
        answers = [task.result() for task in tasks]
        rejected = next((one for one in answers if isinstance(one, RejectedError)), None)
        if rejected is not None:
            raise rejected
        known: dict[str, Encoded] = {}
        for answer in answers:
            if isinstance(answer, dict):
                known.update(answer)
        return known, next((one for one in answers if isinstance(one, InstanceError)), None)

    async def _place(self, count: int, tried: set[str]) -> list[Ticket]:
        tokens = round(self._services.desk.medium_tokens.value)
        if self._services.settings.irp == "image":
            return await self._services.desk.spread([tokens] * count, tried)
        work = Work(encoder_tokens=tokens * count)
        return [await self._services.desk.place(Role.ENCODE, work, tried)] * count

    async def _ask(
        self, instance: Instance, media: Sequence[Medium]
    ) -> dict[str, Encoded] | InstanceError | RejectedError:
        """Return what an instance says of media, or how it failed: the others go on."""
        body = encode_body(self._call, media)
        try:
            answer = await self._services.upstream.post_json(instance, CHAT, body, self._headers)
            known = encoded(media, answer)
        except ValueError as error:
            return InstanceError(instance, str(error))
        except InstanceError as error:
            logger.warning("request %s: %s", self._call.request_id, error)
            if error.sick:
                self._services.desk.failed(instance)
            return error
        except RejectedError as error:
            return error
        self._learn(known)
        return {medium.name: known.get(medium.name, Encoded("", {})) for medium in media}

    def _learn(self, known: Mapping[str, Encoded]) -> None:
        """Note how many embeddings a medium has, where the instances say so."""
        for one in known.values():
            own = one.entry.get("vllm_plugins_epd")
            tokens = own.get("num_tokens") if isinstance(own, dict) else None
            if isinstance(tokens, int) and 0 < tokens < 1 << 24:
                self._services.desk.medium_tokens.note(tokens)
