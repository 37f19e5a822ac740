"""The encode stage of a request: its media spread over encode instances, all at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_plugins.router.bodies import CHAT, Call
from vllm_plugins.router.media import (
    Encoded,
    Medium,
    awaited,
    door_of,
    encode_body,
    encoded,
    referring_body,
)
from vllm_plugins.router.upstream import InstanceError, RejectedError
from vllm_plugins.routing import Instance, Role, State, Ticket, Work

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
        # One image that occurs twice is encoded once.
        self._left = list({medium.name: medium for medium in media}.values())
        self._tried: set[str] = set()
        self._tickets: list[Ticket] = []
        self._failures = 0

    @property
    def undisturbed(self) -> bool:
        """Whether no encode instance has failed so far."""
        return not self._tried

    async def place(self) -> None:
        """Choose an encode instance for each medium, as soon as they have room.

        Raises:
            RefusedError: None has.
        """
        tokens, count = round(self._services.desk.medium_tokens.value), len(self._left)
        if self._services.settings.irp == "image":
            self._tickets = await self._services.desk.spread([tokens] * count, self._tried)
            return
        work = Work(encoder_tokens=tokens * count)
        ticket = await self._services.desk.place(Role.ENCODE, work, self._tried)
        self._tickets = [ticket] * count

    def close(self) -> None:
        """Give the encode instances' room back."""
        if self._tickets:
            self._services.desk.close(*self._tickets)

    def awaiting_body(self) -> dict[str, Any] | None:
        """Return the request for a prefill instance that itself waits for the media.

        None where an instance's answers have not shown yet where it hands embeddings out, or where
        vLLM names media by how they are processed, which the router cannot tell beforehand.
        """
        if any(self._call.body.get(name) for name in ("mm_processor_kwargs", "media_io_kwargs")):
            return None
        doors = [self._services.doors.get(ticket.instance.id) for ticket in self._tickets]
        known = {
            medium.name: awaited(medium, door)
            for medium, door in zip(self._left, doors, strict=True)
            if door is not None
        }
        if len(known) < len(self._left):
            return None
        return referring_body(self._call, self._media, known)

    async def run(self) -> dict[str, Any]:
        """Return the request for prefill and decode, once everything is encoded.

        Raises:
            RefusedError: No encode instance has room.
            RejectedError: An encode instance refuses a medium.
            InstanceError: Encode instances failed more often than may be retried.
        """
        known: dict[str, Encoded] = {}
        while self._left:
            if not self._tickets:
                await self.place()
            done, failure = await self._round()
            known.update(done)
            self._left = [medium for medium in self._left if medium.name not in done]
            if failure is not None:
                self._failures += 1
                if self._failures > self._services.settings.retries:
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

    async def _round(self) -> tuple[dict[str, Encoded], InstanceError | None]:
        """Ask for all media that are left; return what came, and one of the failures."""
        tickets, self._tickets = self._tickets, []
        groups: dict[str, list[Medium]] = {}
        for medium, ticket in zip(self._left, tickets, strict=True):
            groups.setdefault(ticket.instance.id, []).append(medium)
        instances = {ticket.instance.id: ticket.instance for ticket in tickets}
        with self._services.desk.held(*tickets):
            answers = await asyncio.gather(
                *(self._ask(instances[name], some) for name, some in groups.items())
            )
        known: dict[str, Encoded] = {}
        failure = None
        for answer in answers:
            if isinstance(answer, RejectedError):
                raise answer
            if isinstance(answer, InstanceError):
                failure = answer
            else:
                known.update(answer)
        return known, failure

    async def _ask(
        self, instance: Instance, media: Sequence[Medium]
    ) -> dict[str, Encoded] | InstanceError | RejectedError:
        """Return what an instance says of media, or how it failed: the others go on."""
        body = encode_body(self._call, media)
        try:
            answer = await self._services.upstream.post_json(instance, CHAT, body, self._headers)
            known = encoded(media, answer)
        except ValueError as error:
            return self._failed(InstanceError(instance, str(error)))
        except InstanceError as error:
            return self._failed(error)
        except RejectedError as error:
            return error
        self._learn(instance, known)
        return {medium.name: known.get(medium.name, Encoded("", {})) for medium in media}

    def _failed(self, failure: InstanceError) -> InstanceError:
        """Note a failure before the other instances have answered."""
        logger.warning("request %s: %s", self._call.request_id, failure)
        self._tried.add(failure.instance.id)
        # One that was started anew hands its embeddings out elsewhere.
        self._services.doors.pop(failure.instance.id, None)
        if failure.sick:
            self._services.desk.failed(failure.instance)
        return failure

    def _learn(self, instance: Instance, known: Mapping[str, Encoded]) -> None:
        """Note how many embeddings a medium has and where they are, where the instance says so."""
        for name, one in known.items():
            own = one.entry.get("vllm_plugins_epd")
            if not isinstance(own, dict):
                continue
            tokens = own.get("num_tokens")
            if isinstance(tokens, int) and 0 < tokens < 1 << 24:
                self._services.desk.medium_tokens.note(tokens)
            if one.key == name and instance.state is not State.REMOVED:
                self._services.doors[instance.id] = door_of(own)
