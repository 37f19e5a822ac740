"""The parts of a running router, made once and shared by its requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_plugins.router.desk import Desk
from vllm_plugins.router.held import Held, Release, Releaser, pd_release
from vllm_plugins.router.metrics import RouterMetrics
from vllm_plugins.router.observed import Observed
from vllm_plugins.router.settings import RouterSettings, read_admin_key
from vllm_plugins.router.upstream import Upstream
from vllm_plugins.routing import (
    DISPATCHERS,
    Capacity,
    Fleet,
    Health,
    Instance,
    Ledger,
    Role,
    RoleSwitch,
)


@dataclass
class Services:
    """The parts of one router.

    Attributes:
        settings: What the operator has chosen.
        fleet: The instances.
        ledger: Their load.
        desk: Gives requests to instances.
        upstream: The connections to instances.
        releaser: Lets go of held KV.
        metrics: What the router counts.
        admin_key: Guards the routes that change the instances; None where only loopback does.
        observed: What instances said of themselves last, by id.
        doors: Where encode instances hand embeddings out, by id, as their answers said.
        held: Prompts whose KV a prefill instance keeps for a request, until decode has it.
        switch: The change of role in progress.
        model: Name and maximal length of the model that all instances serve; empty until known.
    """

    settings: RouterSettings
    fleet: Fleet
    ledger: Ledger
    desk: Desk
    upstream: Upstream
    releaser: Releaser
    metrics: RouterMetrics
    admin_key: bytes | None
    observed: dict[str, Observed] = field(default_factory=dict)
    doors: dict[str, dict[str, Any]] = field(default_factory=dict)
    held: set[Held] = field(default_factory=set)
    switch: RoleSwitch | None = None
    model: tuple[str, int] | None = None
    _names: dict[Role, int] = field(default_factory=lambda: dict.fromkeys(Role, 0))

    @property
    def colocated(self) -> bool:
        """Whether prefill instances also decode, as there are no others."""
        return not self.settings.decode

    @property
    def own_headers(self) -> dict[str, str]:
        """Headers of the requests that the router makes for itself."""
        key = self.settings.api_key
        return {"Authorization": f"Bearer {key}"} if key else {}

    def stages(self) -> list[Role]:
        """Return the roles that this router has instances for."""
        given = self.settings
        urls = {Role.PREFILL: given.prefill, Role.DECODE: given.decode, Role.ENCODE: given.encode}
        return [role for role, named in urls.items() if named]

    def add(self, url: str, role: Role) -> Instance:
        """Take an instance into the fleet, under a name of its own.

        Raises:
            PluginError: Its address is in the fleet already.
        """
        self._names[role] += 1
        held = frozenset(self.stages()) if self.settings.roles == "soft" else frozenset({role})
        instance = Instance(f"{role}-{self._names[role]}", url, role, held, self.capacity())
        self.fleet.add(instance)
        return instance

    def forget(self, instance_id: str) -> Instance:
        """Take an instance out of the fleet, with everything noted of it.

        Raises:
            PluginError: It is not there, or its role would be left with too few.
        """
        instance = self.fleet.remove(instance_id)
        self.ledger.forget(instance)
        self.observed.pop(instance_id, None)
        self.doors.pop(instance_id, None)
        self.releaser.forget(instance_id)
        return instance

    def capacity(self, kv_blocks: int = 0, block_size: int = 16) -> Capacity:
        """Return an instance's capacity, with what is known of its KV cache."""
        given = self.settings
        return Capacity(
            kv_blocks,
            block_size,
            given.decode_kv_fraction,
            given.max_prefill_tokens,
            given.max_encoder_tokens,
        )

    async def close(self) -> None:
        """Close connections and finish releases that were begun."""
        await self.releaser.close(self.settings.connect_timeout_s)
        await self.upstream.close()


def build_services(
    settings: RouterSettings, secret: bytes | None, release: Release = pd_release
) -> Services:
    """Make a router's parts; called in its event loop.

    Args:
        settings: Checked.
        secret: Shared with instances that hold KV; None for the user's own.
        release: How held KV is let go of.

    Raises:
        PluginError: An option's file or address is wrong.
    """
    admin_key = read_admin_key(settings.admin_key_file)
    fleet, ledger = Fleet(min_per_stage=settings.min_per_stage), Ledger()
    metrics = RouterMetrics(fleet, ledger)
    health = Health(fleet, settings.fail_threshold, settings.probe_s)
    dispatcher = DISPATCHERS[settings.dispatch](fleet, ledger)
    desk = Desk(
        fleet, ledger, health, dispatcher, metrics, settings.max_queue, settings.queue_timeout_s
    )
    upstream = Upstream(settings.connect_timeout_s)
    releaser = Releaser(release, secret, metrics)
    services = Services(settings, fleet, ledger, desk, upstream, releaser, metrics, admin_key)
    for role, urls in (
        (Role.PREFILL, settings.prefill),
        (Role.DECODE, settings.decode),
        (Role.ENCODE, settings.encode),
    ):
        for url in urls:
            services.add(url, role)
    return services
