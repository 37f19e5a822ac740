"""Fake prefill, decode and encode instances in the test's loop.

A fake serves vLLM's routes over real HTTP. Its model is a rule: the next token follows from all
tokens before it, so that a stream which lost or doubled a token shows. A token's text is ` w<id>`;
token 0 ends an answer and has no text. Faults are scripted per request.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

EOS = 0
MODEL, MAX_MODEL_LEN = "tiny", 4096
CONVERSATION_START = 1


def tokenize(text: str) -> list[int]:
    """Return the tokens of a text, one for each word."""
    return [_token(word) for word in text.split()]


def _token(word: str) -> int:
    if word[0] == "w" and word[1:].isdigit():
        return int(word[1:])
    return 2 + zlib.crc32(word.encode()) % 900


def next_token(tokens: Sequence[int]) -> int:
    """Return the token that follows; 0 ends the answer."""
    return zlib.crc32(repr(list(tokens)).encode()) % 1000


def answer_tokens(prompt: Sequence[int], limit: int, ignore_eos: bool = False) -> list[int]:
    """Return the tokens of an answer, the end token included if it comes."""
    tokens = list(prompt)
    for _ in range(limit):
        token = next_token(tokens)
        if token == EOS and ignore_eos:
            token = 1
        tokens.append(token)
        if token == EOS:
            break
    return tokens[len(prompt) :]


def text_of(tokens: Sequence[int]) -> str:
    """Return the text of tokens."""
    return "".join("" if token == EOS else f" w{token}" for token in tokens)


def prompt_of(path: str, body: Mapping[str, Any]) -> list[int]:
    """Return the tokens of a request's prompt."""
    if path == "/v1/completions":
        prompt = body["prompt"]
        return tokenize(prompt) if isinstance(prompt, str) else list(prompt)
    return [CONVERSATION_START, *tokenize(" ".join(_words(body["messages"])))]


