"""The application of Ray Serve: one deployment for each role, and one for the router."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_plugins.deploy.engine_replica import ROUTER_NAME, STOP_S, EngineReplica
from vllm_plugins.deploy.router_replica import RouterReplica
from vllm_plugins.deploy.settings import DeploySettings, read_settings
from vllm_plugins.routing import Role

if TYPE_CHECKING:
    from ray.serve import Application

IMPORT_PATH = "vllm_plugins.deploy.application:build"
# Three failures in a row replace a replica, so one whose server has died is replaced after about
# three times this.
HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 30.0
# What does not start in so many attempts never will; the message then says why.
ATTEMPTS = 3
# For the messages to the router and the end of the server, beyond draining.
MARGIN_S = 15.0


def build(args: dict[str, Any]) -> Application:
    """Return the application; Ray Serve calls this with the ``args`` of a configuration file.

    Args:
        args: The fields of `DeploySettings`.

    Raises:
        PluginError: They cannot work, here or at all.
    """
    from ray import serve

    settings = resolve_network(read_settings(args))
    plain = settings.model_dump(mode="json")
    engines = [
        serve.deployment(EngineReplica, **engine_options(settings, role)).bind(plain, role.value)
        for role in settings.roles()
    ]
    router = serve.deployment(RouterReplica, **router_options(settings))
    return router.bind(plain, *engines)


def resolve_network(settings: DeploySettings) -> DeploySettings:
    """Return settings that say where to listen, for the cluster that this process is connected to.

    Raises:
        PluginError: There are several nodes, and no secret that all of them share.
    """
    import ray

    network = settings.network
    if network == "auto":
        several = sum(node["Alive"] for node in ray.nodes()) > 1
        network = "cluster" if several else "loopback"
    if network == "cluster":
        settings.check_remote()
    return settings.model_copy(update={"network": network})


def engine_options(settings: DeploySettings, role: Role) -> dict[str, Any]:
    """Return what Ray Serve is told of a role: number, resources, health, end of its replicas."""
    chosen = settings.role(role)
    return {
        "name": role.value,
        "ray_actor_options": {
            "num_cpus": settings.cpus(role),
            "num_gpus": settings.gpus(role),
            "resources": chosen.resources,
        },
        **_number(settings, role),
        **_common(settings),
    }


def router_options(settings: DeploySettings) -> dict[str, Any]:
    """Return what Ray Serve is told of the router."""
    return {
        "name": ROUTER_NAME,
        "num_replicas": 1,
        # Heads of clusters are often told that they have no CPUs, so that no work lands there.
        "ray_actor_options": {"num_cpus": 0, "resources": settings.router_resources},
        **_common(settings),
    }


def _common(settings: DeploySettings) -> dict[str, Any]:
    return {
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "graceful_shutdown_timeout_s": settings.drain_s + STOP_S + MARGIN_S,
        "max_constructor_retry_count": ATTEMPTS,
    }


def _number(settings: DeploySettings, role: Role) -> dict[str, Any]:
    replicas = settings.role(role).replicas
    if replicas.least == replicas.most:
        return {"num_replicas": replicas.least}
    return {
        "autoscaling_config": {
            "min_replicas": replicas.least,
            "max_replicas": replicas.most,
            "target_ongoing_requests": replicas.target_requests,
            "upscale_delay_s": replicas.upscale_delay_s,
            "downscale_delay_s": replicas.downscale_delay_s,
            "policy": {"policy_function": "vllm_plugins.deploy.autoscaling:by_load"},
        }
    }


def serve_config(settings: DeploySettings) -> dict[str, Any]:
    """Return a configuration for `serve deploy`, which deploys the same application."""
    return {
        # The router listens on a port of its own; Ray Serve's proxies would have no requests.
        "proxy_location": "Disabled",
        "applications": [
            {
                "name": settings.name,
                "route_prefix": None,
                "import_path": IMPORT_PATH,
                "args": settings.model_dump(mode="json", exclude_defaults=True),
            }
        ],
    }
