"""A replica that owns one instance: it starts it, announces it, watches it and ends it in order."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any

from vllm_plugins.deploy.arguments import WHERE
from vllm_plugins.deploy.calls import free_port, is_healthy, is_idle, observe
from vllm_plugins.deploy.guarded import GuardedServer
from vllm_plugins.deploy.launch import base_url, engine_command, environment
from vllm_plugins.deploy.settings import DeploySettings, read_settings
from vllm_plugins.errors import PluginError
from vllm_plugins.routing import Role

# Ray Serve gives its logger a file for each replica, and the dashboard shows it.
logger = logging.getLogger("ray.serve")

ROUTER_NAME = "router"
POLL_S = 0.5
# For a server without requests to end.
STOP_S = 10.0
# A router that is being restarted answers later; the next announcement follows soon.
ROUTER_TIMEOUT_S = 5.0
# A request that the router had sent off before it heard of the drain has arrived after so many
# looks.
IDLE_LOOKS = 2


class EngineReplica:
    """One instance of a role, as a replica of Ray Serve.

    Requests do not come through Ray: the router speaks to the instance's own port. Ray places the
    replica, asks after its health, restarts it, and decides how many there are.

    Args:
        settings: Of the deployment, as plain values.
        role: Of the instance.
    """

    # Whether there is something to end; a constructor may fail before.
    _running = False

    # Ray Serve awaits it, and can end a replica meanwhile, which it could not if this blocked.
    async def __init__(self, settings: dict[str, Any], role: str) -> None:  # type: ignore[misc]
        from ray import serve

        self._settings = read_settings(settings)
        self._role = Role(role)
        self._queued = 0.0
        self._ready = False
        host = listen_host(self._settings)
        port = free_port(host)
        self._url = base_url(host, port)
        self._router = serve.get_deployment_handle(ROUTER_NAME)
        command = engine_command(self._settings, self._role, host, port)
        self._server = GuardedServer(command, environment(self._settings), STOP_S)
        self._running = True
        await self._until_healthy()
        self._ready = True

    async def check_health(self) -> None:
        """Look after the instance and announce it; Ray Serve calls this again and again.

        Raises:
            RuntimeError: The instance has ended or does not answer; Ray Serve then replaces it.
        """
        if self._server.ended.is_set():
            raise RuntimeError(f"the {self._role} instance {self._server.reason()}")
        if not await asyncio.to_thread(is_healthy, self._url):
            raise RuntimeError(f"the {self._role} instance at {self._url} does not answer")
        if self._running:
            queued = await self._tell("announce", self._role.value)
            self._queued = self._queued if queued is None else float(queued)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the requests here and this instance's share of those that wait at the router.

        Raises:
            CallError: The instance does not answer; Ray Serve then goes by the others.
        """
        seen = await asyncio.to_thread(observe, self._url)
        return {"load": seen.running + seen.waiting + self._queued}

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """End the instance in order: no new requests, those that it has, then itself.

        Ray Serve awaits what this returns; the garbage collector, which calls it again, does not.
        """
        if not self._running:
            return None
        self._running = False
        return self._end()

    async def _end(self) -> None:
        if self._ready:
            await self._tell("leave")
            await self._until_idle()
            await self._tell("remove")
        await asyncio.to_thread(self._server.stop)

    async def _until_healthy(self) -> None:
        try:
            async with asyncio.timeout(self._settings.start_timeout_s):
                while not await asyncio.to_thread(is_healthy, self._url):
                    if self._server.ended.is_set():
                        raise RuntimeError(f"the {self._role} instance {self._server.reason()}")
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            await asyncio.to_thread(self._server.stop)
            raise RuntimeError(
                f"the {self._role} instance was not healthy within start_timeout_s="
                f"{self._settings.start_timeout_s:g}\n" + "\n".join(self._server.tail)
            ) from None
        logger.info("the %s instance serves at %s", self._role, self._url)

    async def _until_idle(self) -> None:
        deadline, looks = time.monotonic() + self._settings.drain_s, 0
        while looks < IDLE_LOOKS and time.monotonic() < deadline:
            if self._server.ended.is_set():
                return
            looks = looks + 1 if await asyncio.to_thread(is_idle, self._url) else 0
            await asyncio.sleep(POLL_S)

    async def _tell(self, what: str, *more: str) -> Any:
        """Call the router's replica; return None where it cannot be reached in time."""

        async def ask() -> Any:
            return await getattr(self._router, what).remote(self._url, *more)

        try:
            return await asyncio.wait_for(ask(), ROUTER_TIMEOUT_S)
        except Exception as error:
            # Whatever Ray says of a router that is down: it is told again, or finds out by itself.
            logger.warning("the router has not heard %s of %s: %r", what, self._url, error)
            return None


def listen_host(settings: DeploySettings) -> str:
    """Return the address on which servers on this node listen.

    Raises:
        PluginError: It is loopback, and the cluster has other nodes that could not reach it.
    """
    import ray

    if settings.network == "cluster":
        return str(ray.util.get_node_ip_address())
    if sum(node["Alive"] for node in ray.nodes()) > 1:
        raise PluginError(
            f"{WHERE}: network={settings.network}",
            "the cluster has several nodes by now, and instances on loopback reach only their own",
            "deploy again with --network cluster",
        )
    return "127.0.0.1"
