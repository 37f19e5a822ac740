"""Bodies, streams and hang-ups through the front door: what the application behind it sees."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from fastapi import Request
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect
from vllm.entrypoints.serve.utils.api_utils import with_cancellation

from tests.unit.kvshare_front_door_app import (
    CHAT,
    KEYS,
    SALTS,
    Servers,
    application,
    bearer,
    sent_salt,
)
from vllm_plugins.kv_connectors.kvshare import front_door
from vllm_plugins.kv_connectors.kvshare.front_door import TenantFrontDoor


@pytest.fixture
def server(tmp_path, monkeypatch):
    return Servers(tmp_path, monkeypatch)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.dictionaries(st.text() | st.just("cache_salt"), json_values, max_size=5) | json_values,
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    st.booleans(),
)
def test_any_body_arrives_with_the_tenants_salt_and_otherwise_unchanged(body, encoding, ascii_only):
    text = json.dumps(body, ensure_ascii=ascii_only).encode(encoding, "surrogatepass")
    door = TenantFrontDoor(app=None)
    door._tenants = front_door.Tenants(SALTS, None)
    scope = {"headers": [(b"authorization", b"Bearer key"), (b"content-length", b"1")]}
    salted = door._salted(scope, text)
    if not isinstance(body, dict):
        assert salted == text and (b"content-length", b"1") in scope["headers"]
        return
    own = body.get("cache_salt")
    wanted = SALTS.salt("key", own if isinstance(own, str) and own else None)
    # As text, since NaN equals nothing.
    assert json.dumps(json.loads(salted)) == json.dumps({**body, "cache_salt": wanted})
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    assert lengths == [str(len(salted)).encode()]


# --- bodies ---


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/raw/x", "application/json"),
        ("/v1/raw/x", "Application/JSON; charset=utf-8"),
        ("/v1/raw/x", "application/json ;x"),
        ("/v1/raw/x", "application/problem+json"),
        ("/v1/raw/x", None),
        ("/invocations", "application/json"),
    ],
)
def test_what_may_be_read_as_json_is_salted_and_its_length_is_right(server, path, kind):
    app = server()
    headers = {**bearer("key"), **({} if kind is None else {"Content-Type": kind})}
    answer = TestClient(app).post(path, content=b'{"a": 1}', headers=headers).json()
    sent = app.state.bodies[-1]
    assert json.loads(sent) == {"a": 1, "cache_salt": SALTS.salt("key", None)}
    assert int(answer["length"]) == answer["read"] == len(sent)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/raw/x", "text/plain"),
        ("/v1/raw/x", "application/x-www-form-urlencoded"),
        ("/v1/raw/x", "multipart/form-data; boundary=b"),
        ("/v1/raw/x", "application/octet-stream"),
        ("/v1/raw/x", "garbage"),
        ("/v1/kvshare/segments", "application/json"),
        ("/collective_rpc", "application/json"),
    ],
)
def test_what_is_no_prompt_is_passed_on_untouched(server, path, kind):
    app = server()
    headers = {**bearer("key"), "Content-Type": kind}
    body = b'{"a":   1, "cache_salt": "x"}'
    answer = TestClient(app).post(path, content=body, headers=headers).json()
    assert app.state.bodies[-1] == body and int(answer["length"]) == len(body)
    assert server.asked == []


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"text"', b"1", b"null", b"{'a': 1}", b"\xff\xfe\xfd", b"\x80",
             b'{"a": ' + b"9" * 5000 + b"}"],
    ids=lambda body: repr(body[:12]),
)  # fmt: skip
def test_what_is_no_json_object_is_left_for_vllm_to_refuse(server, body):
    app = server()
    headers = {**bearer("key"), "Content-Type": "application/json"}
    TestClient(app).post("/v1/raw/x", content=body, headers=headers)
    assert app.state.bodies.pop() == body
    stock = TestClient(application(door=False)).post(CHAT, content=body, headers=headers)
    answer = TestClient(app).post(CHAT, content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json() == stock.json()
    assert app.state.bodies == []


def test_json_too_deep_for_the_door_does_not_pass_it(server):
    """An endpoint with more stack left might read it, and its own salt with it."""
    app = server()
    deep = b"[" * 100_000 + b"]" * 100_000
    body = b'{"cache_salt": "x", "a": ' + deep + b"}"
    headers = {**bearer("key"), "Content-Type": "application/json"}
    answer = TestClient(app).post(CHAT, content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "The request's JSON is nested too deeply."
    assert app.state.bodies == []


def test_a_body_in_many_pieces_arrives_whole(server):
    app = server()
    text = json.dumps({"prompt": "ab" * 500_000}).encode()

    def pieces():
        for start in range(0, len(text), 7000):
            yield text[start : start + 7000]

    headers = {**bearer("key"), "Content-Type": "application/json"}
    answer = TestClient(app).post("/v1/raw/x", content=pieces(), headers=headers).json()
    sent = app.state.bodies[-1]
    assert json.loads(sent) == {**json.loads(text), "cache_salt": SALTS.salt("key", None)}
    assert int(answer["length"]) == len(sent)


def test_a_large_body_is_passed_on(server):
    app = server()
    prompt = list(range(1_000_000))
    assert sent_salt(TestClient(app), {"prompt": prompt}, **bearer("k")) == SALTS.salt("k", None)
    assert json.loads(app.state.bodies[-1])["prompt"] == prompt


def test_paths_below_a_root_path_are_the_same(server):
    app = server(root_path="/proxy")
    salt = sent_salt(TestClient(app), {}, path=f"/proxy{CHAT}", **bearer("key"))
    assert salt == SALTS.salt("key", None)
    assert sent_salt(TestClient(app), {}, **bearer("key")) == SALTS.salt("key", None)


# --- streams and hang-ups ---


def http_scope(headers, path=CHAT):
    headers = {**headers, "Content-Type": "application/json"}
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "root_path": "",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }


def test_a_request_that_is_refused_is_not_read():
    """Whoever has no key cannot make the server buffer and parse what he sends."""
    app = application(keys=KEYS)
    status, received = [], []

    async def receive():
        received.append(1)
        return {"type": "http.request", "body": b"{}", "more_body": True}

    async def send(message):
        status.append(message.get("status"))

    asyncio.run(app(http_scope(bearer("wrong")), receive, send))
    assert status[0] == 401 and received == []


def test_pieces_of_an_answer_are_passed_on_as_they_come(server):
    app, sent = server(), []

    async def receive():
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message):
        sent.append(message)

    async def run():
        scope = http_scope(bearer("key"), "/v1/stream")
        await asyncio.wait_for(app({**scope, "asgi": {"spec_version": "2.4"}}, receive, send), 30)

    asyncio.run(run())
    pieces = [m["body"] for m in sent if m["type"] == "http.response.body"]
    assert pieces == [b"one", b"two", SALTS.salt("key", None).encode(), b""]


class Wire:
    """The client's end: messages to deliver in order, then silence."""

    def __init__(self, *messages):
        self._messages = list(messages)
        self.calls = 0

    async def receive(self):
        self.calls += 1
        if self._messages:
            return self._messages.pop(0)
        await asyncio.Event().wait()
        raise AssertionError("silence does not end")


