"""A stream that the router makes out of parts: t1 of the prefill instance, then one or more others.

A part is a completion of token ids, prompt + what the client has already, asked of a decode
instance. Its events are written again in the form that the client asked for, so that the client
sees one answer: one id, the prompt's length as the prefill instance counted it, all tokens counted
once, a role only in the first event of a chat.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_plugins.router.bodies import Call
from vllm_plugins.router.events import BOUNDARY, DONE, as_event, event_data
from vllm_plugins.router.first_token import continued_fields

REPLACEMENT = "\ufffd"


class BrokenStreamError(Exception):
    """A part of the stream is not what was asked for: an error event, or no event of a stream."""


@dataclass
class Sent:
    """What the client has of an answer.

    Attributes:
        call: The client's request.
        answer_id: Of the answer.
        model: As the instance named it.
        created: Unix time in seconds.
        prompt_ids: Token ids of the prompt.
        token_ids: Token ids of the answer so far.
        finished: Whether the last event with text was sent.
        counted: Whether the event with the usage was sent.
    """

    call: Call
    answer_id: str
    model: str
    created: int
    prompt_ids: Sequence[int]
    token_ids: list[int] = field(default_factory=list)
    finished: bool = False
    counted: bool = False

    def continued_body(self, transfer: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what a decode instance is asked, to continue from here.

        Args:
            transfer: ``kv_transfer_params`` of who holds the prompt's KV.
        """
        body, limit = continued_fields(self.call), self.call.max_tokens
        assert limit is not None, "a stream without a limit is not continued"
        body.update(
            prompt=[*self.prompt_ids, *self.token_ids],
            max_tokens=limit - len(self.token_ids),
            stream=True,
            return_token_ids=True,
        )
        if transfer is not None:
            body["kv_transfer_params"] = transfer
        return body

    def first(self, token: FirstToken) -> bytes:
        """Return the events of the prefill instance's token."""
        self.token_ids += token.token_ids
        self.finished = token.finish_reason is not None
        events = b""
        if self.call.is_chat:
            role = {"index": 0, "delta": {"role": "assistant", "content": ""}}
            events += self._event(role | {"logprobs": None, "finish_reason": None}, prompt=True)
        return events + self._event(
            self._choice(token.text, token.token_ids, token.finish_reason, token.stop_reason),
            prompt=not self.call.is_chat,
        )

    def part(self, event: bytes) -> bytes:
        """Return an event of a decode instance as the client gets it; empty for none.

        Raises:
            BrokenStreamError: It is an error, or no event of a completion.
        """
        data = event_data(event)
        if data is None or data == b"[DONE]":
            return b""
        chunk = parsed(data)
        choices = chunk.get("choices")
        if not choices:
            # Counted anew at the end, over all parts.
            return b""
        try:
            choice, token_ids = choices[0], choices[0].get("token_ids") or []
            text, reason = choice["text"], choice.get("finish_reason")
        except (LookupError, TypeError, AttributeError):
            raise BrokenStreamError("the stream has an event of another kind") from None
        self.token_ids += token_ids
        self.finished = reason is not None
        return self._event(self._choice(text, token_ids, reason, choice.get("stop_reason")))

    def observe(self, event: bytes) -> None:
        """Note the tokens of an event that goes to the client as it is.

        Raises:
            BrokenStreamError: It is an error.
        """
        data = event_data(event)
        if data is None or data == b"[DONE]":
            return
        chunk = parsed(data)
        choices = chunk.get("choices")
        self.counted = not choices and "usage" in chunk
        for choice in choices if isinstance(choices, list) else ():
            if not isinstance(choice, dict):
                raise BrokenStreamError("the stream has an event of another kind")
            self.token_ids += choice.get("token_ids") or []
            self.finished = self.finished or choice.get("finish_reason") is not None

    def end(self) -> bytes:
        """Return the events that end the stream."""
        options = self.call.body.get("stream_options") or {}
        if self.counted or not options.get("include_usage"):
            return DONE
        return as_event({**self._head(), "choices": [], "usage": self.usage()}) + DONE

    def usage(self) -> dict[str, int]:
        """Return the tokens of prompt and answer."""
        prompt, answer = len(self.prompt_ids), len(self.token_ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
        }

    def _event(self, choice: Mapping[str, Any], prompt: bool = False) -> bytes:
        choice = dict(choice)
        chunk = {**self._head(), "choices": [choice]}
        if prompt and self.call.body.get("return_token_ids"):
            (chunk if self.call.is_chat else choice)["prompt_token_ids"] = list(self.prompt_ids)
        if (self.call.body.get("stream_options") or {}).get("continuous_usage_stats"):
            chunk["usage"] = self.usage()
        return as_event(chunk)

    def _choice(
        self, text: str, token_ids: Sequence[int], finish: str | None, stop: Any
    ) -> dict[str, Any]:
        said = {"delta": {"content": text}} if self.call.is_chat else {"text": text}
        choice: dict[str, Any] = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        if finish is not None or not self.call.is_chat:
            choice["stop_reason"] = stop
        if self.call.body.get("return_token_ids"):
            choice["token_ids"] = list(token_ids)
        return choice

    def _head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.call.is_chat else "text_completion"
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }


