"""The front door: whose each request is, and that nobody gets into another's domain."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient
from vllm.entrypoints.generate.base.protocol import validate_cache_salt
from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

from tests.unit.kvshare_front_door_app import (
    CHAT,
    CONFIG,
    KEYS,
    SALTS,
    Servers,
    application,
    bearer,
    sent_salt,
)
from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.kvshare import front_door
from vllm_plugins.kv_connectors.kvshare.front_door import PROMPT_PATHS, TenantFrontDoor
from vllm_plugins.kv_connectors.kvshare.plugin import FRONT_DOOR, KVShareOptions, KVSharePlugin
from vllm_plugins.registry import Enabled


@pytest.fixture
def server(tmp_path, monkeypatch):
    return Servers(tmp_path, monkeypatch)


# --- whose request it is ---


def test_a_request_gets_the_salt_of_its_api_key(server):
    client = TestClient(server())
    salts = [sent_salt(client, {"x": 1}, **bearer(key)) for key in KEYS]
    assert salts == [SALTS.salt(key, None) for key in KEYS]


def test_the_rest_of_the_body_arrives_as_it_was(server):
    client = TestClient(server())
    body = {"messages": [{"content": 'grüße 日本 \U0001f600 \\ " \0', "n": 1e-300}], "b": None}
    assert client.post(CHAT, json=body, headers=bearer("k")).json() == {
        **body,
        "cache_salt": SALTS.salt("k", None),
    }


@pytest.mark.parametrize("header", ["Bearer key", "bearer key", "BEARER key", "bEaReR key"])
def test_the_key_is_read_as_vllm_reads_it(server, header):
    client = TestClient(server(keys=["key"]))
    assert sent_salt(client, {}, Authorization=header) == SALTS.salt("key", None)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic a2V5", "key"])
def test_a_request_without_a_key_shares_with_nobody_not_even_itself(server, header):
    client = TestClient(server())
    headers = {} if header is None else {"Authorization": header}
    salts = [sent_salt(client, {"cache_salt": "mine"}, **headers) for _ in range(3)]
    assert len(set(salts)) == 3
    for salt in salts:
        assert SALTS.domain(salt) is None
        validate_cache_salt(salt)


def test_with_a_header_the_key_says_nothing(server):
    client = TestClient(server(header="X-Tenant"))
    named = sent_salt(client, {}, **bearer("key"), **{"x-tenant": " acme "})
    assert named == SALTS.salt("acme", None)
    assert SALTS.domain(sent_salt(client, {}, **bearer("key"))) is None
    assert SALTS.domain(sent_salt(client, {}, **{"X-Tenant": "  "})) is None


def test_a_tenant_header_that_came_twice_names_nobody(server):
    """A gateway that adds its header to the client's own has not said who the tenant is."""
    client = TestClient(server(header="X-Tenant"))
    headers = [("X-Tenant", "victim"), ("X-Tenant", "thief")]
    assert client.post(CHAT, json={}, headers=headers).status_code == 200
    assert SALTS.domain(json.loads(client.app.state.bodies[-1])["cache_salt"]) is None


def test_of_two_keys_the_one_counts_that_vllm_checks(server):
    app = server(keys=KEYS)
    client = TestClient(app)
    headers = [("Authorization", f"Bearer {key}") for key in (KEYS[0], "wrong")]
    assert client.post(CHAT, json={}, headers=headers).status_code == 200
    assert json.loads(app.state.bodies[-1])["cache_salt"] == SALTS.salt(KEYS[0], None)
    assert client.post(CHAT, json={}, headers=headers[::-1]).status_code == 401


# --- the client's own salt ---


@pytest.mark.parametrize(
    "own", ["mine", "kvshare.", "kvshare.unsigned.00", "a@b/c\\", "x" * 1000, "\ud800", "é", "\0"]
)
def test_a_clients_own_salt_divides_its_tenants_domain(server, own):
    client = TestClient(server())
    body = json.dumps({"cache_salt": own})
    headers = {**bearer("key"), "Content-Type": "application/json"}
    assert client.post(CHAT, content=body, headers=headers).status_code == 200
    salt = json.loads(client.app.state.bodies[-1])["cache_salt"]
    assert salt == SALTS.salt("key", own) != SALTS.salt("key", None)


def test_a_stolen_salt_leads_into_a_corner_of_the_thiefs_own_domain(server):
    client = TestClient(server())
    stolen = SALTS.salt("victim", None)
    salt = sent_salt(client, {"cache_salt": stolen}, **bearer("thief"))
    assert salt == SALTS.salt("thief", stolen)
    assert SALTS.domain(sent_salt(client, {"cache_salt": stolen})) is None


@pytest.mark.parametrize("own", [None, "", 0, 1, True, 1.5, ["a"], {"a": "b"}])
def test_an_own_salt_that_is_no_text_counts_as_none(server, own):
    client = TestClient(server())
    assert sent_salt(client, {"cache_salt": own}, **bearer("key")) == SALTS.salt("key", None)


