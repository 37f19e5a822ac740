"""The router serves what one instance would have served, in both first-token modes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.router_backends import CONVERSATION_START, EOS, MODEL, answer_tokens, prompt_of, text_of
from tests.router_rig import in_loop, rig, stream_chunks, stream_text

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPT = "the quick brown fox"
MESSAGES = [{"role": "user", "content": PROMPT}]


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    """Return a request with the same words for both routes."""
    prompt = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": MESSAGES}
    return {"model": MODEL, **prompt, "max_tokens": 12, "temperature": 0, **fields}


def expected(path: str, body: dict[str, Any]) -> str:
    """Return the answer's text."""
    return text_of(answer_tokens(prompt_of(path, body), body["max_tokens"]))


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@in_loop
async def test_text_is_that_of_one_instance(path: str, stream: bool, first_token: str) -> None:
    async with rig(first_token=first_token) as router:
        for limit in (1, 2, 12):
            body = body_of(path, stream=stream, max_tokens=limit)
            assert await router.text(body, path) == expected(path, body)
        await router.idle()
        assert not router.released or first_token == "prefill"
        assert await router.metric("requests_total", outcome="complete") == 3


@in_loop
async def test_the_hand_over_is_stock_vllms() -> None:
    async with rig() as router:
        body = body_of(CHAT, stream=True, min_tokens=1, stream_options={"include_usage": True})
        await router.text(body, CHAT)
        asked, answered = router.prefill[0].bodies[0], router.decode[0].bodies[0]
        assert asked["kv_transfer_params"] == {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        }
        assert (asked["max_tokens"], asked["max_completion_tokens"]) == (1, 1)
        assert asked["stream"] is False
        assert "min_tokens" not in asked
        assert "stream_options" not in asked
        transfer = answered.pop("kv_transfer_params")
        assert transfer["vllm_plugins_pd"]["transfer_id"] in router.prefill[0].held
        assert answered == body


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@in_loop
async def test_a_stream_is_passed_on_byte_by_byte(path: str) -> None:
    async with rig() as router:
        body = body_of(path, stream=True, stream_options={"include_usage": True})
        headers = {"X-Request-Id": "same"}
        async with router.post(body, path, headers=headers) as answer:
            through = await answer.read()
            assert answer.headers["X-Request-Id"] == "same"
        direct_url = router.decode[0].url + path
        async with router.session.post(direct_url, json=body, headers=headers) as answer:
            assert await answer.read() == through


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
@in_loop
async def test_nothing_is_held_back(first_token: str) -> None:
    async with rig(first_token=first_token) as router:
        gate = router.decode[0].gate = asyncio.Semaphore(0)
        body = body_of(COMPLETIONS, stream=True)
        # Each token arrives before the instance may send the next one; and with a first token from
        # prefill, one arrives before it sends any.
        early = first_token == "prefill"
        if not early:
            gate.release()
        async with router.post(body) as answer:
            tokens = answer_tokens(prompt_of(COMPLETIONS, body), 12)
            for count, token in enumerate(tokens):
                if count:
                    gate.release()
                event = await answer.content.readuntil(b"\n\n")
                assert text_of([token]).encode() in event
            gate.release()
            assert (await answer.content.read()).endswith(b"data: [DONE]\n\n")


