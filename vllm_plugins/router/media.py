"""Images and other media in a conversation: found, named by their content, replaced by references.

An encode instance gets the media, a prefill instance only references: for each item its name and
what its placeholders in the prompt depend on (vLLM's metadata-only media, such as
``{"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 16, 16]}, "uuid": ...}``), and in
``ec_transfer_params`` where its embeddings are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from vllm_plugins.router.answers import RefusedError
from vllm_plugins.router.bodies import BYTES_PER_TOKEN, CHAT, PUBLISH, Call

KINDS: Mapping[str, str] = {
    "image_url": "image_embeds",
    "audio_url": "audio_embeds",
    "input_audio": "audio_embeds",
    "video_url": "video_embeds",
}
"""Parts that hold a medium, and as what their embeddings are referred to."""

ID_BYTES = 16
MAX_MEDIA = 1024
# What a prompt's text, and where it may be computed, depends on; nothing that shapes the answer.
_PROMPT_FIELDS = (
    "model", "add_special_tokens", "cache_salt", "chat_template", "chat_template_kwargs",
    "documents", "priority", "tools",
)  # fmt: skip
_ENCODE_FIELDS = ("model", "media_io_kwargs", "mm_processor_kwargs", "priority")
# Below this a request of its own costs more than computing the text later.
MIN_WARM_TOKENS = 256


@dataclass(frozen=True)
class Medium:
    """One image, sound or film of a conversation.

    Attributes:
        message: Index of the message that it is in.
        part: Index of the part in the message.
        content: The part as the client sent it, with its name as ``uuid``.
    """

    message: int
    part: int
    content: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name that follows from the content, from how it is processed and whose it is."""
        return str(self.content["uuid"])


@dataclass(frozen=True)
class Encoded:
    """What an encode instance says of one medium.

    Attributes:
        key: Its name in ``ec_transfer_params``.
        entry: What stands there under it.
    """

    key: str
    entry: Mapping[str, Any]

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the medium's placeholders depend on; empty where the instance did not say."""
        said = self.entry.get("metadata")
        return said if isinstance(said, dict) else {}


def media_of(call: Call) -> list[Medium]:
    """Return the media of a conversation in order, named by their content.

    The name of a medium behind an address follows from the address: what stands there may change
    while an earlier content is still cached.

    Raises:
        RefusedError: There are too many, or a client sends embeddings or names of its own, which
            could be another's.
    """
    if call.path != CHAT or not isinstance(call.body.get("messages"), list):
        return []
    found = []
    for i, message in enumerate(call.body["messages"]):
        content = message.get("content") if isinstance(message, dict) else None
        for k, part in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(part, dict):
                continue
            kind = str(part.get("type"))
            if kind.endswith("_embeds"):
                raise RefusedError(400, "embeddings are not taken from clients", "invalid")
            if kind in KINDS:
                found.append(Medium(i, k, {**part, "uuid": _name(call.body, part)}))
    if len(found) > MAX_MEDIA:
        raise RefusedError(400, f"more than {MAX_MEDIA} images or other media", "invalid")
    return found


def _name(body: Mapping[str, Any], part: Mapping[str, Any]) -> str:
    medium = part.get(part["type"])
    if isinstance(medium, dict):
        medium = medium.get("url") or medium.get("data")
    if not isinstance(medium, str) or not medium:
        raise RefusedError(400, f"a part of type {part['type']} holds no medium", "invalid")
    # The same pixels processed in another way are other embeddings, and a salt says whose they are.
    context = [body.get(n) for n in ("mm_processor_kwargs", "media_io_kwargs", "cache_salt")]
    digest = blake2b(json.dumps(context, sort_keys=True).encode(), digest_size=ID_BYTES)
    digest.update(part["type"].encode() + b"\0")
    digest.update(medium.encode(errors="surrogatepass"))
    return digest.hexdigest()


