"""The operator's routes: instances come, drain and go; the status page; the router's metrics."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.router_backends import (
    MAX_MODEL_LEN,
    MODEL,
    FakeInstance,
    answer_tokens,
    prompt_of,
    text_of,
)
from tests.router_rig import in_loop, rig
from vllm_plugins.errors import PluginError
from vllm_plugins.router.observed import parse_metrics
from vllm_plugins.router.startup import check_instances
from vllm_plugins.router.watch import Watch
from vllm_plugins.routing import Role

BODY: dict[str, Any] = {"prompt": "some words to begin with", "max_tokens": 5, "temperature": 0}
EXPECTED = text_of(answer_tokens(prompt_of("/v1/completions", BODY), 5))
CHAT = "/v1/chat/completions"
IMAGES = [
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{name}"}}
    for name in ("aaaa", "bbbb")
]
WITH_IMAGES: dict[str, Any] = {
    "messages": [{"role": "user", "content": IMAGES}],
    "max_tokens": 1,
    "temperature": 0,
}
KEY = "an operator's key of many characters"
METRICS = """\
# HELP vllm:num_requests_running Number of requests.
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
vllm:cache_config_info{block_size="32",engine="0",hash_block_size="8",num_gpu_blocks="100"} 1.0
vllm:cache_config_info{block_size="32",engine="1",num_gpu_blocks="100"} 1.0
vllm_plugins:pd_held_blocks{engine="0",model_name="m"} 7.0
"""


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """A file with the operator's key."""
    path = tmp_path / "key"
    path.write_text(KEY + "\n")
    return path


@in_loop
async def test_instances_come_and_go_under_load() -> None:
    async with rig() as router:
        stop = asyncio.Event()

        async def load() -> int:
            served = 0
            while not stop.is_set():
                assert await router.text({**BODY, "stream": True}) == EXPECTED
                served += 1
            return served

        loads = [asyncio.create_task(load()) for _ in range(8)]
        await check_instances(router.services)
        fresh = FakeInstance("decode")
        await fresh.start()
        try:
            wanted = {"url": fresh.url + "/", "role": "decode"}
            async with router.session.post(router.url + "/instances", json=wanted) as answer:
                assert answer.status == 201
                assert (await answer.json())["id"] == "decode-2"
            await fresh.arrived.acquire()
            async with router.session.post(router.url + "/instances/decode-1/drain") as answer:
                assert (await answer.json())["state"] == "draining"
            old = router.decode[0]
            while old.active:
                await asyncio.sleep(0.005)
            before = len(old.requests)
            await fresh.arrived.acquire()
            async with router.session.delete(router.url + "/instances/decode-1") as answer:
                assert (await answer.json())["state"] == "removed"
            for _ in range(3):
                await fresh.arrived.acquire()
            assert len(old.requests) == before
            stop.set()
            assert all(await asyncio.gather(*loads))
            async with router.session.get(router.url + "/instances") as answer:
                shown = (await answer.json())["instances"]
            assert [one["id"] for one in shown] == ["prefill-1", "decode-2"]
            await router.idle()
        finally:
            await fresh.stop()


@pytest.mark.parametrize("before", [True, False], ids=["after its answer", "during it"])
@in_loop
async def test_nothing_is_kept_of_an_instance_that_has_left(before: bool) -> None:
    async with rig(prefill=2, encode=2) as router:
        services, prefill, encode = router.services, router.prefill[0], router.encode[0]
        prefill.peers = ["somewhere"]
        if not before:
            prefill.gate, encode.gate = asyncio.Semaphore(0), asyncio.Semaphore(0)
        asking = asyncio.gather(router.text(BODY), router.text(WITH_IMAGES, CHAT))
        await prefill.arrived.acquire()
        await encode.arrived.acquire()
        if before:
            await asking
            assert services.releaser.name("prefill-1") is not None
            assert "encode-1" in services.doors
        services.forget("prefill-1")
        services.forget("encode-1")
        for gate in (prefill.gate, encode.gate):
            for _ in range(9 if gate else 0):
                gate.release()
        await asking
        assert services.releaser.name("prefill-1") is None
        assert "encode-1" not in services.doors


@in_loop
async def test_an_order_that_comes_in_two_parts_is_carried_out() -> None:
    async with rig(decode=2) as router:
        url = router.decode[1].url.replace("127.0.0.1", "localhost")
        body = json.dumps({"url": url, "role": "decode"}).encode()

        async def parts() -> AsyncIterator[bytes]:
            yield body[:9]
            await asyncio.sleep(0.05)
            yield body[9:]

        async with router.session.post(router.url + "/instances", data=parts()) as answer:
            assert answer.status == 201, await answer.text()
        async with router.session.post(router.url + "/instances", data=b" " * 2**21) as answer:
            assert answer.status == 413


