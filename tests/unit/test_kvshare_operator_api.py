"""The operator's endpoints: who may use them, and what reaches the engine."""

import json

import pytest
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
from vllm.sampling_params import RequestOutputKind

from tests.unit.kvshare_operator import (
    DOMAINS,
    EMPTY,
    EVICTED,
    KEY,
    MAX_MODEL_LEN,
    REGISTERED,
    REQUESTS,
    SEGMENTS,
    STORE,
    FakeEngine,
    Servers,
    error_of,
)
from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.kvshare import front_door
from vllm_plugins.kv_connectors.kvshare.operator_api import KEY_HEADER, OperatorApi
from vllm_plugins.kv_connectors.kvshare.operator_desk import prompt_digest
from vllm_plugins.kv_connectors.kvshare.segments import as_tokens

each_request = pytest.mark.parametrize(("method", "path", "body"), REQUESTS)


@pytest.fixture
def serve(tmp_path, monkeypatch):
    return Servers(tmp_path, monkeypatch)


# --- what reaches the engine ---


@pytest.mark.parametrize(
    ("request_of", "order", "answer"),
    [
        (REQUESTS[0], {"do": "inspect"}, EMPTY),
        (REQUESTS[2], {"do": "evict", "what": "canonical", "name": "manual"}, EVICTED),
        (REQUESTS[3], {"do": "evict", "what": "domain", "name": "0123456789abcdef"}, EVICTED),
        (REQUESTS[4], {"do": "evict", "what": "all", "name": ""}, EVICTED),
    ],
)
def test_orders_without_a_text_travel_with_a_request_of_one_token(serve, request_of, order, answer):
    engine = FakeEngine()
    method, path, body = request_of
    said = serve(engine).request(method, path, json=body)
    assert (said.status_code, said.json()) == (200, answer)
    (sent,) = engine.seen
    assert sent.order == order and sent.rank is None
    assert sent.prompt["type"] == "token" and sent.prompt["prompt_token_ids"] == [0]


def test_a_request_ends_after_one_token_and_its_blocks_are_nobody_elses(serve):
    engine = FakeEngine()
    client = serve(engine)
    for method, path, body in REQUESTS:
        assert client.request(method, path, json=body).status_code == 200
    for sent in engine.seen:
        assert (sent.params.max_tokens, sent.params.temperature) == (1, 0)
        assert sent.params.output_kind == RequestOutputKind.FINAL_ONLY
        assert sent.prompt["cache_salt"].startswith("kvshare.canonical.")
    assert len({sent.prompt["cache_salt"] for sent in engine.seen}) == len(REQUESTS)
    assert len({sent.id for sent in engine.seen}) == len(REQUESTS)


@pytest.mark.parametrize(
    ("body", "bos", "prompt", "context"),
    [
        ({"text": "t5 t6"}, 1, [1, 5, 6], 1),
        ({"text": "t5 t6"}, None, [5, 6], 0),
        ({"token_ids": [5, 6]}, 1, [1, 5, 6], 1),
        ({"text": "t5", "context": "t8 t9"}, 1, [1, 8, 9, 5], 3),
        ({"text": "t5", "context": "t8 t9"}, None, [8, 9, 5], 2),
        ({"text": "t5", "context": [8]}, 1, [8, 5], 1),
        ({"token_ids": [5], "context": []}, 1, [5], 0),
        ({"token_ids": [0, 2**31 - 1], "context": None}, None, [0, 2**31 - 1], 0),
    ],
)
def test_a_text_is_registered_behind_its_context(serve, body, bos, prompt, context):
    engine = FakeEngine()
    engine.renderer.bos = bos
    said = serve(engine).post(SEGMENTS, json={"name": "manual", **body})
    assert (said.status_code, said.json()) == (200, REGISTERED)
    (sent,) = engine.seen
    assert sent.prompt["prompt_token_ids"] == prompt
    assert sent.order == {
        "do": "register",
        "name": "manual",
        "context": context,
        "prompt": prompt_digest(as_tokens(prompt)),
    }


