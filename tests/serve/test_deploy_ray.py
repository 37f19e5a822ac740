"""A deployment on a real Ray cluster: it serves, survives what is killed, and leaves nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from tests import models
from tests.pd_servers import COMMON, prompt
from tests.serving import SERVE_DEFAULTS
from vllm_plugins.deploy.calls import CallError, free_port
from vllm_plugins.deploy.router_admin import RouterAdmin, seen
from vllm_plugins.routing import Role

pytestmark = [
    pytest.mark.serve,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="ray is not installed: pip install 'ray[serve]'",
    ),
]

HOST = "127.0.0.1"
OUTPUT_TOKENS = 120
SECONDS = 240.0


@dataclass
class Deployed:
    """A running `vllm-plugins deploy`."""

    process: subprocess.Popen[bytes]
    admin: RouterAdmin
    url: str
    model: str
    started: dict[int, psutil.Process]

    def up(self, role: Role) -> list[str]:
        """Return the addresses of the instances of a role that get requests."""
        return [
            one.url for one in seen(self.admin.status()) if one.role is role and one.state == "up"
        ]

    def note_processes(self) -> None:
        """Remember all processes that belong to the deployment now."""
        # Ray's and vLLM's processes write their titles over the environment that would tell; they
        # are below others. Guards are below nobody.
        for one in psutil.process_iter(["environ"]):
            if (one.info["environ"] or {}).get("DEPLOY_TEST") == str(os.getpid()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.started |= {p.pid: p for p in [one, *one.children(recursive=True)]}

    def server_of(self, url: str) -> psutil.Process:
        """Return the leading process of an instance."""
        port = url.rsplit(":", 1)[1]
        (found,) = [
            one
            for one in psutil.process_iter(["cmdline"])
            if {"serve", "--port", port} <= set(one.info["cmdline"] or [])
            and "vllm_plugins.deploy.guard" not in one.info["cmdline"]
        ]
        return found

    def tokens(self, url: str, tokens: list[int], stream: bool) -> list[int]:
        """Ask for an answer, and return its tokens."""
        body = {
            "model": self.model, "prompt": tokens, "max_tokens": OUTPUT_TOKENS, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True, "stream": stream,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            text = answer.read().decode()
        if not stream:
            return json.loads(text)["choices"][0]["token_ids"]
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert lines[-1] == "[DONE]"
        chunks = [json.loads(line) for line in lines[:-1]]
        return [t for chunk in chunks for one in chunk["choices"] for t in one["token_ids"] or []]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """One prefill and two decode instances behind a router, on a Ray cluster of this test's."""
    folder = tmp_path_factory.mktemp("deploy")
    key = folder / "admin.key"
    key.write_text("0123456789abcdef")
    model, port = str(models.tiny_llama()), free_port(HOST)
    command = [
        sys.executable, "-m", "vllm_plugins.cli.main", "deploy", "--ray", model, "--address",
        "local", "--device", "cpu", "--num-cpus", "0.1", "--decode", "2", "--port", str(port),
        "--admin-key-file", str(key), "--drain-s", "20", "--router-args", "--probe-s 0.2",
        "--serve-args", " ".join((*SERVE_DEFAULTS, *COMMON)),
    ]  # fmt: skip
    log = folder / "deploy.log"
    url = f"http://{HOST}:{port}"
    # Short, as Ray's sockets lie below it.
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short,
        log.open("wb") as stream,
    ):
        own = {"DEPLOY_TEST": str(os.getpid()), "RAY_TMPDIR": short, "RAY_USAGE_STATS_ENABLED": "0"}
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=os.environ | own, start_new_session=True
        )
        made = Deployed(process, RouterAdmin(url, key), url, model, {})
        with ended(made):
            wait_for(lambda: "serving on" in log.read_text() or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            wait_for(lambda: len(made.up(Role.DECODE)) == 2)
            yield made


@contextlib.contextmanager
def ended(made: Deployed) -> Iterator[None]:
    """Leave no process, whatever happens in the block."""
    try:
        yield
    finally:
        made.note_processes()
        for one in [made.process, *made.started.values()]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                one.kill()
        made.process.wait()


def wait_for(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    """Wait until something holds; what cannot be asked yet does not hold."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(CallError):
            if condition():
                return
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def expected(deployed: Deployed) -> list[tuple[list[int], list[int]]]:
    """Prompts, and what one engine alone says to each."""
    (engine, _) = deployed.up(Role.DECODE)
    prompts = [prompt(100 + 20 * i, i) for i in range(8)]
    return [(tokens, deployed.tokens(engine, tokens, False)) for tokens in prompts]


def under_load(
    deployed: Deployed, expected: list[tuple[list[int], list[int]]], act: Callable[[], Any]
) -> None:
    """Do something while eight requests are being answered, every other one streamed."""
    begun = threading.Barrier(len(expected) + 1)

    def ask(number: int) -> list[int]:
        begun.wait()
        return deployed.tokens(deployed.url, expected[number][0], stream=number % 2 == 1)

    with ThreadPoolExecutor(len(expected)) as pool:
        answers = [pool.submit(ask, number) for number in range(len(expected))]
        begun.wait()
        act()
        assert [one.result() for one in answers] == [answer for _, answer in expected]


def busy(deployed: Deployed, url: str, requests: int) -> Callable[[], bool]:
    """Return whether an instance has so many requests, by what the router sent."""

    def has_them() -> bool:
        shown = deployed.admin.status()["instances"]
        return any(one["url"] == url and one["requests"] >= requests for one in shown)

    return has_them


def test_the_router_gives_one_engines_answers(deployed: Deployed, expected: Any) -> None:
    pulled = "vllm_plugins:pd_pulled_tokens_total"
    before = sum(metric(url, pulled) for url in deployed.up(Role.DECODE))
    under_load(deployed, expected, lambda: None)
    after = sum(metric(url, pulled) for url in deployed.up(Role.DECODE))
    assert after > before


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_a_decode_instance_that_is_killed_costs_nobody_an_answer(
    deployed: Deployed, expected: Any
) -> None:
    victim, other = deployed.up(Role.DECODE)
    server = deployed.server_of(victim)
    deployed.note_processes()

    def kill() -> None:
        wait_for(busy(deployed, victim, 2))
        os.killpg(server.pid, signal.SIGKILL)

    under_load(deployed, expected, kill)
    # The router lets go of it, Ray starts another one, and that one gets requests.
    wait_for(lambda: victim not in [one.url for one in seen(deployed.admin.status())])
    wait_for(lambda: len(deployed.up(Role.DECODE)) == 2)
    assert other in deployed.up(Role.DECODE)
    (new,) = set(deployed.up(Role.DECODE)) - {other}
    assert deployed.tokens(new, expected[0][0], False) == expected[0][1]


def test_a_router_that_is_killed_comes_back_with_its_instances(
    deployed: Deployed, expected: Any
) -> None:
    before = set(deployed.up(Role.DECODE))
    (router,) = [
        one for one in psutil.process_iter(["cmdline"])
        if {"route", "--port", deployed.url.rsplit(":", 1)[1]} <= set(one.info["cmdline"] or [])
        and "vllm_plugins.deploy.guard" not in one.info["cmdline"]
    ]  # fmt: skip
    deployed.note_processes()
    router.kill()
    router.wait(10)
    wait_for(lambda: set(deployed.up(Role.DECODE)) == before)
    assert deployed.tokens(deployed.url, expected[0][0], True) == expected[0][1]


def test_an_engine_ends_with_a_replica_that_is_killed(deployed: Deployed) -> None:
    deployed.note_processes()
    engines = [deployed.server_of(url) for url in deployed.up(Role.DECODE)]
    processes = [[one, *one.children(recursive=True)] for one in engines]
    (replica, *_) = [
        one
        for one in deployed.started.values()
        if alive(one) and "ServeReplica:vllm-plugins:decode" in " ".join(one.cmdline())
    ]
    replica.kill()
    wait_for(lambda: any(not any(map(alive, some)) for some in processes), 30)


def test_a_deployment_that_is_ended_answers_what_it_has_begun_and_leaves_no_process(
    deployed: Deployed, expected: Any
) -> None:
    """Last, and while an instance is starting: the deployment does not come back."""
    wait_for(lambda: len(deployed.up(Role.DECODE)) == 1)
    deployed.note_processes()

    def end() -> None:
        wait_for(busy(deployed, deployed.up(Role.DECODE)[0], 4))
        deployed.process.send_signal(signal.SIGTERM)
        deployed.note_processes()

    under_load(deployed, expected, end)
    assert deployed.process.wait(SECONDS) == 0
    wait_for(lambda: not any(map(alive, deployed.started.values())), 30)


def alive(process: psutil.Process) -> bool:
    """Return whether a process runs."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
