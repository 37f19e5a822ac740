"""Routes by which the operator adds, drains and removes instances while requests are served."""

from __future__ import annotations

import hmac
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from aiohttp import web

from vllm_plugins.errors import PluginError
from vllm_plugins.router.answers import error_body
from vllm_plugins.router.settings import check_url
from vllm_plugins.router.startup import check_model
from vllm_plugins.routing import Instance, Role
from vllm_plugins.wire.address import is_loopback

if TYPE_CHECKING:
    from vllm_plugins.router.services import Services

KEY_HEADER = "X-Router-Admin-Key"


class Admin:
    """Handlers of ``/instances``.

    Args:
        services: The router's parts.
    """

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> list[web.RouteDef]:
        """Return the routes with their handlers."""
        one = "/instances/{id}"
        return [
            web.get("/instances", self.show),
            web.post("/instances", self.add),
            web.post(one + "/drain", self.drain),
            web.post(one + "/resume", self.resume),
            web.delete(one, self.remove),
        ]

    async def show(self, request: web.Request) -> web.Response:
        """Show all instances."""
        require_admin(self._services, request)
        return web.json_response({"instances": [self._shown(one) for one in self._services.fleet]})

    async def add(self, request: web.Request) -> web.Response:
        """Add the instance of a body ``{"url": ..., "role": ...}``, once it answers."""
        require_admin(self._services, request)
        try:
            url, role = _wanted(await request.read())
            if role not in self._services.stages():
                raise PluginError(
                    f"role {role}", "is not among those that the router was started with",
                    "start it with an instance of that role",
                )  # fmt: skip
            await check_model(self._services, url, role)
            instance = self._services.add(url, role)
        except PluginError as error:
            return _refused(error)
        self._services.desk.admit_all()
        return web.json_response(self._shown(instance), status=201)

    async def drain(self, request: web.Request) -> web.Response:
        """Give an instance no new requests; those that it has go on."""
        return self._changed(request, self._services.fleet.drain)

    async def resume(self, request: web.Request) -> web.Response:
        """Give a drained instance new requests again."""
        return self._changed(request, self._services.fleet.resume)

    async def remove(self, request: web.Request) -> web.Response:
        """Forget an instance; requests that it has are still answered."""
        return self._changed(request, self._services.forget)

    def _changed(self, request: web.Request, change: Any) -> web.Response:
        require_admin(self._services, request)
        try:
            instance = change(request.match_info["id"])
        except PluginError as error:
            known = request.match_info["id"] in self._services.fleet
            return _refused(error, 409 if known else 404)
        self._services.desk.admit_all()
        return web.json_response(self._shown(instance))

    def _shown(self, instance: Instance) -> dict[str, Any]:
        return {
            "id": instance.id,
            "url": instance.url,
            "role": instance.active,
            "roles": sorted(instance.roles),
            "state": instance.state,
            "requests": self._services.ledger.load(instance).requests,
        }


def require_admin(services: Services, request: web.Request) -> None:
    """Let only the operator pass.

    With a key, by the key. Without one, the router listens on loopback alone; then pages in a
    browser on this machine are kept out, which could send requests here as well.

    Raises:
        web.HTTPForbidden: It is not the operator.
    """
    if services.admin_key is not None:
        given = request.headers.get(KEY_HEADER, "").encode(errors="replace")
        allowed = hmac.compare_digest(given, services.admin_key)
    else:
        allowed = "Origin" not in request.headers and is_loopback(_host(request))
    if not allowed:
        text = error_body(403, f"the operator's key is needed, in the header {KEY_HEADER}").decode()
        raise web.HTTPForbidden(text=text, content_type="application/json")


def _host(request: web.Request) -> str:
    """Return the host by which the router was addressed; empty where that is none."""
    try:
        return urlsplit(f"//{request.host}").hostname or ""
    except ValueError:
        return ""


def _wanted(body: bytes) -> tuple[str, Role]:
    try:
        wanted = json.loads(body)
        url, role = wanted["url"], Role(wanted["role"])
        if not isinstance(url, str):
            raise TypeError
    except (ValueError, LookupError, TypeError):
        roles = ", ".join(Role)
        raise PluginError(
            "the body", "names no url and role", f'write {{"url": URL, "role": one of {roles}}}'
        ) from None
    check_url(f"url {url}", url)
    return url.rstrip("/"), role


def _refused(error: PluginError, status: int = 400) -> web.Response:
    return web.Response(
        status=status, body=error_body(status, str(error)), content_type="application/json"
    )