@in_loop
async def test_prefill_gives_the_first_token_and_decode_continues() -> None:
    async with rig(first_token="prefill") as router:
        body = body_of(CHAT, stream=True, max_completion_tokens=9, top_p=0.5, user="u")
        del body["max_tokens"]
        await router.text(body, CHAT)
        prompt = prompt_of(CHAT, body)
        assert router.prefill[0].bodies[0]["return_token_ids"] is True
        path, _, asked = router.decode[0].requests[0]
        assert path == COMPLETIONS
        transfer = asked.pop("kv_transfer_params")
        assert transfer["vllm_plugins_pd"]["transfer_id"] in router.prefill[0].held
        assert asked == {
            "model": MODEL,
            "temperature": 0,
            "top_p": 0.5,
            "prompt": [*prompt, *answer_tokens(prompt, 1)],
            "max_tokens": 8,
            "stream": True,
            "return_token_ids": True,
        }


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@in_loop
async def test_a_continued_stream_looks_like_one_answer(path: str) -> None:
    async with rig(first_token="prefill") as router:
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = body_of(path, stream=True, stream_options=options, return_token_ids=True)
        async with router.post(body, path) as answer:
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            chunks = stream_chunks(await answer.read())
        prompt = prompt_of(path, body)
        tokens = answer_tokens(prompt, 12)
        assert len({(chunk["id"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
        kind = "chat.completion.chunk" if path == CHAT else "text_completion"
        assert chunks[0]["object"] == kind
        *said, usage = chunks
        assert usage["choices"] == []
        assert usage["usage"] == {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(tokens),
            "total_tokens": len(prompt) + len(tokens),
        }
        roles = [c["choices"][0]["delta"].get("role") for c in said] if path == CHAT else []
        assert roles == (["assistant"] + [None] * len(tokens) if path == CHAT else [])
        sent = [t for chunk in said for t in chunk["choices"][0].get("token_ids") or ()]
        assert sent == tokens
        assert (said[0] if path == CHAT else said[0]["choices"][0])["prompt_token_ids"] == prompt
        assert sum("prompt_token_ids" in repr(chunk) for chunk in chunks) == 1
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in said]
        assert reasons == [None] * (len(said) - 1) + ["length"]
        counted = [chunk["usage"]["completion_tokens"] for chunk in said]
        assert counted[-1] == len(tokens)
        assert counted == sorted(counted)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@in_loop
async def test_an_answer_that_ends_with_the_first_token_needs_no_decode(path: str) -> None:
    start = [] if path == COMPLETIONS else [CONVERSATION_START]
    word = next(f"w{n}" for n in range(2, 9000) if answer_tokens([*start, n], 1) == [EOS])
    async with rig(first_token="prefill") as router:
        body = body_of(path, stream=True) | {"messages": [{"role": "user", "content": word}]}
        body["prompt"] = word
        async with router.post(body, path) as answer:
            chunks = stream_chunks(await answer.read())
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert not router.decode[0].requests
        # One token in all: it ends the answer as well, and what is held for it is let go.
        async with router.post(body_of(path, stream=True, max_tokens=1), path) as answer:
            chunks = stream_chunks(await answer.read())
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert not router.decode[0].requests
        await router.idle()
        while not router.released:
            await asyncio.sleep(0.005)
        assert not router.prefill[0].held


FALLBACKS: list[tuple[str, dict[str, Any]]] = [
    ("not_streaming", {"stream": False}),
    ("logprobs", {"logprobs": 0}),
    ("logprobs", {"logprobs": 3}),
    ("penalties", {"presence_penalty": 0.5}),
    ("penalties", {"frequency_penalty": 0.5}),
    ("penalties", {"repetition_penalty": 1.1}),
    ("structured", {"structured_outputs": {"json": {}}}),
    ("structured", {"response_format": {"type": "json_object"}}),
    ("structured", {"guided_json": {"type": "object"}}),
    ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    ("stop", {"stop": ["x"]}),
    ("stop", {"bad_words": ["x"]}),
    ("min_tokens", {"min_tokens": 2}),
    ("echo", {"echo": True}),
    ("seed", {"seed": 0, "temperature": 0.7}),
    ("other_field", {"a_field_of_tomorrow": 1}),
]


@pytest.mark.parametrize(("reason", "fields"), FALLBACKS)
@in_loop
async def test_what_a_continued_prompt_would_change_is_served_by_decode(
    reason: str, fields: dict[str, Any]
) -> None:
    async with rig(first_token="prefill") as router:
        body = body_of(COMPLETIONS, **{"stream": True, **fields})
        async with router.post(body) as answer:
            assert answer.status == 200
            await answer.read()
        asked = router.decode[0].bodies[0]
        assert asked.pop("kv_transfer_params")["do_remote_prefill"]
        assert asked == body
        assert await router.metric("late_first_token_total", reason=reason) == 1


@in_loop
async def test_a_chat_without_a_limit_is_as_long_as_the_server_has_it() -> None:
    async with rig(first_token="prefill") as router:
        for path, limit in ((CHAT, 40), (COMPLETIONS, 16)):
            for fields in ({}, {"max_tokens": None}):
                body = body_of(path, stream=True, ignore_eos=True)
                del body["max_tokens"]
                async with router.post({**body, **fields}, path) as answer:
                    text = stream_text(await answer.read())
                assert text == text_of(answer_tokens(prompt_of(path, body), limit, True))
        assert await router.metric("late_first_token_total", reason="no_limit") == 2


@pytest.mark.parametrize("first_text", ["", "half \ufffd"])
@in_loop
async def test_a_first_token_without_a_whole_text_comes_from_decode(first_text: str) -> None:
    async with rig(first_token="prefill") as router:
        router.prefill[0].first_text = first_text
        body = body_of(CHAT, stream=True)
        assert await router.text(body, CHAT) == expected(CHAT, body)
        assert router.decode[0].requests[0][0] == CHAT
        assert await router.metric("late_first_token_total", reason="empty_text") == 1


NEUTRAL: list[dict[str, Any]] = [
    {"n": 1, "presence_penalty": 0.0, "repetition_penalty": 1.0, "stop": [], "logprobs": None},
    {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "echo": False},
    {"seed": 7, "temperature": 0},
]


@pytest.mark.parametrize("fields", NEUTRAL)
@in_loop
async def test_fields_at_neutral_values_do_not_cost_the_early_token(fields: dict[str, Any]) -> None:
    async with rig(first_token="prefill") as router:
        body = body_of(COMPLETIONS, stream=True, **fields)
        assert await router.text(body) == expected(COMPLETIONS, body)
        assert isinstance(router.decode[0].bodies[0]["prompt"], list)


ALONE: list[tuple[str, dict[str, Any]]] = [
    ("n", {"n": 2}),
    ("n", {"best_of": 3}),
    ("n", {"use_beam_search": True}),
    ("prompt_logprobs", {"prompt_logprobs": 0}),
    ("prompt_logprobs", {"echo": True, "logprobs": 1}),
]


@pytest.mark.parametrize(("reason", "fields"), ALONE)
@in_loop
async def test_what_one_hand_over_cannot_serve_goes_to_decode_alone(
    reason: str, fields: dict[str, Any]
) -> None:
    async with rig() as router:
        body = body_of(COMPLETIONS, **fields)
        async with router.post(body) as answer:
            assert answer.status == 200
        assert not router.prefill[0].requests
        assert router.decode[0].bodies == [body]
        assert await router.metric("alone_total", reason=reason) == 1


@in_loop
async def test_a_prompt_that_is_not_held_is_computed_by_decode() -> None:
    async with rig() as router:
        router.prefill[0].holds = False
        body = body_of(COMPLETIONS, stream=True)
        assert await router.text(body) == expected(COMPLETIONS, body)
        assert "kv_transfer_params" not in router.decode[0].bodies[0]
        assert await router.metric("alone_total", reason="not_held") == 1


@in_loop
async def test_a_client_cannot_name_whom_to_pull_from() -> None:
    async with rig() as router:
        evil = {"do_remote_prefill": True, "remote_host": "victim", "remote_port": 1}
        body = body_of(COMPLETIONS, kv_transfer_params=evil, ec_transfer_params={"a": 1})
        await router.text(body)
        await router.text({**body, "n": 2})
        for fake in (*router.prefill, *router.decode):
            for asked in fake.bodies:
                assert "victim" not in repr(asked)
                assert "ec_transfer_params" not in asked


@in_loop
async def test_headers_go_through_but_not_those_of_the_connection() -> None:
    async with rig() as router:
        headers = {
            "Authorization": "Bearer key",
            "X-Trace": "t",
            "Connection": "close, X-Hop",
            "X-Hop": "no",
            "TE": "trailers",
            "Proxy-Authorization": "no",
            "Accept-Encoding": "gzip",
            "X-Request-Id": "bad id\twith blanks",
        }
        async with router.post(body_of(COMPLETIONS), headers=headers) as answer:
            request_id = answer.headers["X-Request-Id"]
        assert len(request_id) == 32
        for fake in (*router.prefill, *router.decode):
            got = fake.requests[0][1]
            assert got["Authorization"] == "Bearer key"
            assert got["X-Trace"] == "t"
            assert got["X-Request-Id"] == request_id
            assert got["Accept-Encoding"] == "identity"
            assert not {"X-Hop", "TE", "Proxy-Authorization"} & set(got)


@in_loop
async def test_requests_of_an_hour_are_spread_and_leave_nothing() -> None:
    async with rig(prefill=2, decode=3, first_token="prefill") as router:
        bodies = [body_of(COMPLETIONS, stream=i % 2 == 0, max_tokens=1 + i % 7) for i in range(60)]
        texts = await asyncio.gather(*(router.text(body) for body in bodies))
        assert texts == [expected(COMPLETIONS, body) for body in bodies]
        await router.idle()
        assert all(len(fake.requests) >= 20 for fake in router.prefill)
        assert all(len(fake.requests) >= 10 for fake in router.decode)


def test_the_fake_model_repeats_itself_not() -> None:
    # The other tests tell a lost or doubled token by its text.
    tokens = answer_tokens([3, 4, 5], 40, ignore_eos=True)
    assert len(set(tokens)) > 30
    assert stream_text(b'data: {"choices": [{"text": " w1"}]}\n\ndata: [DONE]\n\n') == " w1"