@dataclass(frozen=True)
class FirstToken:
    """What a prefill instance's answer says of t1.

    Attributes:
        text: Its text.
        token_ids: Its id, alone; none where the answer ended before it.
        finish_reason: Why the whole answer ends with it; None where it goes on.
        stop_reason: The stop token that ended it, if one did.
    """

    text: str
    token_ids: Sequence[int]
    finish_reason: str | None
    stop_reason: Any


def parsed(data: bytes) -> Mapping[str, Any]:
    """Return what an event carries.

    Raises:
        BrokenStreamError: It is an error, or no JSON object.
    """
    try:
        chunk = json.loads(data)
    except ValueError:
        raise BrokenStreamError("the stream has an event that is not JSON") from None
    if not isinstance(chunk, dict):
        raise BrokenStreamError("the stream has an event of another kind")
    if "error" in chunk:
        error = chunk["error"]
        raise BrokenStreamError(
            str(error.get("message") if isinstance(error, dict) else error)[:200]
        )
    return chunk


def first_token(call: Call, answer: Mapping[str, Any]) -> tuple[Sent, FirstToken] | str:
    """Return the stream that begins with a prefill instance's token.

    Returns:
        Where the token cannot be sent: why, a key of `first_token.REASONS`.
    """
    try:
        choice = answer["choices"][0]
        said = choice["message"] if call.is_chat else choice
        text = said.get("content") if call.is_chat else said.get("text")
        prompt_ids = (answer if call.is_chat else choice)["prompt_token_ids"]
        token_ids = choice["token_ids"]
        finish = choice.get("finish_reason")
    except (LookupError, TypeError, AttributeError):
        return "no_ids"
    if not _are_ids(prompt_ids) or not _are_ids(token_ids) or len(token_ids) != 1:
        return "no_ids"
    if call.is_chat and (said.get("reasoning") or said.get("tool_calls")):
        return "no_ids"
    ends = finish != "length" or call.max_tokens == 1
    if not ends and (not isinstance(text, str) or not text or text.endswith(REPLACEMENT)):
        return "empty_text"
    last = finish if ends else None
    return _sent(call, answer, prompt_ids), FirstToken(
        text or "", token_ids, last, choice.get("stop_reason")
    )


def begun_by(call: Call, chunk: bytes) -> Sent | None:
    """Return the stream that an instance begins with a chunk; None where it names no token ids."""
    event, _, _ = chunk.partition(BOUNDARY)
    data = event_data(event)
    try:
        head = parsed(data or b"")
        prompt_ids = (head if call.is_chat else head["choices"][0])["prompt_token_ids"]
    except (BrokenStreamError, LookupError, TypeError):
        return None
    return _sent(call, head, prompt_ids) if _are_ids(prompt_ids) else None


def _sent(call: Call, head: Mapping[str, Any], prompt_ids: Sequence[int]) -> Sent:
    created = head.get("created")
    return Sent(
        call,
        str(head.get("id")),
        str(head.get("model")),
        created if isinstance(created, int) else 0,
        prompt_ids,
    )


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