@in_loop
async def test_orders_that_cannot_be_carried_out() -> None:
    async with rig() as router:
        url = router.url + "/instances"
        async with router.session.post(url + "/decode-1/drain") as answer:
            assert answer.status == 409
            assert "0 of role decode would be left" in await answer.text()
        async with router.session.delete(url + "/nobody") as answer:
            assert answer.status == 404
        for wanted, said in (
            ({"url": "ftp://a", "role": "decode"}, "is no address"),
            ({"url": "http://u:p@a", "role": "decode"}, "is no address"),
            ({"url": "http://127.0.0.1:9", "role": "king"}, "names no url and role"),
            ({"url": "http://127.0.0.1:9", "role": "encode"}, "is not among"),
            ({"url": "http://127.0.0.1:9", "role": "decode"}, "start it first"),
            (["list"], "names no url and role"),
        ):
            async with router.session.post(url, json=wanted) as answer:
                assert answer.status == 400
                assert said in await answer.text()


@in_loop
async def test_without_a_key_only_this_machine_and_no_web_page_may_order() -> None:
    async with rig() as router:
        for headers in ({"Origin": "http://evil"}, {"Host": "evil.example"}, {"Host": "["}):
            for method, path in (
                ("GET", "/instances"),
                ("POST", "/instances"),
                ("POST", "/instances/decode-1/drain"),
                ("POST", "/instances/decode-1/resume"),
                ("DELETE", "/instances/decode-1"),
                ("GET", "/status.json"),
            ):
                url = router.url + path
                async with router.session.request(method, url, headers=headers) as answer:
                    assert answer.status == 403


@in_loop
async def test_with_a_key_the_key_alone_opens(key_file: Path) -> None:
    async with rig(admin_key_file=key_file) as router:
        for given, status in ((None, 403), ("wrong", 403), (KEY + "x", 403), (KEY, 200)):
            headers = {"X-Router-Admin-Key": given} if given else {}
            for path in ("/instances", "/status.json"):
                async with router.session.get(router.url + path, headers=headers) as answer:
                    assert answer.status == status
        # The public routes need none, and the page asks for it.
        for path in ("/health", "/metrics", "/"):
            async with router.session.get(router.url + path) as answer:
                assert answer.status == 200


@in_loop
async def test_the_status_page_loads_nothing_and_writes_text_alone() -> None:
    async with rig() as router:
        async with router.session.get(router.url + "/") as answer:
            page = await answer.text()
            policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        for element, rule in (("script", "script-src"), ("style", "style-src")):
            [text] = re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{rule} 'sha256-{digest}';" in policy
        page = page.replace('<link rel="icon" href="data:,">', "")
        assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", page)
        assert not re.search(r"innerHTML|outerHTML|document\.write|insertAdjacent|eval\(", page)
        assert page.count("textContent") >= 4
        assert "X-Router-Admin-Key" in page


@in_loop
async def test_the_status_shows_what_instances_say() -> None:
    evil = "<script>alert(1)</script>"
    async with rig() as router:
        router.prefill[0].metrics = METRICS
        router.services.model = (evil, 1)
        await Watch(router.services).scrape()
        async with router.session.get(router.url + "/status.json") as answer:
            assert answer.content_type == "application/json"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            shown = await answer.json()
        assert shown["model"] == evil
        assert shown["queues"] == {"prefill": 0, "decode": 0}
        assert shown["longest_wait_s"] == {"prefill": None, "decode": None}
        assert shown["held"] == {"prompts": 0, "tokens": 0, "lease_left_s": None}
        first = shown["instances"][0]
        assert (first["running"], first["waiting"], first["held_blocks"]) == (5, 4, 7)
        assert (first["kv_usage"], first["kv_blocks"]) == (0.375, 200)
        assert first["backlog"] == 0
        assert 0 <= first["metrics_age_s"] < 10
        router.services.fleet.fail("prefill-1")
        async with router.session.get(router.url + "/status.json") as answer:
            dead = (await answer.json())["instances"][0]
        assert (dead["state"], dead["running"], dead["metrics_age_s"]) == ("down", None, None)


@in_loop
async def test_the_status_shows_who_waits_and_what_is_held_until_decode_has_it() -> None:
    async with rig(max_prefill_tokens=1, lease_s=25.0) as router:
        router.prefill[0].gate, router.decode[0].gate = asyncio.Semaphore(1), asyncio.Semaphore(0)
        asking = [asyncio.create_task(router.text(BODY)) for _ in range(3)]
        # One is held for decode, one is being computed, one waits.
        await router.decode[0].arrived.acquire()
        for _ in range(2):
            await router.prefill[0].arrived.acquire()
        await asyncio.sleep(0.1)
        async with router.session.get(router.url + "/status.json") as answer:
            shown = await answer.json()
        assert shown["queues"] == {"prefill": 1, "decode": 0}
        assert shown["longest_wait_s"]["prefill"] >= 0.1
        tokens = len(prompt_of("/v1/completions", BODY))
        assert (shown["held"]["prompts"], shown["held"]["tokens"]) == (1, tokens)
        assert 20 < shown["held"]["lease_left_s"] <= 25
        for gate in (router.prefill[0].gate, router.decode[0].gate):
            for _ in range(3):
                gate.release()
        assert await asyncio.gather(*asking) == [EXPECTED] * 3
        await router.idle()


