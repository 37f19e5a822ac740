"""``--stream-layers``: both instances are asked at once, and nothing is worse when one fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.router_backends import Fault, answer_tokens, prompt_of, text_of
from tests.router_rig import Rig, in_loop, rig
from vllm_plugins.errors import PluginError
from vllm_plugins.router.settings import RouterSettings

KEY = "vllm_plugins_pd"
PEERS = ["a worker"]
BODY: dict[str, Any] = {"prompt": "a prompt of six whole words", "max_tokens": 12, "temperature": 0}
EXPECTED = text_of(answer_tokens(prompt_of("/v1/completions", BODY), 12))


@asynccontextmanager
async def layered(**kwargs: Any) -> AsyncIterator[Rig]:
    """A router that knows already where its prefill instances' workers are."""
    async with rig(stream_layers=True, **kwargs) as router:
        for fake in router.prefill:
            fake.peers = PEERS
            fake.gate = asyncio.Semaphore(1)
            assert await router.text(BODY) == EXPECTED
            fake.requests.clear()
        for fake in router.decode:
            fake.requests.clear()
        await router.idle()
        yield router


async def asked(fake: Any) -> dict[str, Any]:
    """Return what an instance was asked, once it was."""
    while not fake.requests:
        await asyncio.sleep(0.002)
    reference: dict[str, Any] = fake.bodies[0]["kv_transfer_params"]
    return reference


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_both_are_asked_at_once_under_one_name(stream: bool) -> None:
    async with layered() as router:
        (prefill,), (decode,) = router.prefill, router.decode
        answer = asyncio.create_task(router.text({**BODY, "stream": stream}))
        # The prefill instance says nothing yet.
        taken = await asked(decode)
        wanted = await asked(prefill)
        assert wanted["do_remote_decode"] and wanted[KEY]["stream"] is True
        name = wanted[KEY]["transfer_id"]
        assert taken == {
            "do_remote_prefill": True,
            KEY: {"version": 1, "transfer_id": name, "peers": PEERS},
        }
        assert prefill.gate is not None
        prefill.gate.release()
        assert await answer == EXPECTED
        assert (len(prefill.requests), len(decode.requests)) == (1, 1)
        await router.idle()


@in_loop
async def test_a_prefill_instance_with_a_queue_is_asked_first() -> None:
    async with layered() as router:
        (prefill,), (decode,) = router.prefill, router.decode
        both = [asyncio.create_task(router.text(BODY)) for _ in range(2)]
        while len(prefill.requests) < 2:
            await asyncio.sleep(0.002)
        assert [KEY in body["kv_transfer_params"] for body in prefill.bodies] == [True, True]
        assert ["stream" in body["kv_transfer_params"][KEY] for body in prefill.bodies] == [
            True,
            False,
        ]
        assert len(decode.requests) <= 1
        assert prefill.gate is not None
        prefill.gate.release()
        prefill.gate.release()
        assert await asyncio.gather(*both) == [EXPECTED] * 2
        await router.idle()


@pytest.mark.parametrize("fault", [Fault("abort"), Fault("status", 500), Fault("junk")], ids=str)
@in_loop
async def test_a_prefill_that_fails_costs_the_decode_instance_a_prefill(fault: Fault) -> None:
    async with layered() as router:
        (prefill,), (decode,) = router.prefill, router.decode
        prefill.faults.append(fault)
        assert await router.text(BODY) == EXPECTED
        assert (len(prefill.requests), len(decode.requests)) == (1, 1)
        name = decode.bodies[0]["kv_transfer_params"][KEY]["transfer_id"]
        while name not in router.released:
            await asyncio.sleep(0.002)
        await router.idle()


@in_loop
async def test_a_decode_instance_that_fails_ends_the_prefill_and_the_other_way_is_taken() -> None:
    async with layered(decode=2) as router:
        (prefill,) = router.prefill
        for decode in router.decode:
            decode.faults.append(Fault("abort"))
        answer = asyncio.create_task(router.text(BODY))
        while len(prefill.requests) < 2:
            await asyncio.sleep(0.002)
        assert prefill.gate is not None
        prefill.gate.release()
        for decode in router.decode:
            decode.faults.clear()
        assert await answer == EXPECTED
        first, second = (body["kv_transfer_params"][KEY] for body in prefill.bodies)
        assert first["stream"] is True and "stream" not in second
        while first["transfer_id"] not in router.released:
            await asyncio.sleep(0.002)
        assert second["transfer_id"] not in router.released
        await router.idle()


@in_loop
async def test_what_is_held_already_is_not_computed_again_after_a_failure() -> None:
    async with layered(decode=2) as router:
        (prefill,) = router.prefill
        gates = [asyncio.Semaphore(0), asyncio.Semaphore(0)]
        for decode, gate in zip(router.decode, gates, strict=True):
            decode.gate = gate
            decode.faults.append(Fault("die", after=0))
        answer = asyncio.create_task(router.text({**BODY, "stream": True}))
        await asked(prefill)
        assert prefill.gate is not None
        prefill.gate.release()
        while not any(decode.requests for decode in router.decode):
            await asyncio.sleep(0.002)
        # The fault of the one that was asked has begun, and waits at its gate.
        for decode in router.decode:
            decode.faults.clear()
        while not prefill.held or prefill.active:
            await asyncio.sleep(0.002)
        # Lets the answer get to the router before the decode instance fails.
        await asyncio.sleep(0.05)
        for gate in gates:
            for _ in range(20):
                gate.release()
        assert await answer == EXPECTED
        assert len(prefill.requests) == 1
        await router.idle()


@in_loop
async def test_a_client_that_leaves_ends_both() -> None:
    async with layered() as router:
        (prefill,), (decode,) = router.prefill, router.decode
        decode.gate = asyncio.Semaphore(0)
        answer = asyncio.create_task(router.text(BODY))
        name = (await asked(decode))[KEY]["transfer_id"]
        await asked(prefill)
        answer.cancel()
        while prefill.cancelled == 0 or decode.cancelled == 0 or name not in router.released:
            await asyncio.sleep(0.002)
        await router.idle()


@in_loop
async def test_without_knowing_the_workers_one_is_asked_after_the_other() -> None:
    async with rig(stream_layers=True) as router:
        assert await router.text(BODY) == EXPECTED
        (body,) = router.prefill[0].bodies
        assert KEY not in body["kv_transfer_params"]
        await router.idle()


def test_what_cannot_go_together_is_refused() -> None:
    urls = {"prefill": ("http://p:1",), "decode": ("http://d:1",)}
    RouterSettings(**urls, stream_layers=True).check()
    with pytest.raises(PluginError, match="with --first-token prefill"):
        RouterSettings(**urls, stream_layers=True, first_token="prefill").check()
    alone = RouterSettings(prefill=("http://p:1",), decode=(), encode=("http://e:1",),
                           stream_layers=True)  # fmt: skip
    with pytest.raises(PluginError, match="nothing is handed over"):
        alone.check()
