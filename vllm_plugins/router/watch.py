"""What the router does beside requests: probe instances, read their metrics, change roles."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_plugins.errors import PluginError
from vllm_plugins.router.observed import parse_metrics
from vllm_plugins.router.upstream import InstanceError
from vllm_plugins.routing import Instance, Phase, Role, RoleMonitor, RoleSwitch, State

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from vllm_plugins.router.services import Services

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 5.0
# Probes are due at different times; this is how often to look.
TICK_S = 0.2


class Watch:
    """The tasks that go on for as long as the router serves.

    Args:
        services: The router's parts.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        settings = services.settings
        self._monitor = RoleMonitor(
            services.fleet,
            services.ledger,
            settings.interval_s,
            settings.cooldown_s,
            settings.min_gain,
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._being_scraped: set[str] = set()

    def start(self) -> None:
        """Begin."""
        self._spawn(self._repeat(TICK_S, self.probe))
        self._spawn(self._repeat(self._services.settings.metrics_s, self.scrape))
        if self._services.settings.roles == "soft":
            self._spawn(self._repeat(TICK_S, self.change_roles))

    async def stop(self) -> None:
        """End."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def probe(self) -> None:
        """Ask the instances whose time has come whether they are well."""
        due = self._services.desk.health.due(_now())
        await asyncio.gather(*(self._probe(one) for one in due))

    async def scrape(self) -> None:
        """Read the metrics of all instances that are up."""
        up = [one for one in self._services.fleet if one.state is not State.DOWN]
        idle = [one for one in up if one.id not in self._being_scraped]
        await asyncio.gather(*(self._scrape(one) for one in idle))

    async def change_roles(self) -> None:
        """Go on with a change of role, or begin one if it is time."""
        services, now = self._services, _now()
        waiting = {role: float(self._waiting(role)) for role in services.stages()}
        self._monitor.sample(waiting, now)
        if services.switch is None:
            move = self._monitor.decide(now)
            if move is None:
                return
            try:
                services.switch = RoleSwitch(
                    move, services.fleet, services.ledger, now, services.settings.drain_s
                )
            except PluginError as error:
                # An instance has failed or was drained since the decision.
                logger.warning("no change of role: %s", error)
                return
            logger.warning("%s goes from %s to %s", move.instance.id, move.source, move.target)
        if services.switch.step(now) is not Phase.DRAINING:
            self._switched(services.switch)

    async def _repeat(self, every_s: float, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            # Not awaited: an instance that does not answer must not keep the others unwatched.
            self._spawn(act())
            await asyncio.sleep(every_s)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a round of the watch failed", exc_info=task.exception())

    def _switched(self, switch: RoleSwitch) -> None:
        self._services.switch = None
        if switch.phase is Phase.ACTIVE:
            self._services.metrics.moved(switch.move)
            self._services.desk.admit_all()

    def _waiting(self, role: Role) -> int:
        """Return the requests of a stage that are not being computed yet, here and at instances."""
        seen = self._services.observed
        names = [one.id for one in self._services.fleet.serving(role)]
        there = sum(seen[name].waiting for name in names if name in seen)
        return self._services.desk.waiting(role) + there

    async def _probe(self, instance: Instance) -> None:
        try:
            await self._services.upstream.get(instance, "/health", PROBE_TIMEOUT_S)
        except InstanceError as failure:
            logger.debug("probe: %s", failure)
            self._services.desk.failed(instance)
        else:
            self._services.desk.succeeded(instance)

    async def _scrape(self, instance: Instance) -> None:
        services = self._services
        self._being_scraped.add(instance.id)
        try:
            text = await services.upstream.get(instance, "/metrics", PROBE_TIMEOUT_S)
            seen = replace(parse_metrics(text), read_s=_now())
        except (InstanceError, ValueError) as error:
            # Only the estimate of foreign load gets old; whether it is well is the probes' matter.
            logger.debug("metrics of %s: %s", instance.id, error)
            return
        finally:
            self._being_scraped.discard(instance.id)
        if instance.id not in services.fleet:
            return
        services.observed[instance.id] = seen
        if seen.kv_blocks and seen.block_size:
            instance.capacity = services.capacity(seen.kv_blocks, seen.block_size)
        services.ledger.observe(instance, seen.running, seen.waiting, seen.kv_usage, _now())
        services.desk.admit(instance.active)


def _now() -> float:
    return asyncio.get_running_loop().time()
