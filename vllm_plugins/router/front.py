"""The router's HTTP server: OpenAI's routes in front of the instances, and its own."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from typing import TYPE_CHECKING

from aiohttp import web

from vllm_plugins.router import admin, status
from vllm_plugins.router.answers import RefusedError, error_body
from vllm_plugins.router.bodies import CHAT, COMPLETIONS, Call, parse_body
from vllm_plugins.router.client import Client
from vllm_plugins.router.exchange import Exchange
from vllm_plugins.router.layered import LayeredExchange
from vllm_plugins.router.listen import headers_in_time
from vllm_plugins.router.upstream import (
    InstanceError,
    RejectedError,
    request_headers,
)
from vllm_plugins.routing import Role, State

if TYPE_CHECKING:
    from vllm_plugins.router.services import Services

logger = logging.getLogger(__name__)

# Instances write it into their logs.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
# Time for a client to send its request's body.
BODY_TIMEOUT_S = 60.0
SMALL_ROUTE_TIMEOUT_S = 5.0


class Front:
    """Handlers of the public routes.

    Args:
        services: The router's parts.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._max_body_bytes = int(services.settings.max_body_mib * 2**20)

    def routes(self) -> list[web.RouteDef]:
        """Return the routes with their handlers."""
        return [
            web.post(COMPLETIONS, self.generate),
            web.post(CHAT, self.generate),
            web.get("/v1/models", self.models),
            web.get("/health", self.health),
            web.get("/metrics", self.metrics),
        ]

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Serve a completion or a chat completion."""
        request_id = request.headers.get("X-Request-Id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16)
        client, outcome = Client(request, request_id), "failed"
        try:
            response, outcome = await self._answered(request, client, request_id)
        except ConnectionResetError:
            outcome = "disconnected"
            return client.gone()
        except asyncio.CancelledError:
            outcome = "disconnected"
            raise
        finally:
            self._services.metrics.ended(outcome)
        return response

    async def _answered(
        self, request: web.Request, client: Client, request_id: str
    ) -> tuple[web.StreamResponse, str]:
        """Serve a request; return its answer and how it ended, one of ``OUTCOMES``."""
        try:
            call = await self._read(request, request_id)
            kind = LayeredExchange if self._services.settings.stream_layers else Exchange
            return await kind(self._services, call, client).run(), "complete"
        except RejectedError as rejected:
            outcome = "broken" if client.begun else "rejected"
            return await self._reject(client, rejected), outcome
        except RefusedError as refusal:
            return await client.refuse(refusal), refusal.outcome

    async def models(self, request: web.Request) -> web.Response:
        """Pass on an instance's list of models."""
        headers = request_headers(request.headers, secrets.token_hex(16))
        for instance in self._services.fleet:
            if instance.state is State.UP and instance.active is not Role.ENCODE:
                try:
                    body = await self._services.upstream.get(
                        instance, "/v1/models", SMALL_ROUTE_TIMEOUT_S, headers
                    )
                except InstanceError:
                    # The probes will find out what is wrong with it.
                    continue
                return web.Response(body=body, content_type="application/json")
        return web.Response(
            status=503,
            body=error_body(503, "no instance is up"),
            content_type="application/json",
        )

    async def health(self, request: web.Request) -> web.Response:
        """Answer 200 while every stage has an instance that is up."""
        missing = [r for r in self._services.stages() if not self._services.fleet.serving(r)]
        if missing:
            return web.Response(status=503, text=f"no instance is up for: {', '.join(missing)}\n")
        return web.Response()

    async def metrics(self, request: web.Request) -> web.Response:
        """Show the router's own metrics."""
        text = "text/plain; version=0.0.4; charset=utf-8"
        return web.Response(body=self._services.metrics.render(), headers={"Content-Type": text})

    async def _read(self, request: web.Request, request_id: str) -> Call:
        now = asyncio.get_running_loop().time()
        if "Content-Encoding" in request.headers:
            raise RefusedError(415, "compressed request bodies are not taken", "invalid")
        body = parse_body(await self._body(request))
        deadline = now + self._services.settings.request_timeout_s
        return Call(request.path, body, request_id, request.headers, now, deadline)

    async def _body(self, request: web.Request) -> bytes:
        limit = self._max_body_bytes
        too_large = RefusedError(413, f"the body is over {limit} bytes", "too_large")
        if (request.content_length or 0) > limit:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while chunk := await request.content.readany():
                    parts.append(chunk)
                    size += len(chunk)
                    if size > limit:
                        raise too_large
        except TimeoutError:
            raise RefusedError(408, f"no body within {BODY_TIMEOUT_S:g} s", "invalid") from None
        return b"".join(parts)

    async def _reject(self, client: Client, rejected: RejectedError) -> web.StreamResponse:
        if client.begun:
            text = rejected.body[:500].decode(errors="replace")
            return await client.refuse(RefusedError(502, f"the answer broke off: {text}", "broken"))
        return client.whole(rejected.status, rejected.headers, rejected.body)


def build_app(services: Services) -> web.Application:
    """Return the application with all routes."""
    app = web.Application(middlewares=[headers_in_time])
    app.add_routes(Front(services).routes())
    app.add_routes(admin.Admin(services).routes())
    app.add_routes(status.Status(services).routes())
    return app


def build_runner(services: Services) -> web.AppRunner:
    """Return what serves the application.

    A handler is cancelled when its client leaves: everything it holds is let go of on that way.
    """
    return web.AppRunner(
        build_app(services),
        handler_cancellation=True,
        shutdown_timeout=services.settings.drain_s,
    )