def _words(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    words = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        words += [part["text"] if part["type"] == "text" else "<image>" for part in parts]
    return words


@dataclass
class Fault:
    """What goes wrong with one request.

    Attributes:
        kind: ``abort`` cuts the connection without an answer; ``status`` answers with one;
            ``hang`` never answers; ``die`` cuts the connection after some events; ``half`` does so
            in the middle of an event; ``end`` ends the stream well-formed but too early; ``error``
            begins with an error event; ``junk`` answers with something else.
        status: For ``status``.
        after: Events before it happens.
    """

    kind: str
    status: int = 500
    after: int = 0


class FakeInstance:
    """One instance of vLLM, as far as a router sees it.

    Attributes:
        requests: Path, headers and body of every generating request, oldest first.
        faults: Of the next requests, in order; a request without one is served.
        gate: Where set, each event of a stream waits to be let through.
        cancelled: Requests whose client left before their end.
        active: Requests being served.
        held: Transfers that were handed out and neither pulled nor released.
        healthy: What ``/health`` says.
        hangs: Whether ``/health`` and ``/metrics`` never answer.
        asked_metrics: How often ``/metrics`` was asked for.
        metrics: What ``/metrics`` says.
        first_text: Replaces the text of an answer's first token.
        holds: Whether a prompt is held for decode.
        peers: What its references say of where its workers are; None for a connector of which
            nothing is known.
        door: Where an encode instance says that it hands embeddings out.
        metadata: What an encode instance says of every medium's placeholders.
    """

    def __init__(self, role: str, model: str = MODEL, max_model_len: int = MAX_MODEL_LEN) -> None:
        self.role = role
        self.url = ""
        self.requests: list[tuple[str, Mapping[str, str], dict[str, Any]]] = []
        self.faults: deque[Fault] = deque()
        self.gate: asyncio.Semaphore | None = None
        self.arrived = asyncio.Semaphore(0)
        self.left = asyncio.Semaphore(0)
        self.cancelled = 0
        self.active = 0
        self.held: set[str] = set()
        self.handed_over: set[str] = set()
        self.healthy = True
        self.hangs = False
        self.asked_metrics = 0
        self.metrics = ""
        self.first_text: str | None = None
        self.holds = True
        self.peers: list[str] | None = None
        self.door = {"address": {"port": id(self)}, "generation": "g"}
        self.metadata: dict[str, Any] = {"image_grid_thw": [[1, 4, 4]]}
        self._models = {"data": [{"id": model, "max_model_len": max_model_len}]}
        self._names = itertools.count()
        self._runner: web.AppRunner | None = None

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """Bodies of the generating requests."""
        return [body for _, _, body in self.requests]

    async def start(self, port: int = 0) -> None:
        """Serve on loopback."""
        app = web.Application(client_max_size=1 << 28)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        app.router.add_get("/v1/models", self._show_models)
        app.router.add_get("/health", self._show_health)
        app.router.add_get("/metrics", self._show_metrics)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    async def stop(self) -> None:
        """Close the port and all connections."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _show_models(self, request: web.Request) -> web.Response:
        return web.json_response(self._models)

    async def _show_health(self, request: web.Request) -> web.Response:
        if self.hangs:
            await asyncio.Event().wait()
        return web.Response(status=200 if self.healthy else 503)

    async def _show_metrics(self, request: web.Request) -> web.Response:
        self.asked_metrics += 1
        if self.hangs:
            await asyncio.Event().wait()
        return web.Response(text=self.metrics)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append((request.path, request.headers.copy(), body))
        self.active += 1
        self.arrived.release()
        try:
            return await self._serve(request, body)
        except (asyncio.CancelledError, ConnectionResetError):
            self.cancelled += 1
            raise
        finally:
            self.active -= 1
            self.left.release()

    async def _serve(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        fault = self.faults.popleft() if self.faults else None
        if fault and fault.kind == "abort":
            _cut(request)
            return web.Response()
        if fault and fault.kind == "hang":
            await asyncio.Event().wait()
        if fault and fault.kind == "status":
            error = {"message": f"scripted {fault.status}", "code": fault.status}
            return web.json_response({"error": error}, status=fault.status)
        if fault and fault.kind == "junk":
            return web.Response(text="<html>", content_type="text/html")
        if self.role == "encode":
            if self.gate is not None:
                await self.gate.acquire()
            return web.json_response(self._encoded(body))
        transfer = body.get("kv_transfer_params") or {}
        if transfer.get("do_remote_prefill"):
            self.handed_over.add(transfer["vllm_plugins_pd"]["transfer_id"])
        answer = _Answer(self, request, body)
        return await answer.stream(fault) if body.get("stream") else await answer.whole()

    def _encoded(self, body: dict[str, Any]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for index, part in enumerate(body["messages"][0]["content"]):
            # vLLM names what is processed in a special way by a digest of its own.
            key = part["uuid"] + ("-processed" if "mm_processor_kwargs" in body else "")
            entry = entries.setdefault(key, {"item_indices": [], "metadata": self.metadata})
            entry["item_indices"].append(index)
            entry["vllm_plugins_epd"] = {"num_tokens": 16, "lease": "l", **self.door}
        choice = {"index": 0, "message": {"content": ""}, "finish_reason": "stop"}
        return {"choices": [choice], "ec_transfer_params": entries}

    def hold(self, chosen: str | None = None) -> dict[str, Any]:
        """Return the reference to a prompt that is held from now on."""
        name = chosen or f"{self.url}/{next(self._names)}"
        self.held.add(name)
        peers = {} if self.peers is None else {"version": 1, "peers": self.peers}
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "vllm_plugins_pd": {"transfer_id": name, **peers},
        }


class _Answer:
    """One answer of a fake instance, in vLLM's form."""

    def __init__(self, fake: FakeInstance, request: web.Request, body: Mapping[str, Any]) -> None:
        self._fake = fake
        self._request = request
        self._body = body
        self._chat = request.path.endswith("/chat/completions")
        self._prompt = prompt_of(request.path, body)
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        if limit is None:
            # As vLLM has it, where null is the default too.
            limit = 40 if self._chat else 16
        self._tokens = answer_tokens(self._prompt, limit, bool(body.get("ignore_eos")))
        self._ids = bool(body.get("return_token_ids"))
        self._id = ("chatcmpl-" if self._chat else "cmpl-") + request.headers["X-Request-Id"]

    async def whole(self) -> web.Response:
        if self._fake.gate is not None:
            await self._fake.gate.acquire()
        said: dict[str, Any] = {"text": self._text(self._tokens)}
        if self._chat:
            said = {"message": {"role": "assistant", "content": self._text(self._tokens)}}
        choice = {
            "index": 0,
            **said,
            "logprobs": None,
            "finish_reason": self._finish(len(self._tokens)),
        }
        value = self._head("chat.completion" if self._chat else "text_completion")
        value |= {"choices": [choice], "usage": self._usage(len(self._tokens))}
        if self._ids:
            (value if self._chat else choice)["prompt_token_ids"] = self._prompt
            choice["token_ids"] = self._tokens
        asked = self._body.get("kv_transfer_params") or {}
        if asked.get("do_remote_decode") and self._fake.holds and self._tokens[-1] != EOS:
            chosen = asked.get("vllm_plugins_pd", {}).get("transfer_id")
            value["kv_transfer_params"] = self._fake.hold(chosen)
        return web.json_response(value)

    async def stream(self, fault: Fault | None) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(self._request)
        events = [*self._events(), b"data: [DONE]\n\n"]
        if fault and fault.kind == "error":
            events.insert(0, b'data: {"error": {"message": "scripted", "code": 500}}\n\n')
        for count, event in enumerate(events):
            if self._fake.gate is not None:
                await self._fake.gate.acquire()
            if fault and count == fault.after and fault.kind in ("die", "half", "end"):
                if fault.kind == "half":
                    await response.write(event[: len(event) // 2])
                if fault.kind != "end":
                    # What was written must be on its way before the connection is cut.
                    await asyncio.sleep(0.02)
                    _cut(self._request)
                return response
            await response.write(event)
        return response

    def _events(self) -> list[bytes]:
        events = []
        if self._chat:
            choice = {
                "index": 0,
                "delta": {"role": "assistant", "content": ""},
                "finish_reason": None,
            }
            first = self._head("chat.completion.chunk") | {"choices": [choice]}
            if self._ids:
                first["prompt_token_ids"] = self._prompt
            events.append(first)
        events += [self._event(count) for count in range(1, len(self._tokens) + 1)]
        if (self._body.get("stream_options") or {}).get("include_usage"):
            usage = self._usage(len(self._tokens))
            events.append(events[-1] | {"choices": [], "usage": usage})
        return [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]

    def _event(self, count: int) -> dict[str, Any]:
        text = self._text(self._tokens[count - 1 : count])
        said = {"delta": {"content": text}} if self._chat else {"text": text}
        choice: dict[str, Any] = {"index": 0, **said, "finish_reason": self._finish(count)}
        if self._ids:
            choice["token_ids"] = self._tokens[count - 1 : count]
            if count == 1 and not self._chat:
                choice["prompt_token_ids"] = self._prompt
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return self._head(kind) | {"choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": 1700000000, "model": self._body["model"]}

    def _text(self, tokens: Sequence[int]) -> str:
        if self._fake.first_text is not None and list(tokens) == self._tokens[:1]:
            return self._fake.first_text
        return text_of(tokens)

    def _finish(self, count: int) -> str | None:
        if count < len(self._tokens):
            return None
        return "stop" if self._tokens[-1:] == [EOS] else "length"

    def _usage(self, count: int) -> dict[str, int]:
        prompt = len(self._prompt)
        return {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}


def _cut(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.abort()