def test_a_text_may_fill_the_model_but_for_one_token(serve):
    engine = FakeEngine()
    client = serve(engine)
    most = {"name": "n", "token_ids": [5] * (MAX_MODEL_LEN - 2)}
    assert client.post(SEGMENTS, json=most).status_code == 200
    more = {"name": "n", "token_ids": [5] * (MAX_MODEL_LEN - 1)}
    message = error_of(client.post(SEGMENTS, json=more), 400)
    assert message == "The text and its context are 40 tokens; at most 39 fit."
    assert len(engine.seen) == 1


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": "n"},
        {"name": "n", "text": None},
        {"name": "n", "text": ""},
        {"name": "n", "text": 5},
        {"name": "n", "text": "t5", "token_ids": [5]},
        {"name": "n", "token_ids": []},
        {"name": "n", "token_ids": [-1]},
        {"name": "n", "token_ids": [2**31]},
        {"name": "n", "token_ids": [True]},
        {"name": "n", "token_ids": [1.0]},
        {"name": "n", "token_ids": ["1"]},
        {"name": "n", "token_ids": "t5"},
        {"name": "n", "text": "t5", "context": ""},
        {"name": "n", "text": "t5", "context": [-1]},
        {"name": "n", "text": "t5", "contxt": "t8"},
        {"name": "n", "text": "t5", "cache_salt": "x"},
        {"text": "t5"},
        {"name": "", "text": "t5"},
        {"name": "a" * 65, "text": "t5"},
        {"name": "-a", "text": "t5"},
        {"name": "a/b", "text": "t5"},
        {"name": "a\n", "text": "t5"},
        {"name": "ä", "text": "t5"},
        {"name": 5, "text": "t5"},
        [],
        "text",
    ],
    ids=lambda body: json.dumps(body)[:40],
)
def test_a_wrong_registration_is_refused_before_the_engine_hears_of_it(serve, body):
    engine = FakeEngine()
    error_of(serve(engine).post(SEGMENTS, json=body), 400)
    assert engine.seen == []


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (f"{SEGMENTS}/-a", 400),
        (f"{SEGMENTS}/{'a' * 65}", 400),
        (f"{DOMAINS}/0123", 400),
        (f"{DOMAINS}/0123456789ABCDEF", 400),
        (f"{DOMAINS}/0123456789abcdef0", 400),
        (f"{DOMAINS}/0123456789abcdef%0A", 400),
    ],
)
def test_a_name_that_none_can_have_is_refused(serve, path, status):
    engine = FakeEngine()
    error_of(serve(engine).delete(path), status)
    assert engine.seen == []


@pytest.mark.parametrize("content", [b"{", b"", b'{"name": "n", "text": "t5"'])
def test_a_malformed_body_is_refused(serve, content):
    headers = {"Content-Type": "application/json"}
    error_of(serve(FakeEngine()).post(SEGMENTS, content=content, headers=headers), 400)


def test_a_body_that_is_not_declared_as_json_is_refused(serve):
    content = b'{"name": "n", "text": "t5"}'
    headers = {"Content-Type": "text/plain"}
    error_of(serve(FakeEngine()).post(SEGMENTS, content=content, headers=headers), 400)


def test_behind_the_front_door_a_registration_arrives_as_it_was_sent(serve, monkeypatch):
    monkeypatch.setattr(front_door, "enabled_plugins", lambda config: pytest.fail("asked"))
    engine = FakeEngine()
    said = serve(engine, front=True).post(SEGMENTS, json={"name": "manual", "text": "t5"})
    assert said.status_code == 200 and engine.seen[0].order["name"] == "manual"


# --- who may ---


@each_request
@pytest.mark.parametrize("key", [None, "", "wrong", KEY[:-1], KEY + "x", KEY.upper(), "ä"])
def test_without_the_operators_key_nothing_reaches_the_engine(serve, method, path, body, key):
    engine = FakeEngine()
    client = serve(engine)
    del client.headers[KEY_HEADER]
    headers = {} if key is None else {KEY_HEADER: key.encode("latin-1")}
    message = error_of(client.request(method, path, json=body, headers=headers), 401)
    assert message == f"The header {KEY_HEADER} does not hold the operator's key."
    assert KEY not in message and engine.seen == []


def test_the_key_is_asked_for_before_the_body_is_judged(serve):
    client = serve(FakeEngine())
    error_of(client.post(SEGMENTS, json={}, headers={KEY_HEADER: "wrong"}), 401)


@each_request
def test_the_api_key_is_demanded_too(serve, method, path, body):
    engine = FakeEngine()
    client = serve(engine, api_key="api")
    assert client.request(method, path, json=body).status_code == 401
    assert engine.seen == []
    headers = {"Authorization": "Bearer api"}
    assert client.request(method, path, json=body, headers=headers).status_code == 200


@each_request
def test_without_the_plugin_there_is_no_such_thing(serve, method, path, body):
    client = serve(FakeEngine(), plugin_on=False)
    message = error_of(client.request(method, path, json=body), 404)
    assert message == "The server runs without --plugin kvshare."


@each_request
def test_without_a_key_file_there_is_no_operator(serve, method, path, body):
    client = serve(FakeEngine(), with_key=False)
    message = error_of(client.request(method, path, json=body), 409)
    assert message == "--plugin kvshare has no operator_key_file, so no operator."


def test_a_server_without_an_engine_has_nothing_to_show(serve):
    error_of(serve(None).get(STORE), 404)


def test_a_key_file_that_others_may_read_keeps_the_server_from_starting(serve):
    serve.key_file.chmod(0o644)
    with pytest.raises(PluginError, match="operator_key_file"):
        serve(FakeEngine())


def test_it_is_an_endpoint_plugin_by_vllms_own_protocol():
    assert isinstance(OperatorApi(), EndpointPlugin)
    assert OperatorApi.name == "kvshare_operator" and OperatorApi.required_tasks == ("generate",)
