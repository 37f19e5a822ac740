"""A real router and fake instances, each in a process of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vllm_plugins.deploy.calls import free_port, is_healthy
from vllm_plugins.deploy.router_admin import RouterAdmin, seen

KEY = "0123456789abcdef"
HOST = "127.0.0.1"
INSTANCE = (sys.executable, "-m", "tests.deploy_instance")
ROOT = Path(__file__).resolve().parent.parent


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.05)


@contextlib.contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command that is ended with the block, if it has not ended."""
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


@contextlib.contextmanager
def fake_instance() -> Iterator[str]:
    """Run a fake instance and give its address once it answers."""
    port = free_port(HOST)
    with running(*INSTANCE, str(port)):
        url = f"http://{HOST}:{port}"
        wait_for(lambda: is_healthy(url))
        yield url


def router_command(port: int, key_file: Path, prefill: str, decode: str) -> list[str]:
    """Return the command of a router that notices at once who is down."""
    return [
        sys.executable, "-m", "vllm_plugins.cli.main", "route", "--port", str(port),
        "--admin-key-file", str(key_file), "--probe-s", "0.1", "--prefill", prefill,
        "--decode", decode, "--drain-s", "1",
    ]  # fmt: skip


def states(admin: RouterAdmin) -> dict[str, str]:
    """Return the state of each instance at a router, by address."""
    return {one.url: str(one.state) for one in seen(admin.status())}
