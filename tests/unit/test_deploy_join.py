"""An instance without Ray joins a router's fleet and leaves it in order."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.deploy_rig import (
    HOST,
    INSTANCE,
    KEY,
    fake_instance,
    router_command,
    running,
    states,
    wait_for,
)
from vllm_plugins.deploy.calls import CallError, free_port, is_healthy
from vllm_plugins.deploy.members import Step
from vllm_plugins.deploy.router_admin import RouterAdmin
from vllm_plugins.routing import Role


@pytest.fixture(scope="module")
def first() -> Iterator[tuple[str, str]]:
    """A prefill and a decode instance that stay."""
    with fake_instance() as prefill, fake_instance() as decode:
        yield prefill, decode


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "admin.key"
    path.write_text(KEY)
    return path


def join_command(url: str, router: str, key_file: Path, drain_s: float = 20) -> list[str]:
    words = ["--router", router, "--role", "decode", "--url", url, "--admin-key-file",
             str(key_file), "--drain-s", f"{drain_s:g}", "--"]  # fmt: skip
    instance = [*INSTANCE, url.rsplit(":", 1)[1]]
    return [sys.executable, "-m", "vllm_plugins.deploy.join", *words, *instance]


def test_it_joins_again_after_a_restart_of_the_router_and_leaves_when_idle(
    first: tuple[str, str], key_file: Path
) -> None:
    port = free_port(HOST)
    router, url = f"http://{HOST}:{port}", f"http://{HOST}:{free_port(HOST)}"
    admin = RouterAdmin(router, key_file)
    command = router_command(port, key_file, *first)
    with running(*join_command(url, router, key_file)) as member:
        with running(*command):
            wait_for(lambda: is_healthy(router))
            wait_for(lambda: states(admin).get(url) == "up")
        with running(*command):
            wait_for(lambda: is_healthy(router))
            wait_for(lambda: states(admin).get(url) == "up")
            _set_running(url, 2)
            member.send_signal(signal.SIGTERM)
            wait_for(lambda: states(admin)[url] == "draining")
            assert is_healthy(url)
            _set_running(url, 0)
            assert member.wait(20) == 0
            assert url not in states(admin)
            assert not is_healthy(url)


def instance_of(url: str) -> psutil.Process:
    """Return the process of a fake instance."""
    words = [*INSTANCE, url.rsplit(":", 1)[1]]
    (found,) = [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == words]
    return found


def _set_running(url: str, requests: int) -> None:
    urllib.request.urlopen(urllib.request.Request(f"{url}/running", str(requests).encode()))


def test_an_operators_drain_is_not_undone_and_a_last_lifes_is(
    first: tuple[str, str], key_file: Path
) -> None:
    port = free_port(HOST)
    router, url = f"http://{HOST}:{port}", f"http://{HOST}:{free_port(HOST)}"
    admin = RouterAdmin(router, key_file)
    with running(*router_command(port, key_file, *first)):
        wait_for(lambda: is_healthy(router))
        with running(*join_command(url, router, key_file)) as member:
            wait_for(lambda: states(admin).get(url) == "up")
            (mine,) = [one for one in admin.status()["instances"] if one["url"] == url]
            admin.take(Step("drain", url, Role.DECODE, mine["id"]))
            # Killed, so that it could not tell the router; the router knows it still.
            member.kill()
            member.wait()
            wait_for(lambda: not is_healthy(url))
            assert states(admin)[url] in ("draining", "down")
        with running(*join_command(url, router, key_file)):
            wait_for(lambda: states(admin).get(url) == "up")


def test_an_instance_that_ends_by_itself_is_forgotten(
    first: tuple[str, str], key_file: Path
) -> None:
    port = free_port(HOST)
    router, url = f"http://{HOST}:{port}", f"http://{HOST}:{free_port(HOST)}"
    admin = RouterAdmin(router, key_file)
    with running(*router_command(port, key_file, *first)):
        wait_for(lambda: is_healthy(router))
        with running(*join_command(url, router, key_file)) as member:
            wait_for(lambda: states(admin).get(url) == "up")
            instance_of(url).kill()
            assert member.wait(20) == 1
            wait_for(lambda: url not in states(admin))


def test_a_router_that_does_not_answer_or_refuses(tmp_path: Path, first: tuple[str, str]) -> None:
    key = tmp_path / "key"
    key.write_text(KEY)
    with pytest.raises(CallError):
        RouterAdmin(f"http://{HOST}:{free_port(HOST)}", key).status()
    port = free_port(HOST)
    with running(*router_command(port, key, *first)):
        wait_for(lambda: is_healthy(f"http://{HOST}:{port}"))
        other = tmp_path / "other"
        other.write_text("another-key-that-is-wrong")
        with pytest.raises(CallError, match="403") as refused:
            RouterAdmin(f"http://{HOST}:{port}", other).status()
        assert refused.value.status == 403


def test_without_a_key_it_does_not_start(tmp_path: Path) -> None:
    command = join_command("http://h:1", "http://h:2", tmp_path / "none")
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "cannot be read" in done.stderr
