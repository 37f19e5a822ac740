"""The benchmark of KVShare over HTTP: its client, against a server that does as it is told."""

import asyncio
import gc
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("aiohttp", reason="vLLM, which brings aiohttp, is not installed")
from aiohttp import web

from vllm_plugins.bench.errors import ProcessFailedError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import kvshare_served_client as client  # noqa: E402
from kvshare_served_requests import Asked, HangUp, Request  # noqa: E402


def request(*prompt, hang_up=None, **changes):
    return Request(0, Asked(list(prompt) or [1, 2]), 16, hang_up=hang_up, **changes)


def chunk(*tokens, finish=None):
    message = {"choices": [{"text": "", "token_ids": list(tokens), "finish_reason": finish}]}
    return b"data: " + json.dumps(message).encode() + b"\n\n"


async def stream(request, *chunks):
    response = web.StreamResponse()
    await response.prepare(request)
    for one in chunks:
        await response.write(one)
    return response


def exchange(
    handler, requests, *, starts=None, limit=100, patience=20.0, check=lambda: None, then=None
):
    """Let the client talk to a server with this handler."""

    async def talk():
        app = web.Application()
        app.router.add_post("/v1/completions", handler)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        server = SimpleNamespace(url=url, model="m", label="fake", log=Path("no.log"), check=check)
        times = starts or [0.0] * len(requests)
        try:
            outcomes = await client.send_all(server, requests, times, limit, patience)
            if then:
                await then()
            return outcomes
        finally:
            await runner.cleanup()

    return asyncio.run(asyncio.wait_for(talk(), 60))


def test_an_answer_comes_with_its_tokens_and_their_times():
    bodies = []

    async def answer(request):
        bodies.append(await request.json())
        tokens = (chunk(5), chunk(6, 7), chunk(finish="length"), b"data: [DONE]\n\n")
        return await stream(request, *tokens)

    [outcome] = exchange(answer, [request(8, 9)])
    assert bodies == [request(8, 9).body("m")]
    assert (outcome.tokens, outcome.finished, outcome.error) == ([5, 6, 7], True, "")
    assert len(outcome.chunk_s) == 2
    assert outcome.sent_s < outcome.chunk_s[0] <= outcome.chunk_s[1]
    assert outcome.ttft_s == outcome.chunk_s[0] - outcome.sent_s


def test_a_first_message_that_repeats_a_long_prompt_is_read():
    async def answer(request):
        first = {"prompt_token_ids": [123456] * 40_000, "token_ids": [5], "finish_reason": "stop"}
        line = b"data: " + json.dumps({"choices": [first]}).encode() + b"\n\n"
        return await stream(request, line)

    [outcome] = exchange(answer, [request()])
    assert (outcome.tokens, outcome.error) == ([5], "")


@pytest.mark.parametrize(("hang_up", "sent"), [(HangUp(3, math.inf), 3), (HangUp(1, 0.05), 0)])
def test_who_hangs_up_closes_the_connection(hang_up, sent):
    gone = asyncio.Event()

    async def answer(request):
        try:
            await stream(request, *[chunk(7)] * sent)
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            gone.set()
            raise

    # The server learns of it while it still runs, and not by its own end.
    [outcome] = exchange(answer, [request(hang_up=hang_up)], then=gone.wait)
    assert (outcome.tokens, outcome.finished, outcome.error) == ([7] * sent, False, "")


def test_each_way_to_fail_is_told_and_fails_alone():
    async def answer(request):
        [kind] = (await request.json())["prompt"]
        if kind == 0:
            return web.Response(status=400, text="too long")
        if kind == 1:
            return await stream(request, chunk(5), b'data: {"error": {"message": "broke"}}\n\n')
        if kind == 2:
            return await stream(request, chunk(5), b"data: [DONE]\n\n")
        if kind == 3:
            await stream(request, chunk(5))
            request.transport.abort()
            await asyncio.Event().wait()
        if kind == 4:
            await asyncio.Event().wait()
        return await stream(request, chunk(5, finish="stop"))

    outcomes = exchange(answer, [request(kind) for kind in range(6)], patience=1.0)
    errors = [outcome.error for outcome in outcomes]
    assert errors[0] == "HTTP 400: too long"
    assert "broke" in errors[1]
    assert errors[2] == "the stream ended before the answer"
    assert errors[3].startswith(("Client", "Server"))
    assert errors[4] == "no end after 1 s (--request-timeout)"
    assert (errors[5], outcomes[5].tokens) == ("", [5])


def test_no_more_are_under_way_than_the_limit_and_turns_go_in_order():
    seen, now, most = [], 0, 0
    pair = asyncio.Barrier(2)

    async def answer(request):
        nonlocal now, most
        now += 1
        most = max(most, now)
        seen.append((await request.json())["prompt"][0])
        # Nobody is answered alone, so that both turns are taken.
        await pair.wait()
        now -= 1
        return await stream(request, chunk(1, finish="stop"))

    outcomes = exchange(answer, [request(i) for i in range(8)], limit=2)
    assert not any(outcome.error for outcome in outcomes)
    assert most == 2
    assert all(abs(place - number) <= 1 for place, number in enumerate(seen))


def test_each_request_is_sent_at_its_time():
    async def answer(request):
        return await stream(request, chunk(1, finish="stop"))

    outcomes = exchange(answer, [request()] * 3, starts=[0.0, 0.15, 0.3])
    first = outcomes[0].sent_s
    assert all(o.sent_s - first >= t - 0.02 for o, t in zip(outcomes, (0, 0.15, 0.3), strict=True))


def test_a_server_that_dies_ends_the_wait(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(client, "WATCH_S", 0.01)
    log = tmp_path / "log"
    log.write_text("the last words\n")
    asked = []

    def check():
        if asked:
            raise ProcessFailedError("the server died", log)

    async def answer(request):
        asked.append(request)
        await asyncio.Event().wait()

    with pytest.raises(ProcessFailedError, match=r"(?s)the server died.*the last words"):
        exchange(answer, [request(), request()], starts=[0.0, 99.0], check=check)
    gc.collect()
    assert not caplog.records, "asyncio tells of errors that nobody looked at"


def test_a_server_that_refuses_everything_is_a_failure_with_its_reason():
    async def answer(request):
        return web.Response(status=404, text="no such model")

    with pytest.raises(ProcessFailedError, match=r"'fake' failed.*HTTP 404: no such model"):
        exchange(answer, [request(), request()])