def encode_body(call: Call, media: Sequence[Medium]) -> dict[str, Any]:
    """Return what an encode instance is asked for some media of a conversation."""
    body = {name: call.body[name] for name in _ENCODE_FIELDS if name in call.body}
    content = [dict(medium.content) for medium in media]
    body.update(
        messages=[{"role": "user", "content": content}],
        max_tokens=1,
        stream=False,
        ec_transfer_params=dict(PUBLISH),
    )
    return body


def encoded(media: Sequence[Medium], answer: Mapping[str, Any]) -> dict[str, Encoded]:
    """Return what an encode instance's answer says of media, by the media's names.

    It names each by a digest of its own, and says at which places of the request it stood.

    Raises:
        ValueError: It is malformed.
    """
    params = answer.get("ec_transfer_params")
    if params is None:
        return {}
    if not isinstance(params, dict) or len(params) > MAX_MEDIA:
        raise ValueError("ec_transfer_params is no object of a request's media")
    found = {}
    for key, entry in params.items():
        if not isinstance(entry, dict):
            raise ValueError("ec_transfer_params has an entry that is no object")
        for index in entry.get("item_indices") or ():
            if type(index) is not int or not 0 <= index < len(media):
                raise ValueError("ec_transfer_params names a place that the request has not")
            found[media[index].name] = Encoded(key, entry)
    return found


def door_of(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return where an encode instance hands embeddings out, from its answer for any medium."""
    return {name: own[name] for name in ("address", "generation") if name in own}


def awaited(medium: Medium, door: Mapping[str, Any]) -> Encoded:
    """Return what stands for a medium that is still being encoded."""
    return Encoded(medium.name, {"vllm_plugins_epd": {"awaited": True, **door}})


def referring_body(
    call: Call, media: Sequence[Medium], known: Mapping[str, Encoded]
) -> dict[str, Any]:
    """Return a request whose media are references, as far as the encode instances allow.

    vLLM takes either all or none of a kind as references. A kind of which one item lacks its
    metadata keeps the content, beside its name: then a prefill instance processes it once more, but
    does not encode it.
    """
    kinds = {KINDS[medium.content["type"]] for medium in media}
    for medium in media:
        if medium.name not in known or not known[medium.name].metadata:
            kinds.discard(KINDS[medium.content["type"]])
    messages = list(call.body["messages"])
    for medium in media:
        message = messages[medium.message]
        parts = list(message["content"])
        kind = KINDS[medium.content["type"]]
        parts[medium.part] = (
            _reference(kind, medium.name, known[medium.name]) if kind in kinds else medium.content
        )
        messages[medium.message] = {**message, "content": parts}
    body = {**call.body, "messages": messages}
    if known:
        body["ec_transfer_params"] = {one.key: one.entry for one in known.values()}
    return body


def _reference(kind: str, name: str, one: Encoded) -> dict[str, Any]:
    return {
        "type": kind,
        kind: {key: _flat(value) for key, value in one.metadata.items()},
        "uuid": name,
    }


def _flat(value: Any) -> Any:
    """Return an item's own values; they come as a batch of one."""
    if not isinstance(value, list):
        return value
    return [inner for outer in value for inner in (outer if isinstance(outer, list) else [outer])]


def warming_body(call: Call, first: Medium) -> dict[str, Any] | None:
    """Return a request for the text before the first medium alone, or None where it is short.

    A prefill instance that has computed it finds it in its prefix cache when the whole prompt
    comes.
    """
    before = list(call.body["messages"][: first.message])
    message = call.body["messages"][first.message]
    if first.part:
        before.append({**message, "content": message["content"][: first.part]})
    if len(json.dumps(before)) < MIN_WARM_TOKENS * BYTES_PER_TOKEN:
        return None
    body = {name: call.body[name] for name in _PROMPT_FIELDS if name in call.body}
    return {
        **body,
        "messages": before,
        "add_generation_prompt": False,
        "max_tokens": 1,
        "stream": False,
    }
