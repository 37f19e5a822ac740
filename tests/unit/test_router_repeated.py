"""Streams that break off and are asked for again from their beginning."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.router_backends import Fault, answer_tokens, prompt_of
from tests.router_rig import in_loop, rig, stream_chunks
from tests.unit import test_router_encode as pictures
from tests.unit.test_router_faults import BODY, CHAT, COMPLETIONS, SAMPLED, expected
from vllm_plugins.router import repeated
from vllm_plugins.router.bodies import Call
from vllm_plugins.router.continued import BrokenStreamError
from vllm_plugins.router.events import BOUNDARY, as_event
from vllm_plugins.router.repeated import Kept

STREAM = BODY | {"stream": True}
# For none of these a prompt of token ids would do.
WAYS: dict[str, dict[str, Any]] = {
    "ids unknown": {},
    "stop": {"stop": ["never"], "return_token_ids": True},
    "grammar": {"structured_outputs": {"regex": ".*"}},
    "seed": {"seed": 1, "temperature": 0.5, "return_token_ids": True},
}


def said(chunks: list[dict[str, Any]]) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)


@pytest.mark.parametrize("fields", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("fault", "after"), [("die", 1), ("die", 4), ("end", 7)])
@in_loop
async def test_the_client_gets_what_it_lacks(
    path: str, fields: dict[str, Any], fault: str, after: int
) -> None:
    async with rig(prefill=1, decode=2) as router:
        router.decode[0].faults.append(Fault(fault, after=after))
        async with router.post(STREAM | fields, path) as answer:
            chunks = stream_chunks(await answer.read())
        assert said(chunks) == expected(path)
        choices = [chunk["choices"][0] for chunk in chunks]
        if "return_token_ids" in fields:
            tokens = [token for one in choices for token in one.get("token_ids") or ()]
            assert tokens == answer_tokens(prompt_of(path, BODY), 12)
        assert len({(chunk["id"], chunk["object"], chunk["model"]) for chunk in chunks}) == 1
        assert [one["finish_reason"] for one in choices].count("length") == 1
        assert [one.get("delta", {}).get("role") for one in choices].count("assistant") == (
            path == CHAT
        )
        # The prompt is handed over anew, since the first one's KV went down with it.
        first, second = (fake.bodies[0]["kv_transfer_params"] for fake in router.decode)
        assert first != second and second["do_remote_prefill"]
        assert await router.metric("resumed_total") == 1
        await router.idle()


@in_loop
async def test_images_are_encoded_again_for_it() -> None:
    async with rig(decode=2, encode=1) as router:
        router.decode[0].faults.append(Fault("die", after=2))
        body = pictures.body_of(["aaaa", "bbbb"])
        async with router.post(body | {"stream": True}, CHAT) as answer:
            chunks = stream_chunks(await answer.read())
        assert said(chunks) == pictures.expected(body)
        # Both at once, each time.
        assert len(router.encode[0].requests) == 2
        await router.idle()


@in_loop
async def test_it_may_break_off_again_and_again() -> None:
    async with rig(decode=4, retries=3) as router:
        for fake, after in zip(router.decode, (5, 2, 9), strict=False):
            fake.faults.append(Fault("die", after=after))
        async with router.post(STREAM) as answer:
            chunks = stream_chunks(await answer.read())
        assert said(chunks) == expected()
        assert await router.metric("resumed_total") == 3
        await router.idle()


@pytest.mark.parametrize(("after", "asked"), [(12, 1), (13, 0)])
@in_loop
async def test_only_what_is_lacking_of_the_end_is_asked_for(after: int, asked: int) -> None:
    """Twelve events of text, and one with the usage."""
    async with rig(decode=2) as router:
        router.decode[0].faults.append(Fault("die", after=after))
        body = STREAM | {"stream_options": {"include_usage": True}}
        async with router.post(body) as answer:
            chunks = stream_chunks(await answer.read())
        assert [bool(chunk["choices"]) for chunk in chunks] == [True] * 12 + [False]
        assert chunks[-1]["usage"]["completion_tokens"] == 12
        assert len(router.decode[1].requests) == asked
        await router.idle()


@in_loop
async def test_another_answer_is_not_joined_to_the_first() -> None:
    async with rig(decode=2) as router:
        router.decode[0].faults.append(Fault("die", after=4))
        router.decode[1].first_text = " something else"
        async with router.post(STREAM) as answer:
            raw = await answer.read()
        assert b"gives another answer" in raw and b"something else" not in raw
        assert raw.endswith(b"data: [DONE]\n\n")
        await router.idle()


UNFIT = {
    "sampled": SAMPLED,
    "logprobs": BODY | {"logprobs": 1},
    "several": BODY | {"n": 2},
    "no temperature": {name: value for name, value in BODY.items() if name != "temperature"},
}


@pytest.mark.parametrize("body", UNFIT.values(), ids=UNFIT)
@in_loop
async def test_what_might_be_another_answer_ends_with_an_error(body: dict[str, Any]) -> None:
    async with rig(decode=2) as router:
        router.decode[0].faults.append(Fault("die", after=4))
        async with router.post(body | {"stream": True}) as answer:
            assert b"the answer broke off" in await answer.read()
        assert not router.decode[1].requests
        await router.idle()


@in_loop
async def test_half_an_event_cannot_be_completed() -> None:
    async with rig(decode=2) as router:
        router.decode[0].faults.append(Fault("half", after=4))
        async with router.post(STREAM) as answer:
            assert b"the answer broke off" in await answer.read()
        assert not router.decode[1].requests


@in_loop
async def test_no_more_is_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated, "MAX_KEPT_BYTES", 400)
    async with rig(decode=2) as router:
        router.decode[0].faults.append(Fault("die", after=8))
        async with router.post(STREAM) as answer:
            assert b"the answer broke off" in await answer.read()
        assert not router.decode[1].requests


def call(chat: bool) -> Call:
    return Call(CHAT if chat else COMPLETIONS, STREAM, "r", {}, 0.0, 9.0)


def event(chat: bool, text: str, ids: list[int], answer: str, **more: Any) -> bytes:
    spoken = {"delta": {"content": text}} if chat else {"text": text}
    choice = {"index": 0, **spoken, "token_ids": ids, "finish_reason": None, **more}
    return as_event({"id": answer, "created": 1, "model": "m", "choices": [choice]})


ANSWER = st.lists(st.tuples(st.text(max_size=3), st.lists(st.integers(0, 9), max_size=2)))


def joined(pieces: Any) -> tuple[str, list[int]]:
    return "".join(text for text, _ in pieces), [one for _, ids in pieces for one in ids]


def cut(whole: tuple[str, list[int]], places: list[int]) -> list[tuple[str, list[int]]]:
    """Cut an answer into other events, as a busy instance does."""
    text, ids = whole
    at = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    ats = [0, *sorted(place % (len(ids) + 1) for place in places), len(ids)]
    return [(text[a:b], ids[c:d]) for a, b, c, d in zip(at, at[1:], ats, ats[1:], strict=False)]


@given(ANSWER, st.integers(0, 20), st.lists(st.integers(0, 99), max_size=5), st.booleans())
def test_events_need_not_be_cut_alike(
    pieces: list[tuple[str, list[int]]], count: int, places: list[int], chat: bool
) -> None:
    """What was sent, and what is sent of the second answer, are together the answer."""
    kept = Kept(call(chat))
    for text, ids in pieces[:count]:
        kept.add(event(chat, text, ids, "first"))
    found = kept.repeat()
    assert found is not None
    found.rewind()
    rest = [
        json.loads(part.removeprefix(b"data: "))
        for text, ids in cut(joined(pieces), places)
        if (part := found.part(event(chat, text, ids, "second")))
    ]
    choices = [chunk["choices"][0] for chunk in rest]
    texts = [one["delta"]["content"] if chat else one["text"] for one in choices]
    known_text, known_ids = joined(pieces[:count])
    assert known_text + "".join(texts) == joined(pieces)[0]
    assert (
        known_ids + [one for choice in choices for one in choice["token_ids"]] == joined(pieces)[1]
    )
    assert {chunk["id"] for chunk in rest} <= {"first" if pieces[:count] else "second"}


OTHERS = {
    "tool call": {"delta": {"tool_calls": [{"index": 0}]}},
    "reasoning": {"delta": {"reasoning": "hm", "content": ""}},
    "second": {"index": 1},
    "logprobs": {"logprobs": {"content": [1]}},
    "nothing": {"delta": None},
}


@pytest.mark.parametrize("more", OTHERS.values(), ids=OTHERS)
def test_what_is_not_one_text_is_not_repeated(more: dict[str, Any]) -> None:
    strange = event(True, "a", [1], "first", **more)
    kept = Kept(call(chat=True))
    kept.add(strange)
    assert kept.repeat() is None
    plain = Kept(call(chat=True)).repeat()
    assert plain is not None
    with pytest.raises(BrokenStreamError, match="another kind"):
        plain.part(strange)


def test_what_is_no_event_of_a_stream_is_not_repeated() -> None:
    for junk in (b"data: {" + BOUNDARY, b"data: []" + BOUNDARY):
        kept = Kept(call(chat=False))
        kept.add(junk)
        assert kept.repeat() is None
