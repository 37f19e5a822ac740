"""Checks before the router serves: every instance answers, and all serve the same model."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING

from vllm_plugins.errors import PluginError
from vllm_plugins.router.upstream import InstanceError
from vllm_plugins.routing import Instance, Role

if TYPE_CHECKING:
    from vllm_plugins.router.services import Services

logger = logging.getLogger(__name__)

RETRY_S = 0.5
TIMEOUT_S = 5.0


async def check_instances(services: Services) -> None:
    """Wait until all instances answer, and refuse those that serve different models.

    Raises:
        PluginError: Models differ, or an instance does not answer in time.
    """
    timeout_s = services.settings.start_timeout_s
    url = ""
    try:
        async with asyncio.timeout(timeout_s):
            for instance in services.fleet:
                url = instance.url
                await _check_when_up(services, instance)
    except TimeoutError:
        raise PluginError(
            url, f"no answer within {timeout_s:g} s", "start it, or raise --start-timeout-s"
        ) from None


async def _check_when_up(services: Services, instance: Instance) -> None:
    told = False
    while True:
        try:
            await _check(services, instance)
        except InstanceError as failure:
            if not told:
                logger.warning("waiting for %s: %s", instance.url, failure.reason)
                told = True
            await asyncio.sleep(RETRY_S)
        else:
            return


async def check_model(services: Services, url: str, role: Role) -> None:
    """Refuse an instance that does not answer or serves another model than the fleet.

    Raises:
        PluginError: It does.
    """
    try:
        await _check(services, Instance(url, url, role))
    except InstanceError as failure:
        raise PluginError(url, failure.reason, "start it first") from None


async def _check(services: Services, instance: Instance) -> None:
    body = await services.upstream.get(instance, "/v1/models", TIMEOUT_S, services.own_headers)
    model = _model(instance, body)
    if instance.active is Role.ENCODE:
        # An encoder's own limit says nothing about the prompts that its images are a part of.
        model = (model[0], services.model[1] if services.model else 0)
    if services.model is None:
        services.model = model
    if services.model != model:
        raise PluginError(
            instance.url,
            f"serves {model[0]!r:.100} with max_model_len {model[1]}, others "
            f"{services.model[0]!r:.100} with {services.model[1]}",
            "start all instances with the same --model, --served-model-name and --max-model-len",
        )


def _model(instance: Instance, body: bytes) -> tuple[str, int]:
    try:
        first = json.loads(body)["data"][0]
        return str(first["id"]), int(first.get("max_model_len") or 0)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InstanceError(instance, "/v1/models is no list of models") from None
