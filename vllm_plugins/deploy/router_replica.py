"""The replica that owns the router, and keeps its instances those that Ray runs."""

from __future__ import annotations

import asyncio
import logging
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from vllm_plugins.deploy.calls import CallError
from vllm_plugins.deploy.engine_replica import listen_host
from vllm_plugins.deploy.guarded import GuardedServer
from vllm_plugins.deploy.launch import base_url, environment, router_command
from vllm_plugins.deploy.members import Members, Step
from vllm_plugins.deploy.router_admin import RouterAdmin, seen
from vllm_plugins.deploy.settings import read_settings
from vllm_plugins.routing import Role, State

logger = logging.getLogger("ray.serve")

ROUND_S = 1.0
# Several times the interval in which instances announce themselves.
PATIENCE_S = 15.0
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class RouterReplica:
    """`vllm-plugins route` on a fixed port, as the one replica of its deployment.

    It starts the router once every role has an instance, and then adds, drains and removes
    instances by the router's own routes, as they announce themselves and leave. The router picks
    instances, probes them and retries by itself.

    Args:
        settings: Of the deployment, as plain values.
        engines: The deployments of the roles. They are not called, but Ray Serve deploys with an
            application what its first deployment is given.
    """

    # Whether there is something to end; the constructor may fail before.
    _running = False

    def __init__(self, settings: dict[str, Any], *engines: Any) -> None:
        self._settings = read_settings(settings)
        # Refuses a cluster that the network setting does not fit.
        self._node_host = listen_host(self._settings)
        self._folder = tempfile.TemporaryDirectory(prefix="vllm-plugins-router-")
        self._key_file = self._settings.admin_key_file or self._make_key()
        host = self._settings.host
        reached = base_url(WILDCARDS.get(host, host), self._settings.port)
        self._admin = RouterAdmin(reached, self._key_file)
        self._members = Members(PATIENCE_S)
        self._server: GuardedServer | None = None
        self._status: dict[str, Any] = {}
        self._refused: dict[str, str] = {}
        # The constructor returns at once, as instances can announce themselves only then.
        self._rounds = asyncio.get_running_loop().create_task(self._go_on())
        self._running = True

    async def announce(self, url: str, role: str) -> float:
        """Note an instance that is up.

        Returns:
            Its share of the requests that wait at the router for its role.
        """
        self._members.announce(url, Role(role), time.monotonic())
        up = Counter(one["role"] for one in self._instances() if one["state"] == State.UP)
        return float(self._status.get("queues", {}).get(role, 0)) / max(1, up[role])

    async def leave(self, url: str) -> None:
        """Give an instance no new requests, from now on."""
        self._members.leave(url)
        await self._round()

    async def remove(self, url: str) -> None:
        """Forget an instance."""
        self._members.remove(url)
        await self._round()

    async def status(self) -> dict[str, Any]:
        """Return where the router listens, whether it serves, and its instances."""
        host = self._node_host if self._settings.host in WILDCARDS else self._settings.host
        return {
            "url": base_url(host, self._settings.port),
            "serves": bool(self._status),
            "instances": self._instances(),
        }

    async def check_health(self) -> None:
        """Look after the router; Ray Serve calls this again and again.

        Raises:
            RuntimeError: The router has ended; Ray Serve then replaces this replica.
        """
        if self._rounds.done():
            raise RuntimeError(f"the router is not looked after: {self._rounds.exception()!r}")
        if self._server is not None and self._server.ended.is_set():
            raise RuntimeError(f"the router {self._server.reason()}")

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """End the router; it answers what it has begun.

        Ray Serve awaits what this returns; the garbage collector, which calls it again, does not.
        """
        if not self._running:
            return None
        self._running = False
        return self._end()

    async def _end(self) -> None:
        self._rounds.cancel()
        if self._server is not None:
            await asyncio.to_thread(self._server.stop)
        self._folder.cleanup()

    def _make_key(self) -> Path:
        path = Path(self._folder.name) / "admin.key"
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
        return path

    def _instances(self) -> list[dict[str, Any]]:
        return list(self._status.get("instances", []))

    async def _go_on(self) -> None:
        while True:
            await self._round()
            await asyncio.sleep(ROUND_S)

    async def _round(self) -> None:
        """Start the router if it can be, or take it a step nearer to the wanted instances."""
        if self._server is None:
            fresh = self._members.fresh(time.monotonic())
            if set(self._settings.roles()) <= fresh.keys():
                self._start(fresh)
            return
        try:
            self._status = await asyncio.to_thread(self._admin.status)
        except CallError as error:
            # It has not opened its port yet, or has ended, which the health check tells.
            logger.info("the router does not answer: %s", error)
            return
        for step in self._members.plan(seen(self._status), time.monotonic()):
            await self._take(step)

    def _start(self, fresh: dict[Role, list[str]]) -> None:
        command = router_command(self._settings, fresh, self._key_file)
        # The router itself gives requests drain_s, and then needs a moment to close.
        grace_s = self._settings.drain_s + 5.0
        self._server = GuardedServer(command, environment(self._settings), grace_s)

    async def _take(self, step: Step) -> None:
        try:
            await asyncio.to_thread(self._admin.take, step)
        except CallError as error:
            # The next round tries again; what is refused for the same reason is said once.
            if self._refused.get(step.url) != str(error):
                logger.warning("the router does not %s %s: %s", step.verb, step.url, error)
            self._refused[step.url] = str(error)
        else:
            self._refused.pop(step.url, None)
