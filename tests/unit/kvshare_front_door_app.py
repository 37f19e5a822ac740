"""A server behind KVShare's front door, with the routes that its tests need."""

import json
from types import SimpleNamespace

from fastapi import Depends, FastAPI, Request
from starlette.responses import StreamingResponse
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation

from vllm_plugins.kv_connectors.kvshare import front_door
from vllm_plugins.kv_connectors.kvshare.front_door import TenantFrontDoor
from vllm_plugins.kv_connectors.kvshare.plugin import KVShareOptions, KVSharePlugin
from vllm_plugins.kv_connectors.kvshare.tenancy import TenantSalts
from vllm_plugins.registry import Enabled

SECRET = b"0123456789abcdef" * 4
SALTS = TenantSalts(SECRET)
CHAT = "/v1/chat/completions"
KEYS = ("key-of-acme", "key-of-brown")
CONFIG = object()
JSON = {"Content-Type": "application/json"}


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


class Servers:
    """Makes servers behind the front door, as vLLM puts one together.

    Attributes:
        asked: Engine configurations whose plug-ins the front door asked for.
    """

    def __init__(self, folder, monkeypatch):
        self.asked = []
        self.secret = folder / "secret"
        self.secret.write_bytes(SECRET)
        self.secret.chmod(0o600)
        self._monkeypatch = monkeypatch

    def __call__(self, header=None, keys=(), root_path=""):
        chosen = KVShareOptions(
            sharing_scope="tenant", tenant_secret_file=self.secret, tenant_header=header
        )

        def enabled(config):
            self.asked.append(config)
            return [Enabled(KVSharePlugin(), chosen)]

        self._monkeypatch.setattr(front_door, "enabled_plugins", enabled)
        return application(keys, root_path)


def application(keys=(), root_path="", door=True):
    app = FastAPI(root_path=root_path)
    app.state.vllm_config, app.state.engine_client = CONFIG, object()
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.state.bodies = []
    add_routes(app)
    init_exception_handler(app)
    if keys:
        app.add_middleware(AuthenticationMiddleware, tokens=list(keys))
    if door:
        app.add_middleware(TenantFrontDoor)
    return app


def add_routes(app):
    @app.post(CHAT, dependencies=[Depends(validate_json_request)])
    @with_cancellation
    async def chat(request: dict, raw_request: Request):
        app.state.bodies.append(await raw_request.body())
        return request

    @app.post("/v1/raw/{rest:path}")
    @app.post("/invocations")
    @app.post("/v1/kvshare/segments")
    @app.post("/collective_rpc")
    async def raw(request: Request, rest: str = ""):
        body = await request.body()
        app.state.bodies.append(body)
        return {"length": request.headers.get("content-length"), "read": len(body)}

    @app.post("/v1/stream")
    async def stream(request: Request):
        body = await request.json()

        async def words():
            for word in ("one", "two", body["cache_salt"]):
                yield word

        return StreamingResponse(words())

    @app.get("/v1/models")
    async def models():
        return {}

    @app.post("/v1/cancel")
    async def cancel():
        return {"cancelled": True}


def sent_salt(client, body, path=CHAT, **headers):
    answer = client.post(path, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return json.loads(client.app.state.bodies[-1])["cache_salt"]
