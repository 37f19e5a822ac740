"""A deployment on a real Ray cluster: it serves, survives what is killed, and leaves nothing."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from tests import models
from tests.pd_servers import COMMON, prompt
from tests.ray_rig import NEEDS_RAY, SECONDS, Deployed, alive, busy, deploying, metric, wait_for
from vllm_plugins.deploy.router_admin import seen
from vllm_plugins.routing import Role

pytestmark = [pytest.mark.serve, pytest.mark.slow, NEEDS_RAY]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """One prefill and two decode instances behind a router, on a Ray cluster of this test's."""
    folder = tmp_path_factory.mktemp("deploy")
    with deploying(models.tiny_llama(), folder, ["--decode", "2"], list(COMMON)) as made:
        wait_for(lambda: len(made.up(Role.DECODE)) == 2)
        yield made


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


def test_the_router_gives_one_engines_answers(deployed: Deployed, expected: Any) -> None:
    pulled = "vllm_plugins:pd_pulled_tokens_total"
    before = sum(metric(url, pulled) for url in deployed.up(Role.DECODE))
    under_load(deployed, expected, lambda: None)
    after = sum(metric(url, pulled) for url in deployed.up(Role.DECODE))
    assert after > before


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
