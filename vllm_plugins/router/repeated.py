"""A stream that broke off and is asked for again from its beginning; the client gets what it lacks.

Where a prompt of token ids would not do (images, grammars, stop strings), or the router knows no
ids, a stream can go on only if another instance says the same once more: at temperature 0, or with
a seed. What the client has is kept as it was sent, and read only when its stream breaks off. That
the other instance says the same is checked as far as the client has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_plugins.router.bodies import Call
from vllm_plugins.router.continued import BrokenStreamError, parsed
from vllm_plugins.router.events import BOUNDARY, DONE, as_event, event_data
from vllm_plugins.router.first_token import why_alone

# Ten thousands of tokens; a longer stream ends with an error where it breaks off.
MAX_KEPT_BYTES = 8 << 20
_HEAD = ("id", "created", "model")


def repeats(call: Call) -> bool:
    """Whether a request gets one stream of text that would be the same a second time."""
    body = call.body
    if not call.streams or why_alone(body) is not None:
        return False
    if any(body.get(name) for name in ("logprobs", "top_logprobs", "echo")):
        # Positions in the text, which would have to be cut with it.
        return False
    return body.get("temperature") == 0 or body.get("seed") is not None


class Kept:
    """What was sent of a stream, as long as it may be of use.

    Args:
        call: The client's request.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._chunks: list[bytes] = []
        self._room = MAX_KEPT_BYTES if repeats(call) else 0

    @property
    def wanted(self) -> bool:
        """Whether there is any use in it."""
        return self._room > 0

    def add(self, chunk: bytes) -> None:
        """Keep what was sent."""
        self._room -= len(chunk)
        if self._room > 0:
            self._chunks.append(chunk)
        else:
            self._chunks.clear()

    def repeat(self) -> Repeat | None:
        """Return what is needed to go on; None where it cannot be, as amid an event."""
        sent = b"".join(self._chunks)
        if not self.wanted or (sent and not sent.endswith(BOUNDARY)):
            return None
        found = Repeat(self._call)
        try:
            for event in sent.split(BOUNDARY)[:-1]:
                found.part(event)
        except BrokenStreamError:
            return None
        return found


@dataclass
class Repeat:
    """A stream as far as the client has it; `continued.Sent` is its like where token ids are known.

    Attributes:
        call: The client's request.
        head: What its events say of the answer as a whole; empty before the first one.
        text: Of the answer so far.
        token_ids: Of the answer so far, where the client asked for them.
        ended: Whether the client knows why the answer ended.
        counted: Whether it has the usage.
    """

    call: Call
    head: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    ended: bool = False
    counted: bool = False
    _characters: int = 0
    _tokens: int = 0

    @property
    def finished(self) -> bool:
        """Whether nothing but the end of the stream is lacking."""
        options = self.call.body.get("stream_options") or {}
        return self.ended and (self.counted or not options.get("include_usage"))

    def rewind(self) -> None:
        """Begin to read from the beginning of the answer."""
        self._characters = self._tokens = 0

    def part(self, event: bytes) -> bytes:
        """Return what the client lacks of an event; empty for nothing.

        Raises:
            BrokenStreamError: It is an error, no event of one text, or says something else than the
                client was told.
        """
        data = event_data(event)
        if data is None or data == b"[DONE]":
            return b""
        chunk = dict(parsed(data))
        begun = bool(self.head)
        self.head = self.head or {name: chunk.get(name) for name in _HEAD}
        chunk |= self.head
        choices = chunk.get("choices")
        if not choices:
            new = "usage" in chunk and not self.counted
            self.counted = self.counted or new
            return as_event(chunk) if new else b""
        if begun:
            chunk.pop("prompt_token_ids", None)
        choice = self._lacking(choices, begun)
        return b"" if choice is None else as_event(chunk | {"choices": [choice]})

    def end(self) -> bytes:
        """Return the events that end the stream."""
        return DONE

    def _lacking(self, choices: Sequence[Any], begun: bool) -> dict[str, Any] | None:
        """Return what the client lacks of an event's choice; None for nothing."""
        try:
            [choice] = choices
            text = _text(choice, self.call.is_chat)
            ids = choice.get("token_ids") or []
        except (LookupError, TypeError, ValueError, AttributeError):
            raise BrokenStreamError("the stream has an event of another kind") from None
        new_text, new_ids = self._new_text(text), self._new_ids(ids)
        ends = choice.get("finish_reason") is not None and not self.ended
        if begun and not (new_text or new_ids or ends):
            return None
        self.ended = self.ended or ends
        return self._said(choice, new_text, new_ids, begun)

    def _said(
        self, choice: Mapping[str, Any], text: str, ids: list[int], begun: bool
    ) -> dict[str, Any]:
        said = dict(choice)
        if self.call.is_chat:
            said["delta"] = {**choice["delta"], "content": text}
        else:
            said["text"] = text
        if "token_ids" in choice:
            said["token_ids"] = ids
        if begun:
            said.pop("prompt_token_ids", None)
        return said

    def _new_text(self, text: str) -> str:
        known = self.text[self._characters : self._characters + len(text)]
        if not text.startswith(known):
            raise BrokenStreamError("asked again, an instance gives another answer")
        self._characters += len(text)
        new = text[len(known) :]
        self.text += new
        return new

    def _new_ids(self, ids: list[int]) -> list[int]:
        known = self.token_ids[self._tokens : self._tokens + len(ids)]
        if ids[: len(known)] != known:
            raise BrokenStreamError("asked again, an instance gives another answer")
        self._tokens += len(ids)
        new = ids[len(known) :]
        self.token_ids += new
        return new


def _text(choice: Mapping[str, Any], is_chat: bool) -> str:
    """Return a choice's text.

    Raises:
        ValueError: It has something else, such as a tool call or reasoning.
        LookupError: It has none.
    """
    if choice.get("index") or choice.get("logprobs"):
        raise ValueError
    if not is_chat:
        return str(choice["text"])
    delta = choice["delta"]
    if any(value for name, value in delta.items() if name not in ("role", "content")):
        raise ValueError
    return delta.get("content") or ""
