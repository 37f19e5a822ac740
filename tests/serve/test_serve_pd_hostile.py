"""Noise on the wire, and kill -9 of router, prefill and decode with requests in every phase.

At the moment of a kill some requests generate, the pull of some has stalled amid their blocks, some
wait for their pull while their KV is held, and the prompts of some are being computed.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import models
from tests.pd_fleet import LEASE_S, TOKENS_OF_A_BLOCK, Fleet, kill
from tests.pd_scene import (
    PHASES,
    in_every_phase,
    kill_router,
    nothing_of_it_left,
    routed,
    serves_again,
)
from tests.pd_servers import OUTPUT_TOKENS, Pair, post, prompt, stopped, until
from tests.wire_noise import WorkerNoise
from vllm_plugins.kv_connectors.pd.reference import KEY

pytestmark = pytest.mark.serve

# Without a number in the environment, as many of these as there is time for.
FRAMES, FRAMES_S = 10_000, 15.0
ALL_FRAMES = "VLLM_PLUGINS_FUZZ_FRAMES"


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Instances of either role, started when they are first asked for."""
    with contextlib.ExitStack() as stack:
        yield Fleet(models.tiny_llama(), stack)


def test_noise_on_the_wire_costs_nobody_an_answer(fleet):
    """Strangers, and a peer that knows the secret and lies about a prompt that is held."""
    source, reader, _ = fleet.members()
    recomputed = reader.metric("recomputed_total")
    ended = threading.Event()
    pair = Pair(source.server, reader.server)
    with nothing_of_it_left([source, reader]), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(handed_over, pair, ended)
        try:
            bait = pair.prefilled(prompt(300, 99))[KEY]
            noise = WorkerNoise(bait, source.proxy.target, random.Random(0))
            sent = send_noise(noise)
            noise.check_bait()
        finally:
            ended.set()
        answers = asked.result()
        noise.release_bait()
    print(f"{sent} frames while {len(answers)} prompts were handed over")
    assert sent >= 1000 and len(answers) >= 5
    assert source.alive and reader.metric("recomputed_total") == recomputed
    prompts, found = zip(*answers, strict=True)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda tokens: alone(pair, tokens), prompts)) == list(found)


def alone(pair: Pair, tokens: list[int]) -> list[int]:
    """Return what an engine answers that computes the prompt anew."""
    body = pair.body(tokens, OUTPUT_TOKENS, cache_salt="alone")
    return post(pair.decode.url, body)["choices"][0]["token_ids"]


def send_noise(noise: WorkerNoise) -> int:
    """Send frames, and return how many."""
    wanted = int(os.environ.get(ALL_FRAMES, 0))
    deadline = time.monotonic() + FRAMES_S
    sent = 0
    while sent < (wanted or FRAMES) and (wanted or time.monotonic() < deadline):
        noise.send()
        sent += 1
    return sent


def handed_over(pair: Pair, ended: threading.Event) -> list[tuple[list[int], list[int]]]:
    """Hand prompts over until the end, and return them with their answers."""
    found = []
    while not ended.is_set():
        tokens = prompt(200 + len(found) % 90, 1000 + len(found))
        found.append((tokens, pair.decoded(tokens, pair.prefilled(tokens))))
    return found


def test_a_killed_router_leaves_nothing_behind(fleet, tmp_path):
    source, reader, _ = fleet.members()
    survivors = [source, reader]
    with nothing_of_it_left(survivors), routed([source], [reader], tmp_path / "log") as scene:
        with in_every_phase(scene):
            kill_router(scene)
        serves_again(survivors, tmp_path)


def test_kv_that_a_killed_router_kept_for_later_is_freed_by_its_lease(fleet, tmp_path):
    source, reader, _ = fleet.members()
    survivors, expired = [source, reader], source.metric("expired_leases_total")
    # So little that the decode instance is full with one request.
    little = ("--decode-kv-fraction", "0.001")
    log = tmp_path / "log"
    with nothing_of_it_left(survivors), routed([source], [reader], log, *little) as scene:
        scene.ask("held")
        until(lambda: source.metric("held_blocks") == 3 * PHASES["held"][1] / TOKENS_OF_A_BLOCK, 60)
        scene.await_begun(1)
        with stopped(reader.server):
            assert scene.requests_at(reader) == 1
            kill_router(scene)
        until(lambda: source.metric("expired_leases_total") == expired + 3, LEASE_S + 5)
        serves_again(survivors, tmp_path)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_killed_instance_costs_nobody_an_answer(fleet, role, tmp_path):
    victim, second, third = fleet.members()
    prefill, decode = {"prefill": ([victim, second], [third]),
                       "decode": ([second], [victim, third])}[role]  # fmt: skip
    log = tmp_path / "router.log"
    with nothing_of_it_left([second, third]), routed(prefill, decode, log) as scene:
        with in_every_phase(scene, stop_prefill=role == "prefill"):
            traces = kill(victim.server)
        answers = {phase: [one.result() for one in of] for phase, of in scene.answers.items()}
        assert answers == {one: scene.expected(one, second) for one in answers}
        retried = {one: scene.metric("retries_total", role=one) for one in ("prefill", "decode")}
        if role == "prefill":
            # Those that were being computed; what was held, the decode instance computed.
            assert retried["prefill"] and third.metric("recomputed_total") >= 3
        else:
            assert retried["decode"] > scene.metric("resumed_total") >= 1
            assert not retried["prefill"]
    until(lambda: not traces.left(), 15)
