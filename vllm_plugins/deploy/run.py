"""Deploys an application on a Ray cluster and stays with it until told to stop."""

from __future__ import annotations

import functools
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from vllm_plugins.deploy.arguments import WHERE
from vllm_plugins.deploy.settings import DeploySettings
from vllm_plugins.errors import PluginError

POLL_S = 0.5
# From the last instance's start to a router that serves.
ROUTER_READY_S = 60.0
KNOCK_S = 5.0


def require_ray() -> None:
    """Refuse where Ray Serve is not installed.

    Raises:
        PluginError: It is not.
    """
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise PluginError(
            "vllm-plugins deploy --ray",
            f"Ray Serve cannot be imported: {error}",
            "pip install 'ray[serve]' on every node",
        ) from None


def deploy(settings: DeploySettings, address: str, detach: bool) -> None:
    """Deploy, wait until the router serves, and unless detached, until SIGINT or SIGTERM.

    Args:
        settings: Of the deployment.
        address: Of the Ray cluster; ``local`` starts one that ends with this process.
        detach: Leave it running and return.

    Raises:
        PluginError: There is no cluster, or the application does not start.
    """
    with _connected(address), _until_told() as stopped:
        from ray import serve

        serve.start(proxy_location="Disabled")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            url = _start(settings, stopped)
            if url and not detach:
                print(f"serving on {url}; Ctrl-C ends it", flush=True)
                stopped.wait()
            elif url:
                print(f"serving on {url}; `serve shutdown` ends it", flush=True)
                return
        except BaseException:
            serve.delete(settings.name)
            raise
        serve.delete(settings.name)


def _start(settings: DeploySettings, stopped: threading.Event) -> str:
    """Return the router's address, once it serves; empty if told to stop before."""
    from ray import serve

    from vllm_plugins.deploy.application import build

    app = build(settings.model_dump(mode="json"))
    # In a thread, as it blocks until all instances have loaded the model.
    starting: Future[Any] = Future()
    run = functools.partial(serve.run, app, name=settings.name, route_prefix=None)
    threading.Thread(target=_fulfil, args=(starting, run), daemon=True).start()
    said = ""
    while not starting.done():
        if stopped.wait(POLL_S):
            return ""
        now = _progress(settings.name)
        if now != said:
            print(now, file=sys.stderr, flush=True)
        said = now
    try:
        handle = starting.result()
    except RuntimeError as error:
        mend = "mend that; the replicas' logs are in Ray's dashboard"
        raise PluginError(WHERE, _failure(settings.name) or str(error), mend) from None
    return _await_router(handle, stopped)


def _fulfil(future: Future[Any], act: Callable[[], Any]) -> None:
    try:
        future.set_result(act())
    except BaseException as error:
        future.set_exception(error)


def _progress(name: str) -> str:
    """Return how many replicas each deployment has in which state, in one line."""
    from ray import serve

    application = serve.status().applications.get(name)
    deployments = application.deployments if application else {}
    return "; ".join(
        f"{role}: " + ", ".join(f"{n} {state.lower()}" for state, n in one.replica_states.items())
        for role, one in sorted(deployments.items())
    )


def _failure(name: str) -> str:
    """Return why deployments have failed: the last line that each one's server has printed."""
    from ray import serve
    from ray.serve.schema import DeploymentStatus

    application = serve.status().applications.get(name)
    deployments = application.deployments if application else {}
    return "; ".join(
        f"{role}: {one.message.strip().splitlines()[-1]}"
        for role, one in deployments.items()
        if one.status is DeploymentStatus.DEPLOY_FAILED and one.message.strip()
    )


def _await_router(handle: Any, stopped: threading.Event) -> str:
    deadline = time.monotonic() + ROUTER_READY_S
    while not stopped.wait(POLL_S):
        status = handle.status.remote().result(timeout_s=ROUTER_READY_S)
        if status["serves"]:
            return str(status["url"])
        if time.monotonic() > deadline:
            raise PluginError(
                WHERE, f"the router does not serve on {status['url']}", "see its replica's log"
            )
    return ""


@contextmanager
def _connected(address: str) -> Iterator[None]:
    import ray

    mend = "start one with `ray start --head`, or name --address local"
    try:
        _knock(address)
        ray.init(
            address=None if address == "local" else address,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise PluginError(f"--address {address}", f"no Ray cluster: {reason}", mend) from None
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Connect to an address that names host and port; Ray itself would try for many minutes.

    Raises:
        OSError: Nobody listens there.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), KNOCK_S).close()


@contextmanager
def _until_told() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set."""
    stopped = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stopped.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
