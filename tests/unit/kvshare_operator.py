"""A server with the operator's endpoints, and engines that answer its orders from a table."""

import asyncio
from argparse import Namespace
from types import SimpleNamespace

from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.plugins.endpoint_plugins.interface import (
    attach_endpoint_plugins,
    init_endpoint_plugins_state,
)

from vllm_plugins.kv_connectors.kvshare import operator_api
from vllm_plugins.kv_connectors.kvshare.front_door import TenantFrontDoor
from vllm_plugins.kv_connectors.kvshare.operator_api import KEY_HEADER, OperatorApi
from vllm_plugins.kv_connectors.kvshare.plugin import KVShareOptions, KVSharePlugin
from vllm_plugins.kv_connectors.kvshare.tenancy import OperatorOrders
from vllm_plugins.registry import Enabled

KEY = "operator-key-" + "x" * 32
STORE, SEGMENTS, DOMAINS = (f"/v1/kvshare/{name}" for name in ("store", "segments", "domains"))
EMPTY = {"capacity_tokens": 9, "used_tokens": 0, "segments": 0, "domains": [], "canonical": []}
REGISTERED = {"tokens": 30, "segments": 2}
EVICTED = {"evicted_segments": 2, "evicted_tokens": 30}
ANSWERS = {"inspect": EMPTY, "register": REGISTERED, "evict": EVICTED}
MAX_MODEL_LEN = 40


class FakeRenderer:
    """Word `t7` is token 7."""

    bos: int | None = 1

    def get_bos_token_id(self):
        return self.bos

    async def tokenize_prompt_async(self, prompt, params):
        assert params.add_special_tokens is False and params.max_total_tokens == MAX_MODEL_LEN
        return {"prompt_token_ids": [int(word[1:]) for word in prompt["prompt"].split()]}


class FakeEngine:
    """An engine whose scheduler's side answers from a table; the key is the operator's."""

    def __init__(self, ranks=1, local_ranks=None):
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(
                data_parallel_size=ranks,
                data_parallel_size_local=local_ranks or ranks,
                local_engines_only=local_ranks is not None,
            )
        )
        self.model_config = SimpleNamespace(max_model_len=MAX_MODEL_LEN)
        self.renderer = FakeRenderer()
        self.seen = []
        self.verifier = OperatorOrders(KEY.encode())

    def reply(self, order, rank):
        return ANSWERS[order["do"]]

    async def generate(self, prompt, params, request_id, *, data_parallel_rank=None):
        signed = params.extra_args["kv_transfer_params"]["kvshare"]["operator"]
        order = self.verifier.verify(signed)
        # Bound to this very request.
        assert order.pop("salt") == prompt["cache_salt"]
        self.seen.append(
            SimpleNamespace(
                order=order, prompt=prompt, params=params, id=request_id, rank=data_parallel_rank
            )
        )
        answer = self.reply(order, data_parallel_rank)
        yield SimpleNamespace(kv_transfer_params={"kvshare": {"operator": answer}})


class TextStore(FakeEngine):
    """An engine with a store of named texts, as far as orders can tell."""

    def __init__(self):
        super().__init__()
        self.texts = {}

    def reply(self, order, rank):
        name, tokens = order.get("name"), self.seen[-1].prompt["prompt_token_ids"]
        if order["do"] == "register":
            self.texts[name] = tokens[order["context"] :]
            return {"tokens": len(self.texts[name]), "segments": 1}
        if order["do"] == "evict":
            if name not in self.texts:
                return {"error": f"no text is named {name!r}"}
            return {"evicted_segments": 1, "evicted_tokens": len(self.texts.pop(name))}
        rows = [
            {"name": name, "tokens": len(text), "segments": 1, "hits": 0}
            for name, text in self.texts.items()
        ]
        return {**EMPTY, "canonical": rows}


class Servers:
    """Makes clients of servers with the endpoints, through vLLM's own phases of wiring."""

    def __init__(self, folder, monkeypatch):
        self.key_file = folder / "operator"
        self.key_file.write_text(KEY + "\n")
        self.key_file.chmod(0o600)
        self._monkeypatch = monkeypatch

    def __call__(self, engine, plugin_on=True, with_key=True, api_key=None, front=False):
        options = KVShareOptions(operator_key_file=self.key_file if with_key else None)
        enabled = [Enabled(KVSharePlugin(), options)] if plugin_on else []
        patch = self._monkeypatch.setattr
        patch(operator_api, "enabled_plugins", lambda config: enabled)
        patch("vllm.plugins.load_endpoint_plugins", lambda tasks: [OperatorApi()])
        app = FastAPI()
        app.state.args = SimpleNamespace(log_error_stack=False)
        app.state.engine_client, app.state.vllm_config = engine, object()
        attach_endpoint_plugins(app, ("generate",))
        init_exception_handler(app)
        if api_key:
            app.add_middleware(AuthenticationMiddleware, tokens=[api_key])
        if front:
            app.add_middleware(TenantFrontDoor)
        asyncio.run(init_endpoint_plugins_state(engine, app.state, Namespace()))
        return TestClient(app, raise_server_exceptions=False, headers={KEY_HEADER: KEY})


def error_of(answer, status):
    """The message of a refusal, in vLLM's format."""
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, status) and error["type"]
    return error["message"]


REQUESTS = [
    ("GET", STORE, None),
    ("POST", SEGMENTS, {"name": "manual", "text": "t5 t6"}),
    ("DELETE", f"{SEGMENTS}/manual", None),
    ("DELETE", f"{DOMAINS}/0123456789abcdef", None),
    ("DELETE", STORE, None),
]
