"""The replica that owns the router keeps its instances those that announce themselves."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.deploy_rig import HOST, fake_instance
from vllm_plugins.deploy import router_replica
from vllm_plugins.deploy.calls import free_port
from vllm_plugins.deploy.router_replica import RouterReplica

SECONDS = 60.0


@pytest.fixture(scope="module")
def instances():
    """A prefill and two decode instances."""
    with ExitStack() as stack:
        yield [stack.enter_context(fake_instance()) for _ in range(3)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One node, whatever Ray says, and quick rounds."""
    monkeypatch.setattr(router_replica, "listen_host", lambda settings: HOST)
    monkeypatch.setattr(router_replica, "ROUND_S", 0.1)


@asynccontextmanager
async def replica(**settings: Any) -> AsyncIterator[RouterReplica]:
    fixed = {"model": "tiny", "port": free_port(HOST), "drain_s": 1, "device": "cpu"}
    made = RouterReplica(fixed | settings)
    try:
        yield made
    finally:
        ending = made.__del__()
        assert ending is not None
        await ending


async def until(condition: Any) -> None:
    """Wait until an asynchronous condition holds."""
    async with asyncio.timeout(SECONDS):
        while not await condition():
            await asyncio.sleep(0.05)


async def states(made: RouterReplica) -> dict[str, str]:
    return {one["url"]: one["state"] for one in (await made.status())["instances"]}


def test_instances_come_drain_and_go(instances: list[str]) -> None:
    prefill, one, two = instances

    async def run() -> None:
        async with replica() as made:
            await made.announce(prefill, "prefill")
            await asyncio.sleep(0.3)
            # No decode instance yet, so nothing that could serve.
            assert not (await made.status())["serves"]
            await made.announce(one, "decode")
            await until(lambda: has(made, {prefill: "up", one: "up"}))
            assert await made.announce(two, "decode") == 0.0
            await until(lambda: has(made, {prefill: "up", one: "up", two: "up"}))
            await made.leave(one)
            await until(lambda: has(made, {prefill: "up", one: "draining", two: "up"}))
            await made.remove(one)
            await until(lambda: has(made, {prefill: "up", two: "up"}))
            # The last one of its role is wanted no more, and the router must keep it until another
            # one has come.
            await made.remove(two)
            await made.announce(one, "decode")
            await until(lambda: has(made, {prefill: "up", one: "up"}))
            await made.check_health()

    asyncio.run(run())


def test_encode_instances_come_and_go_as_others_do(instances: list[str]) -> None:
    prefill, one, two = instances

    async def run() -> None:
        async with replica(encode={"replicas": "1:2"}, decode={"replicas": 0}) as made:
            await made.announce(prefill, "prefill")
            await asyncio.sleep(0.3)
            # Its requests with images would have nobody to go to.
            assert not (await made.status())["serves"]
            await made.announce(one, "encode")
            await until(lambda: has(made, {prefill: "up", one: "up"}))
            await made.announce(two, "encode")
            await until(lambda: has(made, {prefill: "up", one: "up", two: "up"}))
            await made.leave(one)
            await made.remove(one)
            await until(lambda: has(made, {prefill: "up", two: "up"}))
            roles = {entry["url"]: entry["role"] for entry in (await made.status())["instances"]}
            assert roles == {prefill: "prefill", two: "encode"}

    asyncio.run(run())


async def has(made: RouterReplica, wanted: dict[str, str]) -> bool:
    return await states(made) == wanted


def test_a_router_that_dies_is_told_to_ray(instances: list[str]) -> None:
    async def run() -> None:
        async with replica() as made:
            await made.announce(instances[0], "prefill")
            await made.announce(instances[1], "decode")
            await until(lambda: has(made, {instances[0]: "up", instances[1]: "up"}))
            port = (await made.status())["url"].rsplit(":", 1)[1]
            router_of(port).kill()
            async with asyncio.timeout(SECONDS):
                with pytest.raises(RuntimeError, match="the router ended with signal 9"):
                    while True:
                        await made.check_health()
                        await asyncio.sleep(0.05)

    asyncio.run(run())


def router_of(port: str) -> psutil.Process:
    """Return the router's process: the one with the port that is not its guard."""
    (found,) = [
        one
        for one in psutil.process_iter(["cmdline"])
        if {"route", port} <= set(one.info["cmdline"] or [])
        and "vllm_plugins.deploy.guard" not in one.info["cmdline"]
    ]
    return found


def test_its_key_is_its_own_and_goes_with_it(instances: list[str]) -> None:
    async def run() -> Path:
        async with replica() as made:
            key = made._key_file
            assert stat.S_IMODE(key.stat().st_mode) == 0o600
            assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
            return key

    assert not asyncio.run(run()).exists()


def test_a_share_of_the_routers_queue_is_told(
    instances: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with replica() as made:
            up = {"role": "decode", "state": "up"}
            monkeypatch.setattr(made, "_status", {"queues": {"decode": 6}, "instances": [up] * 2})
            assert await made.announce(instances[1], "decode") == 3.0
            assert await made.announce(instances[0], "prefill") == 0.0

    asyncio.run(run())
