"""A router in front of fake instances, in the test's loop."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from tests.router_backends import MODEL, FakeInstance
from vllm_plugins.router.front import build_runner
from vllm_plugins.router.listen import listen
from vllm_plugins.router.services import Services, build_services
from vllm_plugins.router.settings import RouterSettings

DEADLINE_S = 30.0
SECRET = b"s" * 32


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an asynchronous test in a loop of its own, and not for ever."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), DEADLINE_S))

    return run


@dataclass
class Rig:
    """A router with its fake instances.

    Attributes:
        prefill: Fakes that compute prompts.
        decode: Fakes that answer.
        services: The router's parts.
        url: Of the router.
        session: A client's connections.
        released: Transfers that the router has released, in order.
        runner: The router's server.
    """

    prefill: list[FakeInstance]
    decode: list[FakeInstance]
    encode: list[FakeInstance]
    services: Services
    url: str
    session: aiohttp.ClientSession
    runner: web.AppRunner
    released: list[str] = field(default_factory=list)

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        assert self.runner.server is not None
        return len(self.runner.server.connections)

    def post(self, body: Mapping[str, Any], path: str = "/v1/completions", **kwargs: Any) -> Any:
        """Send a request to the router."""
        return self.session.post(self.url + path, json={"model": MODEL, **body}, **kwargs)

    async def text(self, body: Mapping[str, Any], path: str = "/v1/completions") -> str:
        """Return the text of an answer, streamed or not."""
        async with self.post(body, path) as answer:
            assert answer.status == 200, await answer.text()
            if body.get("stream"):
                return stream_text(await answer.read())
            choice = (await answer.json())["choices"][0]
            return str(choice["message"]["content"] if "message" in choice else choice["text"])

    async def metric(self, name: str, **labels: str) -> float:
        """Return a value of the router's own metrics."""
        async with self.session.get(self.url + "/metrics") as answer:
            lines = (await answer.text()).splitlines()
        wanted = "{" + ",".join(f'{key}="{labels[key]}"' for key in sorted(labels)) + "}"
        start = f"vllm_plugins:router_{name}{wanted if labels else ''} "
        return sum(float(line.split()[-1]) for line in lines if line.startswith(start))

    async def idle(self) -> None:
        """Wait until nothing is open or held any more, and check that every ledger is at zero."""
        fakes = [*self.prefill, *self.decode, *self.encode]
        while any(fake.active for fake in fakes) or any(self._open()) or self.services.held:
            await asyncio.sleep(0.005)
        for instance in self.services.fleet:
            load = self.services.ledger.load(instance)
            assert (load.requests, load.prefill_tokens, load.kv_blocks, load.kv_blocks_in_use,
                    load.encoder_tokens) == (0, 0, 0, 0, 0)  # fmt: skip

    def _open(self) -> list[int]:
        return [self.services.ledger.load(one).requests for one in self.services.fleet]


@asynccontextmanager
async def rig(
    prefill: int = 1, decode: int = 1, encode: int = 0, **settings: Any
) -> AsyncIterator[Rig]:
    """Start fakes and a router in front of them; neither probes nor scrapes run by themselves."""
    fakes = {
        role: [FakeInstance(role) for _ in range(count)]
        for role, count in (("prefill", prefill), ("decode", decode), ("encode", encode))
    }
    for fake in itertools.chain(*fakes.values()):
        await fake.start()
    urls = {role: tuple(fake.url for fake in some) for role, some in fakes.items()}
    chosen = RouterSettings(**urls, **{"connect_timeout_s": 2.0, "drain_s": 0.2, **settings})
    released: list[str] = []

    def release(transfer: Mapping[str, Any], secret: bytes | None) -> None:
        name = transfer["vllm_plugins_pd"]["transfer_id"]
        assert secret == SECRET
        for fake in fakes["prefill"]:
            fake.held.discard(name)
        released.append(name)

    services = build_services(chosen, SECRET, release)
    runner = build_runner(services)
    await runner.setup()
    limits = chosen.max_connections, chosen.stall_timeout_s
    server = await listen(runner, "127.0.0.1", 0, *limits)
    host, port = server.sockets[0].getsockname()
    async with aiohttp.ClientSession() as session:
        try:
            yield Rig(**fakes, services=services, url=f"http://{host}:{port}", session=session,
                      runner=runner, released=released)  # fmt: skip
        finally:
            server.close()
            await runner.cleanup()
            await services.close()
            for fake in itertools.chain(*fakes.values()):
                await fake.stop()


def note_transfers(router: Rig) -> set[str]:
    """Return the transfers of which the router gets to know, as they come."""
    received: set[str] = set()
    post_json = router.services.upstream.post_json

    async def noting(*args: Any) -> dict[str, Any]:
        answer = await post_json(*args)
        if "kv_transfer_params" in answer:
            received.add(answer["kv_transfer_params"]["vllm_plugins_pd"]["transfer_id"])
        return answer

    router.services.upstream.post_json = noting  # type: ignore[method-assign]
    return received


def stream_chunks(raw: bytes) -> list[dict[str, Any]]:
    """Return the objects of a stream, which must be whole and end as a stream does."""
    *events, last, rest = raw.split(b"\n\n")
    assert rest == b""
    assert last == b"data: [DONE]"
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def stream_text(raw: bytes) -> str:
    """Return the text of a stream."""
    text = ""
    for chunk in stream_chunks(raw):
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
    return text
