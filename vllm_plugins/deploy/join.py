"""Runs an instance as a member of a router's fleet, where there is no Ray: in a pod, for example.

    python -m vllm_plugins.deploy.join --router URL --role ROLE --url URL ... -- vllm serve ...

It adds the instance to the router once it is healthy, again after the router has been restarted,
and on SIGTERM takes it out in order: no new requests, those that it has, then itself.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_plugins.deploy.calls import CallError, is_healthy, is_idle
from vllm_plugins.deploy.guarded import GuardedServer
from vllm_plugins.deploy.members import Seen, Step, Verb
from vllm_plugins.deploy.router_admin import RouterAdmin, seen
from vllm_plugins.errors import PluginError
from vllm_plugins.routing import Role, State

logger = logging.getLogger(__name__)

ROUND_S, POLL_S = 2.0, 0.5
STOP_S = 10.0
IDLE_LOOKS = 2


class Membership:
    """One instance's place at the router.

    Args:
        router: Of the fleet.
        url: Base address under which the router reaches the instance.
        role: What it serves.
    """

    def __init__(self, router: RouterAdmin, url: str, role: Role) -> None:
        self._router = router
        self._url = url
        self._role = role
        self._joined = False

    def join(self) -> None:
        """Have the router send requests, if it does not.

        Raises:
            CallError: The router does not answer, or refuses.
        """
        mine = self._mine()
        if mine is None:
            self._take("add")
        elif mine.state is State.DRAINING and not self._joined:
            # Left over from the instance's last life. A later drain is the operator's.
            self._take("resume", mine.id)
        self._joined = True

    def leave(self) -> None:
        """Have the router send no new requests.

        Raises:
            CallError: As `join`; also where no other instance has the role.
        """
        mine = self._mine()
        if mine is not None and mine.state is State.UP:
            self._take("drain", mine.id)

    def forget(self) -> None:
        """Have the router forget the instance.

        Raises:
            CallError: As `leave`.
        """
        mine = self._mine()
        if mine is not None:
            self._take("remove", mine.id)

    def _mine(self) -> Seen | None:
        return next((one for one in seen(self._router.status()) if one.url == self._url), None)

    def _take(self, verb: Verb, name: str = "") -> None:
        self._router.take(Step(verb, self._url, self._role, name))
        logger.info("%s: %s", verb, self._url)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the instance until it ends or SIGTERM comes; return its exit status."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        admin = RouterAdmin(args.router.rstrip("/"), args.admin_key_file)
    except PluginError as error:
        print(f"vllm_plugins.deploy.join: {error}", file=sys.stderr)
        return 2
    url = args.url.rstrip("/")
    membership = Membership(admin, url, Role(args.role))
    server = GuardedServer(args.command, {}, STOP_S)
    _stay(membership, server, url, stopped)
    if server.ended.is_set():
        logger.error("the instance %s", server.reason())
        _try(membership.forget)
        return 1
    _end(membership, server, url, args.drain_s)
    return 0


def _stay(
    membership: Membership, server: GuardedServer, url: str, stopped: threading.Event
) -> None:
    """Return when the instance has ended, or should."""
    while not server.ended.is_set() and not stopped.is_set():
        if is_healthy(url):
            _try(membership.join)
        # Both events end the wait within a round at most.
        stopped.wait(ROUND_S)


def _end(membership: Membership, server: GuardedServer, url: str, drain_s: float) -> None:
    _try(membership.leave)
    deadline, looks = time.monotonic() + drain_s, 0
    while looks < IDLE_LOOKS and time.monotonic() < deadline and not server.ended.is_set():
        looks = looks + 1 if is_idle(url) else 0
        time.sleep(POLL_S)
    _try(membership.forget)
    server.stop()


def _try(act: Callable[[], None]) -> None:
    try:
        act()
    except CallError as error:
        logger.warning("the router: %s", error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_plugins.deploy.join",
        description="Run an instance, and keep it in a router's fleet while it is well.",
    )
    parser.add_argument("--router", required=True, help="base address of the router")
    parser.add_argument("--role", required=True, choices=[role.value for role in Role])
    parser.add_argument(
        "--url", required=True, help="base address under which the router reaches the instance"
    )
    parser.add_argument(
        "--admin-key-file", type=Path, required=True, help="file with the router's operator key"
    )
    parser.add_argument(
        "--drain-s", type=float, default=30.0, help="seconds for its requests to end (default: 30)"
    )
    parser.add_argument("command", nargs="+", help="after --: the instance, `vllm serve ...`")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
