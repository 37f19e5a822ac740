"""The queue, limits and hostile clients of the router."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import aiohttp
import pytest

from tests.router_backends import MODEL, Fault, answer_tokens, text_of, tokenize
from tests.router_rig import Rig, in_loop, rig
from vllm_plugins.router import listen
from vllm_plugins.routing import Role, State

COMPLETIONS = "/v1/completions"
TOKENS = 100


def body_of(number: int = 0, **fields: Any) -> dict[str, Any]:
    """Return a request whose prompt has 100 tokens; the number makes it another one."""
    prompt = [number + 2] + [7] * (TOKENS - 1)
    return {"model": MODEL, "prompt": prompt, "max_tokens": 3, "temperature": 0, **fields}


def expected(number: int) -> str:
    """Return the answer to `body_of`."""
    return text_of(answer_tokens(body_of(number)["prompt"], 3))


async def queued(router: Rig, role: Role, count: int) -> None:
    """Wait until so many requests are in a queue."""
    while router.services.desk.waiting(role) != count:
        await asyncio.sleep(0.005)


@in_loop
async def test_beyond_an_instances_room_requests_wait_in_order() -> None:
    async with rig(max_prefill_tokens=TOKENS) as router:
        gate = router.prefill[0].gate = asyncio.Semaphore(0)
        asking = []
        for number in range(4):
            asking.append(asyncio.create_task(router.text(body_of(number))))
            await queued(router, Role.PREFILL, number)
            if not number:
                await router.prefill[0].arrived.acquire()
        assert len(router.prefill[0].requests) == 1
        assert await router.metric("queue", role="prefill") == 3
        for _ in range(4):
            gate.release()
        assert await asyncio.gather(*asking) == [expected(number) for number in range(4)]
        order = [body["prompt"][0] - 2 for body in router.prefill[0].bodies]
        assert order == [0, 1, 2, 3]
        assert await router.metric("queue", role="prefill") == 0
        await router.idle()


@in_loop
async def test_beyond_the_queue_requests_are_told_when_to_return() -> None:
    async with rig(max_prefill_tokens=TOKENS, max_queue=1) as router:
        gate = router.prefill[0].gate = asyncio.Semaphore(0)
        asking = [asyncio.create_task(router.text(body_of(0)))]
        await router.prefill[0].arrived.acquire()
        asking.append(asyncio.create_task(router.text(body_of(1))))
        await queued(router, Role.PREFILL, 1)
        async with router.post(body_of(2)) as answer:
            assert answer.status == 503
            assert int(answer.headers["Retry-After"]) >= 1
            error = (await answer.json())["error"]
            assert error["type"] == "ServiceUnavailable"
            assert "full" in error["message"]
        gate.release()
        gate.release()
        assert await asyncio.gather(*asking) == [expected(0), expected(1)]
        assert await router.metric("requests_total", outcome="queue_full") == 1


@in_loop
async def test_a_wait_that_is_too_long_ends() -> None:
    async with rig(max_prefill_tokens=TOKENS, queue_timeout_s=0.05) as router:
        gate = router.prefill[0].gate = asyncio.Semaphore(0)
        asking = asyncio.create_task(router.text(body_of(0)))
        await router.prefill[0].arrived.acquire()
        async with router.post(body_of(1)) as answer:
            assert answer.status == 503
            assert "had room within 0.05 s" in await answer.text()
        assert router.services.desk.waiting(Role.PREFILL) == 0
        gate.release()
        assert await asking == expected(0)
        await router.idle()


@in_loop
async def test_clients_that_leave_the_queue_hold_nobody_up() -> None:
    async with rig(max_prefill_tokens=TOKENS) as router:
        gate = router.prefill[0].gate = asyncio.Semaphore(0)
        asking = []
        for number in range(4):
            asking.append(asyncio.create_task(router.text(body_of(number))))
            await queued(router, Role.PREFILL, number)
        asking[1].cancel()
        asking[2].cancel()
        await queued(router, Role.PREFILL, 1)
        gate.release()
        gate.release()
        assert [await asking[0], await asking[3]] == [expected(0), expected(3)]
        assert len(router.prefill[0].requests) == 2
        await router.idle()


@in_loop
async def test_one_that_an_instance_has_failed_holds_nobody_up_there() -> None:
    async with rig(prefill=2, max_prefill_tokens=TOKENS) as router:
        first, second = router.prefill
        gate = first.gate = asyncio.Semaphore(0)
        second.faults.append(Fault("abort"))
        held = asyncio.create_task(router.text(body_of(0)))
        await first.arrived.acquire()
        # It has failed at the second instance, and waits for the first.
        failed = asyncio.create_task(router.text(body_of(1)))
        await queued(router, Role.PREFILL, 1)
        for number in (2, 3):
            assert await router.text(body_of(number)) == expected(number)
        assert router.services.desk.waiting(Role.PREFILL) == 1
        # But nobody takes the place that it waits for.
        second.gate = asyncio.Semaphore(0)
        later = [asyncio.create_task(router.text(body_of(number))) for number in (4, 5)]
        await queued(router, Role.PREFILL, 2)
        gate.release()
        gate.release()
        assert await asyncio.gather(held, failed) == [expected(0), expected(1)]
        assert [body["prompt"][0] - 2 for body in first.bodies[:2]] == [0, 1]
        for _ in range(2):
            gate.release()
            second.gate.release()
        assert await asyncio.gather(*later) == [expected(4), expected(5)]
        await router.idle()


@in_loop
async def test_decode_takes_no_more_than_its_share_of_kv() -> None:
    async with rig(decode_kv_fraction=0.5) as router:
        instance = router.services.fleet["decode-1"]
        # 100 tokens and 3 of an answer are 7 blocks of 16; half of 20 is room for one.
        instance.capacity = router.services.capacity(20, 16)
        gate = router.decode[0].gate = asyncio.Semaphore(0)
        asking = [asyncio.create_task(router.text(body_of(number))) for number in range(2)]
        await queued(router, Role.DECODE, 1)
        await router.decode[0].arrived.acquire()
        assert len(router.decode[0].requests) == 1
        asking[1].cancel()
        asking[0].cancel()
        await router.idle()
        # Both prompts were held: one by a client that was answered, one by a client that waited.
        while router.prefill[0].held:
            await asyncio.sleep(0.005)
        gate.release()


@in_loop
async def test_bodies_have_a_limit() -> None:
    async with rig(max_body_mib=0.001) as router:
        large = {"prompt": "x" * 2000}
        async with router.post(large) as answer:
            assert answer.status == 413

        async def chunks() -> Any:
            for _ in range(20):
                yield b"x" * 100

        async with router.session.post(router.url + COMPLETIONS, data=chunks()) as answer:
            assert answer.status == 413
        assert await router.metric("requests_total", outcome="too_large") == 2
        assert not router.prefill[0].requests


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'"text"', b"[" * 100_000, b"\xff"])
@in_loop
async def test_what_is_no_request_is_refused(raw: bytes) -> None:
    async with rig() as router:
        async with router.session.post(router.url + COMPLETIONS, data=raw) as answer:
            assert answer.status == 400
            assert "JSON" in (await answer.json())["error"]["message"]
        assert await router.metric("requests_total", outcome="invalid") == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": "false"},
        {"stream": []},
        {"stream_options": "include_usage"},
        {"max_tokens": "3"},
        {"max_completion_tokens": 2.5},
        {"min_tokens": [1]},
    ],
)
@in_loop
async def test_what_an_instance_might_read_in_another_way_is_refused(
    fields: dict[str, Any],
) -> None:
    async with rig(first_token="prefill", fail_threshold=1) as router:
        async with router.post({**body_of(stream=True), **fields}) as answer:
            assert answer.status == 400
            assert next(iter(fields)) in (await answer.json())["error"]["message"]
        assert all(one.state is State.UP for one in router.services.fleet)
        assert await router.metric("requests_total", outcome="invalid") == 1


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@in_loop
async def test_a_limit_with_a_point_is_that_limit(first_token: str) -> None:
    async with rig(first_token=first_token) as router:
        assert await router.text(body_of(stream=True, max_tokens=3.0)) == expected(0)


@in_loop
async def test_compressed_bodies_are_refused() -> None:
    async with rig() as router:
        headers = {"Content-Encoding": "gzip"}
        url = router.url + COMPLETIONS
        async with router.session.post(url, data=b"\x1f\x8b", headers=headers) as answer:
            assert answer.status in (400, 415)
        assert not router.prefill[0].requests


@in_loop
async def test_long_headers_are_refused() -> None:
    async with rig() as router:
        async with router.post(body_of(), headers={"X-Long": "x" * 40_000}) as answer:
            assert answer.status == 400
        assert not router.prefill[0].requests


@in_loop
async def test_slow_headers_cut_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "HEADERS_TIMEOUT_S", 0.1)
    async with rig() as router:
        host, port = router.url.removeprefix("http://").split(":")
        for before in (b"", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(before)
            if before:
                assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            writer.write(b"POST /v1/completions HTTP/1.1\r\nX-Slow: ")
            assert await reader.read() == b""
            writer.close()


@in_loop
async def test_a_long_request_is_not_taken_for_slow_headers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listen, "HEADERS_TIMEOUT_S", 0.05)
    async with rig() as router:
        fake = router.decode[0]
        fake.gate = asyncio.Semaphore(1)
        async with router.post(body_of(stream=True)) as answer:
            await answer.content.readuntil(b"\n\n")
            await asyncio.sleep(0.15)
            for _ in range(4):
                fake.gate.release()
            assert (await answer.read()).endswith(b"data: [DONE]\n\n")


@in_loop
async def test_a_client_that_takes_nothing_of_a_whole_answer_is_cut_off() -> None:
    async with rig(stall_timeout_s=0.2) as router:
        # More than the sockets between them take.
        router.decode[0].first_text = "x" * (32 << 20)
        answer = await router.post(body_of(max_tokens=1))
        while router.connections:
            await asyncio.sleep(0.01)
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()


@in_loop
async def test_a_client_that_takes_a_whole_answer_slowly_gets_it() -> None:
    async with rig(stall_timeout_s=0.3) as router:
        router.decode[0].first_text = "x" * (32 << 20)
        async with router.post(body_of(max_tokens=1)) as answer:
            size = 0
            while part := await answer.content.read(2 << 20):
                size += len(part)
                await asyncio.sleep(0.03)
        assert size > 32 << 20


@in_loop
async def test_connections_have_a_limit() -> None:
    async with rig(max_connections=2) as router:
        host, port = router.url.removeprefix("http://").split(":")
        first = await asyncio.open_connection(host, int(port))
        second = await asyncio.open_connection(host, int(port))
        reader, writer = await asyncio.open_connection(host, int(port))
        assert await reader.read() == b""
        for _, each in (first, second):
            each.close()
        writer.close()
        with_room = None
        while with_room is None:
            with contextlib.suppress(aiohttp.ServerDisconnectedError):
                with_room = await router.text(body_of(5))
        assert with_room == expected(5)


def test_a_prompt_of_the_tests_is_as_long_as_they_say() -> None:
    assert len(body_of(3)["prompt"]) == TOKENS
    assert tokenize("w9 w10") == [9, 10]


@in_loop
async def test_a_prompt_whose_answer_was_lost_is_released_by_the_name_it_was_given() -> None:
    async with rig() as router:
        fake = router.prefill[0]
        fake.peers = ["somewhere"]
        await router.text(body_of())
        # From that answer on the router knows whom to tell.
        fake.faults.append(Fault("hang"))
        asking = asyncio.create_task(router.text(body_of()))
        while len(fake.bodies) < 2:
            await fake.arrived.acquire()
        asking.cancel()
        while not router.released:
            await asyncio.sleep(0.005)
        await router.idle()
        asked = [body["kv_transfer_params"].get("vllm_plugins_pd") for body in fake.bodies]
        assert asked == [None, {"transfer_id": router.released[0]}]
