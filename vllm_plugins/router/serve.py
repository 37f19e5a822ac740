"""Runs the router until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal

from vllm_plugins.errors import PluginError
from vllm_plugins.router.front import build_runner
from vllm_plugins.router.listen import listen
from vllm_plugins.router.services import Services, build_services
from vllm_plugins.router.settings import RouterSettings
from vllm_plugins.router.startup import check_instances
from vllm_plugins.router.watch import Watch
from vllm_plugins.wire.secret import load_secret

logger = logging.getLogger(__name__)


def run_router(settings: RouterSettings) -> None:
    """Serve until SIGINT or SIGTERM; then answer what was begun, and return.

    Raises:
        PluginError: The settings or the instances do not fit, or the port is taken.
    """
    settings.check()
    path = settings.secret_file
    asyncio.run(_run(settings, None if path is None else load_secret(path)))


async def _run(settings: RouterSettings, secret: bytes | None) -> None:
    services = build_services(settings, secret)
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    watch, runner = Watch(services), build_runner(services)
    try:
        if not await _checked(services, stopped):
            return
        await runner.setup()
        try:
            server = await listen(
                runner,
                settings.host,
                settings.port,
                settings.max_connections,
                settings.stall_timeout_s,
            )
        except OSError as error:
            where = f"--host {settings.host} --port {settings.port}"
            raise PluginError(where, str(error.strerror), "choose another port") from None
        watch.start()
        logger.info("serving on http://%s:%d", settings.host, settings.port)
        await stopped.wait()
        # Whoever comes now is turned away; who is here is served to the end.
        server.close()
    finally:
        await watch.stop()
        await runner.cleanup()
        await services.close()


async def _checked(services: Services, stopped: asyncio.Event) -> bool:
    """Check the instances; return False if told to stop before they answer."""
    checking = asyncio.create_task(check_instances(services))
    stopping = asyncio.create_task(stopped.wait())
    await asyncio.wait((checking, stopping), return_when=asyncio.FIRST_COMPLETED)
    for task in (checking, stopping):
        task.cancel()
    if not stopped.is_set():
        await checking
    return not stopped.is_set()
