"""Request bodies: what a client asked, and what prefill and decode instances are asked for it.

The hand-over is stock vLLM's: the prefill instance is asked for one token with
``do_remote_decode``, and the ``kv_transfer_params`` of its answer go unchanged to the decode
instance. Every connector with that protocol works, NixlConnector as well as ``pd``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_plugins.router.answers import RefusedError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# What names a peer to pull from. It comes from instances alone: a client that could set it would
# make an instance read whatever the client names.
TRANSFER_FIELDS = ("kv_transfer_params", "ec_transfer_params")
REMOTE_DECODE: Mapping[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
# The plug-in's own way to say that an instance which also prefills shall hand its embeddings out.
PUBLISH: Mapping[str, Any] = {"vllm_plugins_epd": {"publish": True}}
# What the router counts with.
COUNTS = ("max_tokens", "max_completion_tokens", "min_tokens")
# vLLM's own default for completions, which chat does not have; null means the same there.
DEFAULT_COMPLETION_TOKENS = 16
# Good enough to compare queues: English text in today's vocabularies.
BYTES_PER_TOKEN = 4
# Only a guess for the queue at a prefill instance; the encoder's own count replaces none of it.
TOKENS_PER_MEDIUM = 576


@dataclass(frozen=True)
class Call:
    """One request of a client.

    Attributes:
        path: Route, ``COMPLETIONS`` or ``CHAT``.
        body: The parsed body, without what only instances may say.
        request_id: Passed on to every instance and back to the client.
        headers: Of the request, as they go to instances.
        arrival: Monotonic time in seconds.
        deadline: Monotonic time in seconds at which the client is given up.
    """

    path: str
    body: Mapping[str, Any]
    request_id: str
    headers: Mapping[str, str]
    arrival: float
    deadline: float

    @property
    def is_chat(self) -> bool:
        """Whether the answer has chat's form."""
        return self.path == CHAT

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream."""
        return bool(self.body.get("stream"))

    @property
    def max_tokens(self) -> int | None:
        """Most tokens that the client wants; None where the server decides."""
        return max_tokens(self.path, self.body)


def parse_body(raw: bytes) -> dict[str, Any]:
    """Return a request's body without the fields that only instances may set.

    Raises:
        RefusedError: It is no JSON object, or what the router itself goes by is of another type.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise RefusedError(400, "the body is not valid JSON", "invalid") from None
    if not isinstance(body, dict):
        raise RefusedError(400, "the body is not a JSON object", "invalid")
    for name in TRANSFER_FIELDS:
        body.pop(name, None)
    _check_types(body)
    return body


def _check_types(body: dict[str, Any]) -> None:
    """Refuse what an instance might read in another way than the router, and write counts as such.

    An instance that streams where the router expects a whole answer, or not where it expects a
    stream, would be taken for sick.
    """
    if body.get("stream") not in (None, False, True):
        raise RefusedError(400, "stream is neither true nor false", "invalid")
    if not isinstance(body.get("stream_options"), dict | None):
        raise RefusedError(400, "stream_options is not a JSON object", "invalid")
    for name in COUNTS:
        value = body.get(name)
        if isinstance(value, float) and value.is_integer():
            body[name] = int(value)
        elif not isinstance(value, int | None):
            raise RefusedError(400, f"{name} is not an integer", "invalid")


def needs_others(body: Mapping[str, Any]) -> bool:
    """Whether an instance fetches something for a request: a prompt's KV, or embeddings."""
    kv, ec = (body.get(name) or {} for name in TRANSFER_FIELDS)
    return bool(kv.get("do_remote_prefill") or ec.keys() - PUBLISH.keys())


def max_tokens(path: str, body: Mapping[str, Any]) -> int | None:
    """Return the most tokens that a body asks for; None where the server decides."""
    for name in ("max_completion_tokens", "max_tokens") if path == CHAT else ("max_tokens",):
        if isinstance(body.get(name), int):
            return int(body[name])
    return None if path == CHAT else DEFAULT_COMPLETION_TOKENS


def prompt_tokens(body: Mapping[str, Any]) -> int:
    """Estimate a prompt's tokens: exact for token ids, by length for text."""
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        return max(1, sum(_element_tokens(item) for item in prompt))
    texts, media = _chat_size(body.get("messages"))
    texts += len(prompt) if isinstance(prompt, str) else 0
    return max(1, texts // BYTES_PER_TOKEN + media * TOKENS_PER_MEDIUM)


def _element_tokens(item: object) -> int:
    if isinstance(item, list):
        return len(item)
    return len(item) // BYTES_PER_TOKEN if isinstance(item, str) else 1


def _chat_size(messages: object) -> tuple[int, int]:
    """Return the characters of text, and the number of other parts, of a conversation."""
    texts = media = 0
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            texts += len(content)
        for part in content if isinstance(content, list) else ():
            text = part.get("text") if isinstance(part, dict) else None
            texts += len(text) if isinstance(text, str) else 0
            media += not isinstance(text, str)
    return texts, media


def prefill_body(call: Call, want_ids: bool) -> dict[str, Any]:
    """Return what the prefill instance is asked: the same prompt, one token, and to hold its KV.

    Args:
        call: The client's request.
        want_ids: The answer must carry the token ids of the prompt and of the first token.
    """
    body = dict(call.body)
    body.update(stream=False, max_tokens=1, kv_transfer_params=dict(REMOTE_DECODE))
    if call.is_chat:
        body["max_completion_tokens"] = 1
    for name in ("stream_options", "min_tokens"):
        body.pop(name, None)
    if want_ids:
        body["return_token_ids"] = True
    return body


def decode_body(call: Call, transfer: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the decode instance is asked: the client's request and where its KV is.

    Args:
        call: The client's request.
        transfer: ``kv_transfer_params`` of the prefill instance's answer; None where it has
            handed nothing over, so that the decode instance computes the prompt itself.
    """
    body = dict(call.body)
    if transfer is not None:
        body["kv_transfer_params"] = transfer
    return body