def test_of_a_repeated_field_the_last_counts_and_only_ours_is_passed_on(server):
    app = server()
    body = b'{"cache_salt": "a", "x": 1, "x": 2, "cache_salt": "b", "cache_\\u0073alt": "c"}'
    headers = {**bearer("key"), "Content-Type": "application/json"}
    assert TestClient(app).post(CHAT, content=body, headers=headers).json()["x"] == 2
    sent = app.state.bodies[-1]
    assert sent.count(b"salt") == 1
    assert json.loads(sent)["cache_salt"] == SALTS.salt("key", "c")


def test_everything_that_vllm_guards_is_behind_the_door():
    assert set(GUARDED_PREFIX) <= set(PROMPT_PATHS)


# --- what does not concern it ---


def test_other_methods_and_connections_cost_nothing(server):
    app = server()
    client = TestClient(app)
    assert client.get("/v1/models", headers=bearer("key")).status_code == 200
    assert client.options(CHAT).status_code == 405
    assert client.post("/health").status_code == 404
    assert server.asked == []


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
def test_other_connections_are_passed_on_as_they_are(kind):
    seen = []

    async def app(scope, receive, send):
        seen.append((scope, receive, send))

    scope, receive, send = {"type": kind, "path": "/v1/realtime"}, object(), object()
    asyncio.run(TenantFrontDoor(app)(scope, receive, send))
    ((passed, *ends),) = seen
    assert passed is scope and ends == [receive, send]


def test_an_endpoint_that_reads_no_body_is_served(server):
    answer = TestClient(server()).post("/v1/cancel", headers=bearer("key"))
    assert answer.json() == {"cancelled": True}


# --- where it cannot know ---


def refused(app, **headers):
    answer = TestClient(app, raise_server_exceptions=False).post(CHAT, json={}, headers=headers)
    assert app.state.bodies == []
    return answer.status_code, answer.json()["error"]


def test_options_and_secret_are_read_once(server):
    app = server()
    for _ in range(3):
        sent_salt(TestClient(app), {}, **bearer("key"))
    assert server.asked == [CONFIG]


@pytest.mark.parametrize("prepare", ["no config", "another plug-in", "no secret", "bad secret"])
def test_a_server_that_cannot_tell_its_tenants_serves_none(server, monkeypatch, caplog, prepare):
    app = server()
    if prepare == "no config":
        del app.state.vllm_config
    elif prepare == "another plug-in":
        monkeypatch.setattr(front_door, "enabled_plugins", lambda config: [])
    elif prepare == "no secret":
        item = Enabled(KVSharePlugin(), KVShareOptions())
        monkeypatch.setattr(front_door, "enabled_plugins", lambda config: [item])
    else:
        (item,) = front_door.enabled_plugins(CONFIG)
        item.options.tenant_secret_file.chmod(0o644)
    status, error = refused(app, **bearer("key"))
    assert status == 503
    assert error["message"] == "The server cannot tell whose the request is. Its log says why."
    assert "/" not in json.dumps(error)


def test_a_refusal_by_the_configuration_is_a_503_too(server, monkeypatch):
    def enabled(config):
        raise PluginError("--plugin kvshare", "no", "do")

    app = server()
    monkeypatch.setattr(front_door, "enabled_plugins", enabled)
    assert refused(app, **bearer("key"))[0] == 503


def test_who_may_not_come_in_does_not_hear_of_it(server):
    app = server(keys=KEYS)
    del app.state.vllm_config
    answer = TestClient(app).post(CHAT, json={}, headers=bearer("wrong"))
    assert answer.status_code == 401


def test_a_mended_secret_is_taken_without_a_restart(server):
    app = server()
    (item,) = front_door.enabled_plugins(CONFIG)
    item.options.tenant_secret_file.chmod(0o644)
    assert refused(app, **bearer("key"))[0] == 503
    item.options.tenant_secret_file.chmod(0o600)
    assert sent_salt(TestClient(app), {}, **bearer("key")) == SALTS.salt("key", None)


def test_a_render_server_passes_requests_on(server):
    """It has no engine and stores nothing; the engine's own front door signs what it rendered."""
    app = server()
    app.state.engine_client = None
    assert sent_salt(TestClient(app), {"cache_salt": "mine"}, **bearer("key")) == "mine"
    assert server.asked == []


def test_vllm_loads_it_by_name_outside_its_own_check_of_keys(server):
    server()
    app = application(door=False)
    args = SimpleNamespace(
        **{name: ["*"] for name in ("allowed_origins", "allowed_methods", "allowed_headers")},
        allow_credentials=False,
        api_key=list(KEYS),
        enable_request_id_headers=False,
        middleware=[FRONT_DOOR],
    )
    init_entrypoints_middleware(args, app, ())
    assert app.user_middleware[0].cls is TenantFrontDoor
    assert sent_salt(TestClient(app), {}, **bearer(KEYS[1])) == SALTS.salt(KEYS[1], None)
