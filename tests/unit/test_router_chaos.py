"""Random faults, aborts and fields, many at a time: a right answer or an error, and no trace."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import aiohttp
import pytest

from tests.router_backends import MODEL, FakeInstance, Fault, answer_tokens, prompt_of, text_of
from tests.router_rig import Rig, in_loop, note_transfers, rig, stream_text
from vllm_plugins.routing import Role

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KINDS = ("abort", "status", "junk", "die", "half", "end", "error", "hang")
REQUESTS, AT_A_TIME = 160, 16


def script(fake: FakeInstance, dice: random.Random) -> None:
    """Let a third of an instance's requests fail, each in some way."""
    for _ in range(REQUESTS):
        kind = dice.choice(KINDS) if dice.random() < 0.33 else "none"
        fault = Fault(kind, dice.choice([400, 429, 500, 502, 503]), dice.randrange(8))
        fake.faults.append(fault)


def request_of(number: int, dice: random.Random) -> tuple[str, dict[str, Any]]:
    """Return some request and its route."""
    path = dice.choice([CHAT, COMPLETIONS])
    said = f"w{number + 2} some words of a prompt"
    body: dict[str, Any] = {"model": MODEL, "max_tokens": dice.randrange(1, 9), "temperature": 0}
    body |= {"prompt": said} if path == COMPLETIONS else {}
    body |= {"messages": [{"role": "user", "content": said}]} if path == CHAT else {}
    body["stream"] = dice.random() < 0.7
    for field, value in (("return_token_ids", True), ("n", 1), ("presence_penalty", 1.0)):
        if dice.random() < 0.3:
            body[field] = value
    return path, body


async def ask(router: Rig, path: str, body: dict[str, Any], patience_s: float) -> str:
    """Send a request, leave when the patience is over, and return how it ended."""
    expected = text_of(answer_tokens(prompt_of(path, body), body["max_tokens"]))
    try:
        async with asyncio.timeout(patience_s), router.post(body, path) as answer:
            raw = await answer.read()
    except TimeoutError:
        return "left"
    if answer.status != 200:
        assert answer.status in (400, 502, 503, 504), answer.status
        assert b'"error"' in raw
        return "error"
    if not body["stream"]:
        choice = (await answer.json())["choices"][0]
        said = choice["message"]["content"] if path == CHAT else choice["text"]
        assert said == expected
        return "answered"
    if b'data: {"error"' in raw:
        assert raw.endswith(b"data: [DONE]\n\n")
        return "broken"
    assert stream_text(raw) == expected
    return "answered"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", ["decode", "prefill", "layers"])
@in_loop
async def test_whatever_happens_nothing_stays(mode: str, seed: int) -> None:
    way = {"stream_layers": True} if mode == "layers" else {"first_token": mode}
    dice = random.Random(seed)
    limits = {"request_timeout_s": 0.6, "stall_timeout_s": 0.3, "max_prefill_tokens": 40}
    async with rig(prefill=2, decode=3, fail_threshold=10**6, **way, **limits) as router:
        received = note_transfers(router)
        for fake in router.prefill:
            fake.peers = ["a worker"]
        for fake in (*router.prefill, *router.decode):
            script(fake, dice)
        places = asyncio.Semaphore(AT_A_TIME)

        async def one(number: int) -> str:
            path, body = request_of(number, dice)
            patience_s = dice.choice([0.01, 0.05, 10.0, 10.0])
            async with places:
                return await ask(router, path, body, patience_s)

        ends = await asyncio.gather(*(one(number) for number in range(REQUESTS)))
        assert {"answered", "error", "left"} <= set(ends)
        await router.idle()
        for role in Role:
            assert router.services.desk.waiting(role) == 0
        # What is held and was neither pulled nor released would wait for its lease to end. That
        # must happen only where the router cannot know of it: the answer was under way when its
        # client left.
        taken = set[str]().union(*(fake.handed_over for fake in router.decode))
        for fake in router.prefill:
            while (fake.held & received) - taken:
                await asyncio.sleep(0.01)
        counted = sum(
            [await router.metric("requests_total", outcome=outcome) for outcome in
             ("complete", "rejected", "failed", "broken", "timeout", "disconnected")]
        )  # fmt: skip
        # Some left before their request was on its way.
        assert REQUESTS - ends.count("left") <= counted <= REQUESTS


@in_loop
async def test_noise_instead_of_http_harms_nobody() -> None:
    dice = random.Random(7)
    async with rig() as router:
        host, port = router.url.removeprefix("http://").split(":")
        for _ in range(200):
            reader, writer = await asyncio.open_connection(host, int(port))
            noise = dice.randbytes(dice.randrange(1, 400))
            start = dice.choice([b"", b"POST /v1/completions HTTP/1.1\r\n", b"GET / HTTP/1.1\r\n"])
            writer.write(start + noise)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
                writer.write_eof()
                await reader.read()
            writer.close()
        body = {"prompt": "a b", "max_tokens": 3}
        assert await router.text(body) == text_of(answer_tokens(prompt_of(COMPLETIONS, body), 3))
        assert isinstance(router.session, aiohttp.ClientSession)
        await router.idle()
