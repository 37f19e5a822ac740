"""Embeddings that are lost on their way: encoded again, and held against nobody who wanted them."""

from __future__ import annotations

import pytest

from tests.router_backends import Fault
from tests.router_rig import in_loop, rig
from tests.unit.test_router_encode import CHAT, body_of, expected, known_door
from vllm_plugins.routing import State


@in_loop
async def test_prefill_that_could_not_get_an_image_has_it_encoded_again() -> None:
    async with rig(prefill=2, encode=1) as router:
        router.prefill[0].faults.append(Fault("status", 500))
        body = body_of(["aaaa"])
        assert await router.text(body, CHAT) == expected(body)
        assert len(router.encode[0].requests) == 2


@pytest.mark.parametrize("overlap", [True, False])
@in_loop
async def test_prefill_that_could_not_get_images_is_not_sick(overlap: bool) -> None:
    async with rig(encode=1, overlap=overlap) as router:
        await known_door(router)
        for number in range(4):
            router.prefill[0].faults.append(Fault("status", 500))
            body = body_of([f"lost-{number}"])
            assert await router.text(body, CHAT) == expected(body)
        assert router.services.fleet["prefill-1"].state is State.UP
        # Where every try fails, the client hears that, and not that all are busy.
        router.prefill[0].faults.extend([Fault("status", 500)] * 3)
        async with router.post(body_of(["lost"]), CHAT) as answer:
            assert answer.status == 502
        # Without images there is nothing else to blame.
        router.prefill[0].faults.extend([Fault("status", 500)] * 3)
        for _ in range(2):
            async with router.post(body_of([]), CHAT) as answer:
                assert answer.status >= 500
        assert router.services.fleet["prefill-1"].state is State.DOWN


@in_loop
async def test_decode_that_could_not_get_images_has_them_encoded_again() -> None:
    async with rig(encode=1) as router:
        for number in range(4):
            router.decode[0].faults.append(Fault("status", 500))
            body = body_of([f"lost-{number}"])
            assert await router.text(body, CHAT) == expected(body)
        assert [len(fake.requests) for fake in (*router.encode, *router.prefill)] == [8, 8]
        assert router.services.fleet["decode-1"].state is State.UP
        await router.idle()
