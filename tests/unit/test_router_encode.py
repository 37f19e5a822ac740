"""Requests with images: encoded elsewhere, prefilled by reference."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from tests.router_backends import MODEL, Fault, answer_tokens, prompt_of, text_of
from tests.router_rig import Rig, in_loop, note_transfers, rig
from vllm_plugins.routing import Role

CHAT = "/v1/chat/completions"
LONG_TEXT = "many words before an image " * 60


def image(name: str) -> dict[str, Any]:
    """Return a part with an image, as a data URL."""
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{name}"}}


def body_of(images: Sequence[str], text: str = "what is this", **fields: Any) -> dict[str, Any]:
    """Return a request whose images follow a text."""
    content = [{"type": "text", "text": text}, *map(image, images)]
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": content}]
    return {"model": MODEL, "messages": messages, "max_tokens": 4, "temperature": 0, **fields}


def expected(body: dict[str, Any]) -> str:
    """Return the answer's text."""
    return text_of(answer_tokens(prompt_of(CHAT, body), 4))


def parts_of(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the media of a request as an instance got them."""
    return [part for part in asked["messages"][-1]["content"] if part["type"] != "text"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("first_token", ["decode", "prefill"])
@in_loop
async def test_images_are_encoded_once_and_referred_to(first_token: str, stream: bool) -> None:
    async with rig(encode=2, first_token=first_token) as router:
        body = body_of(["aaaa", "bbbb", "aaaa"], stream=stream, mm_processor_kwargs={"x": 1})
        assert await router.text(body, CHAT) == expected(body)
        sent = [part for fake in router.encode for part in parts_of(fake.bodies[0])]
        assert len(sent) == 2
        assert {part["image_url"]["url"][-4:] for part in sent} == {"aaaa", "bbbb"}
        names = {part["image_url"]["url"][-4:]: part["uuid"] for part in sent}
        for fake in router.encode:
            assert fake.bodies[0]["max_tokens"] == 1
            assert fake.bodies[0]["mm_processor_kwargs"] == {"x": 1}
            assert fake.bodies[0]["ec_transfer_params"] == {"vllm_plugins_epd": {"publish": True}}
        for asked in (router.prefill[0].bodies[0], router.decode[0].bodies[0]):
            assert parts_of(asked) == [
                {
                    "type": "image_embeds",
                    "image_embeds": {"image_grid_thw": [1, 4, 4]},
                    "uuid": names[name],
                }
                for name in ("aaaa", "bbbb", "aaaa")
            ]
            keys = {f"{name}-processed" for name in names.values()}
            assert set(asked["ec_transfer_params"]) == keys
        await router.idle()


@in_loop
async def test_text_alone_goes_past_the_encoders() -> None:
    async with rig(encode=1) as router:
        body = body_of([])
        assert await router.text(body, CHAT) == expected(body)
        completion = {"prompt": "a b c", "max_tokens": 3}
        await router.text(completion)
        assert not router.encode[0].requests
        assert "ec_transfer_params" not in router.prefill[0].bodies[0]


@in_loop
async def test_encoders_may_serve_prefill_that_decodes_as_well() -> None:
    async with rig(encode=1, decode=0) as router:
        body = body_of(["aaaa"], text=LONG_TEXT, stream=True)
        assert await router.text(body, CHAT) == expected(body)
        warming, whole = router.prefill[0].bodies
        assert warming["max_tokens"] == 1
        assert "kv_transfer_params" not in whole
        assert parts_of(whole)[0]["type"] == "image_embeds"
        await router.idle()


@in_loop
async def test_images_are_spread_or_kept_together() -> None:
    names = ["aaaa", "bbbb", "cccc", "dddd"]
    async with rig(encode=2) as router:
        await router.text(body_of(names), CHAT)
        assert [len(parts_of(fake.bodies[0])) for fake in router.encode] == [2, 2]
    async with rig(encode=2, irp="off") as router:
        await router.text(body_of(names), CHAT)
        await router.text(body_of(names), CHAT)
        assert [len(parts_of(fake.bodies[0])) for fake in router.encode] == [4, 4]


@in_loop
async def test_names_follow_from_content_processing_and_salt() -> None:
    async with rig(encode=1) as router:

        async def name(part: dict[str, Any], **fields: Any) -> str:
            await router.text({**body_of([], **fields), "messages": [
                {"role": "user", "content": [part]}]}, CHAT)  # fmt: skip
            return str(parts_of(router.encode[0].bodies[-1])[0]["uuid"])

        first = await name(image("aaaa"))
        assert await name({**image("aaaa"), "uuid": "of-the-client"}) == first
        others = [
            await name(image("aaab")),
            await name(image("aaaa"), cache_salt="tenant"),
            await name(image("aaaa"), mm_processor_kwargs={"max_pixels": 9}),
            await name({"type": "image_url", "image_url": {"url": "http://a/b.png"}}),
        ]
        assert len({first, *others}) == 5


@in_loop
async def test_without_metadata_the_image_goes_along_by_name() -> None:
    async with rig(encode=1) as router:
        router.encode[0].metadata = {}
        body = body_of(["aaaa"])
        assert await router.text(body, CHAT) == expected(body)
        part = parts_of(router.prefill[0].bodies[0])[0]
        name = parts_of(router.encode[0].bodies[0])[0]["uuid"]
        assert part == {**image("aaaa"), "uuid": name}
        assert name in router.prefill[0].bodies[0]["ec_transfer_params"]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_embeds", "image_embeds": None, "uuid": "another's"},
        {"type": "image_url", "image_url": None, "uuid": "another's"},
        {"type": "image_url", "image_url": {"url": ""}},
    ],
)
@in_loop
async def test_clients_cannot_refer_to_others_images(part: dict[str, Any]) -> None:
    async with rig(encode=1) as router:
        body = {**body_of([]), "messages": [{"role": "user", "content": [part]}]}
        async with router.post(body, CHAT) as answer:
            assert answer.status == 400
        assert not router.encode[0].requests
        assert not router.prefill[0].requests


@in_loop
async def test_a_part_of_no_known_type_is_for_the_instances_to_judge() -> None:
    async with rig(encode=1) as router:
        part = {"type": ["image_url"]}
        body = {**body_of([]), "messages": [{"role": "user", "content": [part]}]}
        async with router.post(body, CHAT) as answer:
            assert answer.status == 200
        assert not router.encode[0].requests


@in_loop
async def test_the_text_before_an_image_is_prefilled_while_it_is_encoded() -> None:
    async with rig(prefill=2, encode=1) as router:
        router.encode[0].gate = gate = asyncio.Semaphore(0)
        body = body_of(["aaaa"], text=LONG_TEXT, cache_salt="s")
        asking = asyncio.create_task(router.text(body, CHAT))
        # It arrives while the encoder still works.
        await router.prefill[0].arrived.acquire()
        await router.encode[0].arrived.acquire()
        warming = router.prefill[0].bodies[0]
        assert warming["messages"][-1]["content"] == [{"type": "text", "text": LONG_TEXT}]
        assert (warming["cache_salt"], warming["add_generation_prompt"]) == ("s", False)
        assert "kv_transfer_params" not in warming
        gate.release()
        assert await asking == expected(body)
        # The whole prompt went to the instance that has its beginning.
        assert [len(fake.requests) for fake in router.prefill] == [2, 0]
        await router.idle()


async def known_door(router: Rig) -> None:
    """Let the router learn where the encode instances hand embeddings out."""
    names = [f"first-{number}" for number in range(len(router.encode))]
    await router.text(body_of(names), CHAT)
    for fake in (*router.encode, *router.prefill, *router.decode):
        fake.requests.clear()
        fake.arrived = asyncio.Semaphore(0)


@in_loop
async def test_prefill_is_asked_at_once_where_it_can_wait_itself() -> None:
    async with rig(encode=2) as router:
        await known_door(router)
        for fake in router.encode:
            fake.gate = asyncio.Semaphore(0)
        body = body_of(["aaaa", "bbbb"])
        asking = asyncio.create_task(router.text(body, CHAT))
        await router.prefill[0].arrived.acquire()
        for fake in router.encode:
            await fake.arrived.acquire()
        early = router.prefill[0].bodies[0]
        # Without metadata the content is needed to lay the prompt out.
        names = [part["uuid"] for part in parts_of(early)]
        assert parts_of(early) == [
            {**image("aaaa"), "uuid": names[0]},
            {**image("bbbb"), "uuid": names[1]},
        ]
        doors = [early["ec_transfer_params"][name]["vllm_plugins_epd"] for name in names]
        served = {part["uuid"]: fake.door for fake in router.encode
                  for part in parts_of(fake.bodies[0])}  # fmt: skip
        assert doors == [{"awaited": True, **served[name]} for name in names]
        for fake in router.encode:
            assert fake.gate is not None
            fake.gate.release()
        assert await asking == expected(body)
        assert len(router.prefill[0].requests) == 1
        asked = router.decode[0].bodies[0]
        assert {part["type"] for part in parts_of(asked)} == {"image_embeds"}
        assert "awaited" not in repr(asked)
        assert asked["kv_transfer_params"]["do_remote_prefill"]
        await router.idle()


@in_loop
async def test_prefill_that_waits_for_a_failed_encoder_is_asked_again() -> None:
    async with rig(encode=2) as router:
        await known_door(router)
        router.encode[0].faults.append(Fault("abort"))
        router.prefill[0].faults.append(Fault("hang"))
        body = body_of(["aaaa", "bbbb"])
        assert await router.text(body, CHAT) == expected(body)
        await router.prefill[0].left.acquire()
        assert router.prefill[0].cancelled == 1
        assert [part["type"] for part in parts_of(router.prefill[0].bodies[1])] == [
            "image_embeds",
            "image_embeds",
        ]
        # It may have been started anew, elsewhere.
        assert "encode-1" not in router.services.doors
        await router.idle()


@in_loop
async def test_prefill_that_fails_while_it_waits_is_asked_again() -> None:
    async with rig(prefill=2, encode=1) as router:
        await known_door(router)
        for fake in router.prefill:
            fake.faults.append(Fault("status", 500))
        body = body_of(["aaaa"])
        assert await router.text(body, CHAT) == expected(body)
        await router.idle()


@in_loop
async def test_an_image_that_is_refused_ends_the_wait() -> None:
    async with rig(encode=1) as router:
        await known_door(router)
        router.encode[0].faults.append(Fault("status", 422))
        router.prefill[0].faults.append(Fault("hang"))
        async with router.post(body_of(["aaaa"]), CHAT) as answer:
            assert answer.status == 422
        await router.idle()
        assert router.prefill[0].cancelled == 1


@pytest.mark.parametrize("fields", [{"mm_processor_kwargs": {"x": 1}}, {"n": 2}])
@in_loop
async def test_where_names_or_prefill_are_not_the_routers_it_waits(fields: dict[str, Any]) -> None:
    async with rig(encode=1) as router:
        await known_door(router)
        await router.text(body_of(["aaaa"], **fields), CHAT)
        for fake in (*router.prefill, *router.decode):
            assert all("awaited" not in repr(asked) for asked in fake.bodies)


@in_loop
async def test_a_client_that_leaves_while_all_work_stops_them_all() -> None:
    async with rig(encode=1) as router:
        await known_door(router)
        router.encode[0].gate = asyncio.Semaphore(0)
        router.prefill[0].faults.append(Fault("hang"))
        asking = asyncio.create_task(router.text(body_of(["aaaa"]), CHAT))
        await router.prefill[0].arrived.acquire()
        await router.encode[0].arrived.acquire()
        asking.cancel()
        await router.idle()
        assert (router.encode[0].cancelled, router.prefill[0].cancelled) == (1, 1)


@in_loop
async def test_a_client_that_leaves_before_the_encoder_has_done_releases_the_kv() -> None:
    async with rig(encode=1) as router:
        await known_door(router)
        router.encode[0].gate = asyncio.Semaphore(0)
        received = note_transfers(router)
        asking = asyncio.create_task(router.text(body_of(["aaaa"]), CHAT))
        while not received:
            await asyncio.sleep(0.005)
        asking.cancel()
        while not received.issubset(router.released):
            await asyncio.sleep(0.005)
        await router.idle()


@in_loop
async def test_without_overlap_prefill_waits_for_the_images() -> None:
    async with rig(encode=1, overlap=False) as router:
        body = body_of(["aaaa"], text=LONG_TEXT)
        assert await router.text(body, CHAT) == expected(body)
        assert len(router.prefill[0].requests) == 1


@in_loop
async def test_a_beginning_that_cannot_be_prefilled_costs_nothing_but_time() -> None:
    async with rig(encode=1) as router:
        router.prefill[0].faults.append(Fault("status", 400))
        body = body_of(["aaaa"], text=LONG_TEXT)
        assert await router.text(body, CHAT) == expected(body)
        await router.idle()


@pytest.mark.parametrize("fault", [Fault("abort"), Fault("status", 500), Fault("junk")], ids=str)
@in_loop
async def test_only_the_images_of_a_failed_encoder_are_encoded_again(fault: Fault) -> None:
    async with rig(encode=2) as router:
        router.encode[0].faults.append(fault)
        body = body_of(["aaaa", "bbbb"])
        assert await router.text(body, CHAT) == expected(body)
        assert [len(parts_of(asked)) for asked in router.encode[1].bodies] == [1, 1]
        assert await router.metric("retries_total", role="encode") == 1
        await router.idle()


@in_loop
async def test_encoders_that_fail_are_one_error() -> None:
    async with rig(encode=2) as router:
        for fake in router.encode:
            fake.faults.extend([Fault("status", 500)] * 2)
        async with router.post(body_of(["aaaa"]), CHAT) as answer:
            assert answer.status == 502
        assert not router.prefill[0].requests
        await router.idle()


@in_loop
async def test_an_image_that_an_encoder_refuses_is_the_clients_fault() -> None:
    async with rig(encode=2) as router:
        router.encode[0].faults.append(Fault("status", 422))
        async with router.post(body_of(["aaaa"], text=LONG_TEXT), CHAT) as answer:
            assert answer.status == 422
        await router.idle()


@in_loop
async def test_a_client_that_leaves_stops_the_encoders() -> None:
    async with rig(encode=2) as router:
        for fake in router.encode:
            fake.gate = asyncio.Semaphore(0)
        asking = asyncio.create_task(router.text(body_of(["aaaa", "bbbb"], text=LONG_TEXT), CHAT))
        for fake in router.encode:
            await fake.arrived.acquire()
        asking.cancel()
        await router.idle()
        assert [fake.cancelled for fake in router.encode] == [1, 1]


@in_loop
async def test_beyond_the_encoders_room_requests_wait() -> None:
    async with rig(encode=1, max_encoder_tokens=600) as router:
        router.encode[0].gate = gate = asyncio.Semaphore(0)
        bodies = [body_of(["aaaa"]), body_of(["bbbb"])]
        asking = [asyncio.create_task(router.text(body, CHAT)) for body in bodies]
        while router.services.desk.waiting(Role.ENCODE) != 1:
            await asyncio.sleep(0.005)
        gate.release()
        gate.release()
        assert await asyncio.gather(*asking) == [expected(body) for body in bodies]
        await router.idle()
