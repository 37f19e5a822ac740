"""What a client sees when instances fail, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from tests.router_backends import Fault, answer_tokens, prompt_of, text_of
from tests.router_rig import Rig, in_loop, rig, stream_chunks
from vllm_plugins.router.watch import Watch
from vllm_plugins.routing import State

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY: dict[str, Any] = {
    "prompt": "a prompt of six whole words",
    "messages": [{"role": "user", "content": "a chat of six whole words"}],
    "max_tokens": 12,
    "temperature": 0,
}
# Of which another instance might say something else.
SAMPLED = BODY | {"temperature": 0.7}
# A connection that is cut, an answer that is none, and errors.
BEFORE = [Fault("abort"), Fault("status", 500), Fault("status", 502), Fault("junk")]


def expected(path: str = COMPLETIONS) -> str:
    """Return the answer's text."""
    return text_of(answer_tokens(prompt_of(path, BODY), 12))


async def error_of(router: Rig, body: dict[str, Any], status: int) -> dict[str, Any]:
    """Return the error that answers a request, which has the form of OpenAI's."""
    async with router.post(body) as answer:
        assert answer.status == status
        error: dict[str, Any] = (await answer.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    await router.idle()
    return error


async def released(router: Rig, count: int) -> None:
    """Wait for so many releases."""
    while len(router.released) < count:
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("fault", BEFORE, ids=str)
@pytest.mark.parametrize("first_token", ["decode", "prefill"])
@in_loop
async def test_another_prefill_instance_is_asked(first_token: str, fault: Fault) -> None:
    async with rig(prefill=2, first_token=first_token) as router:
        router.prefill[0].faults.append(fault)
        assert await router.text({**BODY, "stream": True}) == expected()
        assert [len(fake.requests) for fake in router.prefill] == [1, 1]
        assert await router.metric("retries_total", role="prefill") == 1
        await router.idle()


@in_loop
async def test_a_lone_instance_is_asked_again() -> None:
    async with rig() as router:
        router.prefill[0].faults.append(Fault("abort"))
        router.decode[0].faults.append(Fault("abort"))
        assert await router.text(BODY) == expected()
        assert (len(router.prefill[0].requests), len(router.decode[0].requests)) == (2, 2)


@in_loop
async def test_failures_beyond_the_retries_are_one_error() -> None:
    async with rig(prefill=3, retries=1) as router:
        for fake in router.prefill:
            fake.faults.append(Fault("status", 500))
        error = await error_of(router, BODY, 502)
        assert "answers 500" in error["message"]
        assert sum(len(fake.requests) for fake in router.prefill) == 2
        assert not router.decode[0].requests
        assert await router.metric("requests_total", outcome="failed") == 1


@in_loop
async def test_busy_instances_are_not_sick() -> None:
    async with rig(prefill=2, fail_threshold=1) as router:
        for fake in router.prefill:
            fake.faults.append(Fault("status", 503))
        async with router.post(BODY) as answer:
            assert answer.status == 503
            assert int(answer.headers["Retry-After"]) >= 1
        assert all(one.state is State.UP for one in router.services.fleet)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
@in_loop
async def test_a_refusal_goes_to_the_client_unchanged(stage: str) -> None:
    async with rig(prefill=2, decode=2) as router:
        refusing = router.prefill if stage == "prefill" else router.decode
        for fake in refusing:
            fake.faults.append(Fault("status", 400))
        async with router.post(BODY) as answer:
            assert answer.status == 400
            assert (await answer.json())["error"] == {"message": "scripted 400", "code": 400}
        assert sum(len(fake.requests) for fake in refusing) == 1
        assert await router.metric("requests_total", outcome="rejected") == 1
        if stage == "decode":
            await released(router, 1)
        await router.idle()


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_another_decode_instance_gets_the_same_kv(stream: bool) -> None:
    async with rig(decode=2) as router:
        router.decode[0].faults.append(Fault("abort"))
        assert await router.text({**BODY, "stream": stream}) == expected()
        assert len(router.prefill[0].requests) == 1
        first, second = (fake.bodies[0]["kv_transfer_params"] for fake in router.decode)
        assert first == second
        assert not router.released
        assert await router.metric("retries_total", role="decode") == 1
        await router.idle()


@pytest.mark.parametrize("fault", [Fault("status", 500), Fault("error")], ids=str)
@in_loop
async def test_a_decode_instance_that_may_not_have_got_the_kv_costs_a_prefill(fault: Fault) -> None:
    async with rig(decode=2) as router:
        router.decode[0].faults.append(fault)
        assert await router.text({**BODY, "stream": True}) == expected()
        assert len(router.prefill[0].requests) == 2
        first, second = (fake.bodies[0]["kv_transfer_params"] for fake in router.decode)
        assert first != second
        await released(router, 1)
        assert router.released == [first["vllm_plugins_pd"]["transfer_id"]]


@in_loop
async def test_kv_whose_lease_is_over_is_computed_again() -> None:
    async with rig(decode=2, lease_s=1e-9) as router:
        router.decode[0].faults.append(Fault("abort"))
        gate = router.decode[0].gate = asyncio.Semaphore(0)
        gate.release()
        assert await router.text({**BODY, "stream": True}) == expected()
        assert len(router.prefill[0].requests) == 2


@pytest.mark.parametrize("fault", ["die", "half", "end"])
@in_loop
async def test_a_stream_that_breaks_off_says_so(fault: str) -> None:
    async with rig(decode=2) as router:
        router.decode[0].faults.append(Fault(fault, after=3))
        async with router.post({**SAMPLED, "stream": True}) as answer:
            raw = await answer.read()
        *events, error, done, rest = raw.split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == 502
        texts = [json.loads(event[6:])["choices"][0]["text"] for event in events[:3]]
        assert texts == [text_of([t]) for t in answer_tokens(prompt_of(COMPLETIONS, BODY), 12)[:3]]
        assert len(events) == (4 if fault == "half" else 3)
        assert await router.metric("requests_total", outcome="broken") == 1
        assert not router.decode[1].requests
        await router.idle()


@pytest.mark.parametrize("fault", ["die", "half", "end"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("first_token", ["decode", "prefill"])
@in_loop
async def test_a_stream_with_known_tokens_is_resumed(
    first_token: str, path: str, fault: str
) -> None:
    async with rig(decode=2, first_token=first_token) as router:
        router.decode[0].faults.append(Fault(fault, after=4))
        ids = first_token == "decode"
        body = {**BODY, "stream": True, **({"return_token_ids": True} if ids else {})}
        async with router.post(body, path) as answer:
            chunks = stream_chunks(await answer.read())
        choices = [chunk["choices"][0] for chunk in chunks]
        said = (one.get("text") or one.get("delta", {}).get("content") or "" for one in choices)
        assert "".join(said) == expected(path)
        if ids:
            tokens = [token for one in choices for token in one.get("token_ids") or ()]
            assert tokens == answer_tokens(prompt_of(path, BODY), 12)
        assert len({(chunk["id"], chunk["object"]) for chunk in chunks}) == 1
        assert [one["finish_reason"] for one in choices].count("length") == 1
        resumed = router.decode[1].bodies[0]
        assert "kv_transfer_params" not in resumed
        prompt = prompt_of(path, BODY)
        assert resumed["prompt"][: len(prompt)] == prompt
        assert len(resumed["prompt"]) - len(prompt) + resumed["max_tokens"] == 12
        assert await router.metric("resumed_total") == 1
        await router.idle()


@pytest.mark.parametrize("after", [12, 13])
@in_loop
async def test_an_end_that_is_missing_is_written(after: int) -> None:
    async with rig(decode=2) as router:
        router.decode[0].faults.append(Fault("die", after=after))
        options = {"return_token_ids": True, "stream_options": {"include_usage": True}}
        async with router.post({**BODY, "stream": True, **options}) as answer:
            chunks = stream_chunks(await answer.read())
        # All twelve tokens came; the usage came after the first twelve events, or did not.
        assert [bool(chunk["choices"]) for chunk in chunks] == [True] * 12 + [False]
        assert chunks[-1]["usage"]["completion_tokens"] == 12
        assert not router.decode[1].requests


@in_loop
async def test_a_continued_stream_keeps_the_kv_while_none_has_pulled_it() -> None:
    async with rig(decode=2, first_token="prefill") as router:
        router.decode[0].faults.append(Fault("abort"))
        assert await router.text({**BODY, "stream": True}) == expected()
        first, second = router.decode[0].bodies[0], router.decode[1].bodies[0]
        assert first == second
        assert first["kv_transfer_params"]["do_remote_prefill"]


@in_loop
async def test_a_stream_that_stalls_ends_with_an_error() -> None:
    async with rig(stall_timeout_s=0.1) as router:
        gate = router.decode[0].gate = asyncio.Semaphore(0)
        gate.release()
        async with router.post({**SAMPLED, "stream": True}) as answer:
            raw = await answer.read()
        assert b"sent nothing for 0.1 s" in raw
        await router.idle()
        assert router.decode[0].cancelled == 1


@pytest.mark.parametrize("stage", ["prefill", "decode"])
@in_loop
async def test_a_request_has_a_time_limit(stage: str) -> None:
    async with rig(request_timeout_s=0.15, stall_timeout_s=0.1) as router:
        hanging = (router.prefill if stage == "prefill" else router.decode)[0]
        hanging.faults.append(Fault("hang"))
        error = await error_of(router, BODY, 504)
        assert error["message"] == "no complete answer within 0.15 s"
        await hanging.left.acquire()
        assert hanging.cancelled == 1
        if stage == "decode":
            await released(router, 1)
        assert await router.metric("requests_total", outcome="timeout") == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", ["prefill", "decode"])
@in_loop
async def test_a_client_that_leaves_takes_everything_along(stage: str, stream: bool) -> None:
    async with rig() as router:
        fake = (router.prefill if stage == "prefill" else router.decode)[0]
        fake.faults.append(Fault("hang"))
        asking = asyncio.create_task(router.text({**BODY, "stream": stream}))
        await fake.arrived.acquire()
        asking.cancel()
        await fake.left.acquire()
        await router.idle()
        assert fake.cancelled == 1
        if stage == "decode":
            await released(router, 1)
            assert not router.prefill[0].held
        else:
            assert not router.decode[0].requests
        while await router.metric("requests_total", outcome="disconnected") != 1:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
@in_loop
async def test_a_client_that_leaves_amid_a_stream_stops_decode(first_token: str) -> None:
    async with rig(first_token=first_token) as router:
        fake = router.decode[0]
        fake.gate = asyncio.Semaphore(3)
        async with router.post({**BODY, "stream": True}) as answer:
            for _ in range(3):
                await answer.content.readuntil(b"\n\n")
            answer.close()
        await fake.left.acquire()
        await router.idle()
        assert fake.cancelled == 1
        # It had pulled the KV, so that there is nothing to release.
        assert not router.released


@in_loop
async def test_a_client_that_leaves_after_the_early_token_releases_the_kv() -> None:
    async with rig(first_token="prefill") as router:
        router.decode[0].faults.append(Fault("hang"))
        async with router.post({**BODY, "stream": True}) as answer:
            await answer.content.readuntil(b"\n\n")
            await router.decode[0].arrived.acquire()
            answer.close()
        await router.decode[0].left.acquire()
        await released(router, 1)
        await router.idle()


@in_loop
async def test_a_client_that_takes_nothing_is_cut_off() -> None:
    async with rig(stall_timeout_s=0.2) as router:
        # More than the sockets between them take.
        router.decode[0].first_text = "x" * (32 << 20)
        answer = await router.post({**BODY, "stream": True})
        await router.decode[0].left.acquire()
        await router.idle()
        while await router.metric("requests_total", outcome="disconnected") != 1:
            await asyncio.sleep(0.01)
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()


@in_loop
async def test_an_instance_that_fails_is_left_out_until_it_is_well() -> None:
    async with rig(prefill=2, probe_s=0.01, fail_threshold=2) as router:
        watch, sick = Watch(router.services), router.prefill[0]
        instance = router.services.fleet["prefill-1"]
        sick.healthy = False
        while instance.state is not State.DOWN:
            await watch.probe()
            await asyncio.sleep(0.005)
        for _ in range(4):
            await router.text(BODY)
        assert not sick.requests
        assert await router.metric("up", instance="prefill-1", role="prefill") == 0
        sick.healthy = True
        while instance.state is not State.UP:
            await watch.probe()
            await asyncio.sleep(0.005)
        for _ in range(4):
            await router.text(BODY)
        assert len(sick.requests) == 2


@in_loop
async def test_an_instance_that_hangs_keeps_no_other_unwatched() -> None:
    async with rig(prefill=2, probe_s=0.02, fail_threshold=1, metrics_s=0.02) as router:
        watch = Watch(router.services)
        hanging, failing = router.prefill
        hanging.hangs = True
        failing.healthy = False
        watch.start()
        while router.services.fleet["prefill-2"].state is not State.DOWN:
            await asyncio.sleep(0.005)
        failing.healthy = True
        while router.services.fleet["prefill-2"].state is not State.UP:
            await asyncio.sleep(0.005)
        # Its metrics are asked for once, not anew every time while the answer is out.
        assert hanging.asked_metrics == 1
        await watch.stop()


@in_loop
async def test_failed_requests_count_against_health_like_probes() -> None:
    async with rig(prefill=2, fail_threshold=2) as router:
        router.prefill[0].faults.extend([Fault("abort"), Fault("abort")])
        for _ in range(4):
            assert await router.text(BODY) == expected()
        assert router.services.fleet["prefill-1"].state is State.DOWN


@in_loop
async def test_without_an_instance_there_is_an_answer_at_once() -> None:
    async with rig(fail_threshold=1, retries=0) as router:
        router.decode[0].faults.append(Fault("abort"))
        await error_of(router, BODY, 502)
        async with router.session.get(router.url + "/health") as answer:
            assert answer.status == 503
            assert "decode" in await answer.text()
        async with router.post(BODY) as answer:
            assert answer.status == 503
            assert answer.headers["Retry-After"] == "1"
            assert "no decode instance is up" in await answer.text()
        await released(router, 2)
        await router.idle()


@in_loop
async def test_a_release_that_fails_is_counted_and_harms_nobody() -> None:
    async with rig() as router:
        router.decode[0].faults.append(Fault("status", 400))
        router.services.releaser._secret = b"another"
        async with router.post(BODY) as answer:
            assert answer.status == 400
        while await router.metric("releases_total", outcome="failed") != 1:
            await asyncio.sleep(0.005)
        assert await router.text(BODY) == expected()