@in_loop
async def test_load_from_elsewhere_is_seen() -> None:
    async with rig(prefill=2) as router:
        await router.text(BODY)
        # The first one is given work by others, so the second gets all of ours.
        router.prefill[0].metrics = METRICS
        await Watch(router.services).scrape()
        before = len(router.prefill[0].requests)
        for _ in range(4):
            await router.text(BODY)
        assert len(router.prefill[0].requests) == before


def test_metrics_are_summed_over_engines() -> None:
    seen = parse_metrics(METRICS.encode())
    assert (seen.running, seen.waiting, seen.kv_usage) == (5, 4, 0.375)
    assert (seen.kv_blocks, seen.block_size, seen.held_blocks) == (200, 32, 7)
    nothing = parse_metrics(b"")
    assert (nothing.running, nothing.kv_blocks, nothing.held_blocks) == (0, 0, None)
    for value in (b"NaN", b"-1", b"1e300", b"x"):
        with pytest.raises(ValueError, match=r"cannot be|convert"):
            parse_metrics(b'vllm:num_requests_running{a="b"} ' + value + b"\n")


@in_loop
async def test_models_come_from_an_instance() -> None:
    async with rig() as router, router.session.get(router.url + "/v1/models") as answer:
        assert (await answer.json())["data"][0]["id"] == MODEL


@pytest.mark.parametrize(("model", "length"), [("other", MAX_MODEL_LEN), (MODEL, 17)])
@in_loop
async def test_instances_of_different_models_are_refused(model: str, length: int) -> None:
    async with rig() as router:
        other = FakeInstance("decode", model, length)
        await other.start()
        try:
            router.services.add(other.url, Role.DECODE)
            with pytest.raises(PluginError, match=r"serves .* others 'tiny' with 4096; start all"):
                await check_instances(router.services)
        finally:
            await other.stop()


@in_loop
async def test_instances_that_are_not_up_are_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    async with rig() as router:
        late = FakeInstance("decode")
        await late.start()
        port = int(late.url.rsplit(":", 1)[1])
        await late.stop()
        router.services.add(late.url, Role.DECODE)
        checking = asyncio.create_task(check_instances(router.services))
        while "waiting for" not in caplog.text:
            await asyncio.sleep(0.01)
        await late.start(port)
        await checking
        assert caplog.text.count("waiting for") == 1
        await late.stop()


@in_loop
async def test_instances_that_never_come_up_end_the_start() -> None:
    async with rig(start_timeout_s=1.0) as router:
        router.services.add("http://127.0.0.1:9", Role.DECODE)
        with pytest.raises(PluginError, match=r"http://127.0.0.1:9: no answer within 1 s"):
            await check_instances(router.services)


@in_loop
async def test_soft_roles_follow_the_queues() -> None:
    fast = {"interval_s": 0.01, "cooldown_s": 0.01, "max_prefill_tokens": 1}
    async with rig(prefill=1, decode=2, roles="soft", **fast) as router:
        watch = Watch(router.services)
        router.prefill[0].gate = gate = asyncio.Semaphore(0)
        asking = [asyncio.create_task(router.text(BODY)) for _ in range(6)]
        while router.services.desk.waiting(Role.PREFILL) < 5:
            await asyncio.sleep(0.005)
        while len(router.services.fleet.serving(Role.PREFILL)) < 2:
            await watch.change_roles()
            await asyncio.sleep(0.005)
        for _ in range(6):
            gate.release()
        assert await asyncio.gather(*asking) == [EXPECTED] * 6
        assert await router.metric("role_moves_total", source="decode", target="prefill") == 1
        moved = sum("'do_remote_decode': True" in repr(fake.bodies) for fake in router.decode)
        assert moved == 1
        await router.idle()


@in_loop
async def test_metrics_move() -> None:
    async with rig() as router:
        await router.text({**BODY, "stream": True})
        assert await router.metric("ttft_seconds_count") == 1
        assert await router.metric("added_seconds_count") == 1
        added = await router.metric("added_seconds_sum")
        assert 0 < added < await router.metric("ttft_seconds_sum")
        assert await router.metric("in_flight", instance="decode-1", role="decode") == 0
        router.decode[0].gate = asyncio.Semaphore(0)
        asking = asyncio.create_task(router.text(BODY))
        await router.decode[0].arrived.acquire()
        await router.decode[0].arrived.acquire()
        assert await router.metric("in_flight", instance="decode-1", role="decode") == 1
        asking.cancel()
        await router.idle()
