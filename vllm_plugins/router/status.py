"""A page that shows the router live: queues, instances, their load and roles."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiohttp import web

from vllm_plugins.router.admin import require_admin
from vllm_plugins.router.page import PAGE, POLICY
from vllm_plugins.routing import State

if TYPE_CHECKING:
    from vllm_plugins.router.services import Services
    from vllm_plugins.routing import Instance

SECURITY_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
# The name comes from an instance, and goes out once a second.
MOST_NAME = 200


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
        return web.Response(text=PAGE, content_type="text/html", headers=SECURITY_HEADERS)

    async def values(self, request: web.Request) -> web.Response:
        """Show what the page shows, as JSON."""
        require_admin(self._services, request)
        services, desk = self._services, self._services.desk
        stages, switch = services.stages(), services.switch
        return web.json_response(
            {
                "model": services.model[0][:MOST_NAME] if services.model else None,
                "queues": {role: desk.waiting(role) for role in stages},
                "longest_wait_s": {role: _tenths(desk.longest_wait(role)) for role in stages},
                "max_queue": services.settings.max_queue,
                "held": self._held(),
                "change_of_role": switch
                and f"{switch.move.instance.id}: {switch.move.source} to {switch.move.target}",
                "instances": [self._shown(one) for one in services.fleet],
            },
            headers=SECURITY_HEADERS,
        )

    def _held(self) -> dict[str, Any]:
        held = self._services.held
        ends = min((one.until for one in held), default=None)
        return {
            "prompts": len(held),
            "tokens": sum(one.prompt_tokens for one in held),
            "lease_left_s": None if ends is None else _tenths(ends - _now()),
        }

    def _shown(self, instance: Instance) -> dict[str, Any]:
        services, now = self._services, _now()
        load, seen = services.ledger.load(instance), services.observed.get(instance.id)
        if instance.state is State.DOWN:
            # What it said last holds no longer.
            seen = None
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
            "metrics_age_s": _tenths(now - seen.read_s) if seen else None,
        }


def _tenths(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def _now() -> float:
    return asyncio.get_running_loop().time()