def through_the_door(wire, app, state=None):
    """Run an ASGI application behind the door until it returns."""

    async def send(message):
        pass

    door = TenantFrontDoor(app)
    door._tenants = front_door.Tenants(SALTS, None)
    scope = {**http_scope(bearer("key")), "app": SimpleNamespace(state=state)}
    asyncio.run(asyncio.wait_for(door(scope, wire.receive, send), 30))


def piece(body, more=False):
    return {"type": "http.request", "body": body, "more_body": more}


GONE = {"type": "http.disconnect"}


def test_after_the_body_the_application_hears_when_the_client_hangs_up():
    seen = []

    async def app(scope, receive, send):
        seen.extend([await receive(), await receive(), await receive()])

    through_the_door(Wire(piece(b'{"a"', True), piece(b": 1}"), GONE, GONE), app)
    assert json.loads(seen[0]["body"]) == {"a": 1, "cache_salt": SALTS.salt("key", None)}
    assert seen[0]["more_body"] is False
    assert seen[1:] == [GONE, GONE]


def test_a_client_that_hangs_up_in_the_middle_of_its_body_is_gone_for_the_application_too():
    async def app(scope, receive, send):
        with pytest.raises(ClientDisconnect):
            await Request(scope, receive).body()

    through_the_door(Wire(piece(b'{"a"', True), GONE), app)


def test_waiting_for_the_body_can_be_given_up_and_taken_up_again():
    seen = []

    async def app(scope, receive, send):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(receive(), 0.01)
        wire._messages.append(piece(b": 1}"))
        seen.append(await receive())

    wire = Wire(piece(b'{"a"', True))
    through_the_door(wire, app)
    assert json.loads(seen[0]["body"])["a"] == 1


def test_the_wire_is_not_touched_before_the_application_asks():
    async def app(scope, receive, send):
        assert wire.calls == 0

    wire = Wire(piece(b"{}"))
    through_the_door(wire, app)


def test_a_hang_up_while_the_answer_is_computed_ends_the_computation(server):
    """vLLM's own way of noticing it, on the body that the door delivers."""
    ended = []

    @with_cancellation
    async def endpoint(body, raw_request):
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def app(scope, receive, send):
        request = Request(scope, receive)
        await endpoint(await request.json(), request)

    through_the_door(Wire(piece(b"{}"), GONE), app, SimpleNamespace())
    assert ended == [True]
