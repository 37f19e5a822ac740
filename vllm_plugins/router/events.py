"""Server-sent events, as OpenAI's API streams them: ``data: ...`` lines, an empty line after each.

A stream that is only passed on is not taken apart at all. One that the router continues itself is,
here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

BOUNDARY = b"\n\n"
DONE = b"data: [DONE]\n\n"
# Far above what vLLM sends in one event, even with logprobs or a long prompt's token ids.
MAX_EVENT_BYTES = 64 << 20


class EventSplitter:
    """Cuts a stream of bytes into whole events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the events that are now whole, with their ends.

        Raises:
            ValueError: An event is longer than any server would send.
        """
        *events, self._rest = (self._rest + chunk).split(BOUNDARY)
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError("an event of a stream is too long")
        return [event + BOUNDARY for event in events]


class Tail:
    """The last bytes of a stream that is passed on, from which to tell how it ended."""

    def __init__(self) -> None:
        self._bytes = BOUNDARY

    def feed(self, chunk: bytes) -> None:
        """Look at a chunk that was sent."""
        if len(chunk) >= len(DONE):
            self._bytes = chunk[-len(DONE) :]
        else:
            self._bytes = (self._bytes + chunk)[-len(DONE) :]

    @property
    def done(self) -> bool:
        """Whether the stream has said that it is complete."""
        return self._bytes.rstrip().endswith(b"[DONE]")

    @property
    def at_boundary(self) -> bool:
        """Whether no event has been begun and not ended."""
        return self._bytes.endswith(BOUNDARY)


def event_data(event: bytes) -> bytes | None:
    """Return what an event carries; None for a comment or an empty one."""
    if not event.startswith(b"data:"):
        return None
    return event[5:].strip()


def as_event(data: Mapping[str, Any]) -> bytes:
    """Return an event that carries an object."""
    text = json.dumps(data, separators=(",", ":"))
    return b"data: " + text.encode() + BOUNDARY
