"""A page that shows the router live: queues, instances, their load and roles."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiohttp import web

from vllm_plugins.router.admin import KEY_HEADER, require_admin
from vllm_plugins.router.page import PAGE

if TYPE_CHECKING:
    from vllm_plugins.router.services import Services
    from vllm_plugins.routing import Instance

# Nothing from elsewhere is loaded, and nothing that an instance says can become part of the page.
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Status:
    """Handlers of the page and of the values that it shows.

    Args:
        services: The router's parts.
    """

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> list[web.RouteDef]:
        """Return the routes with their handlers."""
        return [web.get("/", self.page), web.get("/status.json", self.values)]

    async def page(self, request: web.Request) -> web.Response:
        """Show the page."""
        text = PAGE.replace("KEY_HEADER", KEY_HEADER)
        return web.Response(text=text, content_type="text/html", headers=SECURITY_HEADERS)

    async def values(self, request: web.Request) -> web.Response:
        """Show what the page shows, as JSON."""
        require_admin(self._services, request)
        services = self._services
        switch = services.switch
        return web.json_response(
            {
                "model": services.model[0] if services.model else None,
                "queues": {role: services.desk.waiting(role) for role in services.stages()},
                "change_of_role": switch
                and f"{switch.move.instance.id}: {switch.move.source} to {switch.move.target}",
                "instances": [self._shown(one) for one in services.fleet],
            },
            headers=SECURITY_HEADERS,
        )

    def _shown(self, instance: Instance) -> dict[str, Any]:
        services, now = self._services, asyncio.get_running_loop().time()
        load, seen = services.ledger.load(instance), services.observed.get(instance.id)
        return {
            "id": instance.id,
            "url": instance.url,
            "role": instance.active,
            "state": instance.state,
            "requests": load.requests,
            "backlog": round(services.ledger.backlog(instance, now)),
            "kv_blocks": instance.capacity.kv_blocks,
            "running": seen.running if seen else None,
            "waiting": seen.waiting if seen else None,
            "kv_usage": round(seen.kv_usage, 4) if seen else None,
            "held_blocks": seen.held_blocks if seen else None,
        }
