"""How one end tells the other why it goes no further, and how that is heard."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_plugins.wire.errors import WireClosedError, WireError, WireRefusedError
from vllm_plugins.wire.frame import ERROR, Frame, printable
from vllm_plugins.wire.stream import FrameStream

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    Buffer = ReadableBuffer

# What the peer said before it closed is here already, or will never be; a reader on a busy machine
# may still be some time about it.
_LAST_WORDS_S = 1.0


def refuse(stream: FrameStream, reason: object, deadline: float) -> None:
    """Tell the peer why; one that does not listen any more learns nothing."""
    try:
        stream.send(ERROR, {"error": printable(reason)}, (), deadline)
    except WireError:
        # The refusal stands whether the peer hears it or not.
        return


def refusal(frame: Frame) -> WireRefusedError:
    """Return the error that an ERROR frame carries."""
    return WireRefusedError(f"the peer refuses: {printable(frame.header.get('error', ''))}")


def send(
    stream: FrameStream,
    kind: int,
    header: Mapping[str, Any],
    payload: Sequence[Buffer],
    deadline: float,
    descriptor: int | None = None,
) -> None:
    """Send a frame, as `FrameStream.send`.

    Raises:
        WireRefusedError: The peer has closed the connection, and said why before that.
        WireError: The frame, or a part of it, was not sent.
    """
    try:
        stream.send(kind, header, payload, deadline, descriptor)
    except WireClosedError as closed:
        raise _last_words(stream) or closed from None


def _last_words(stream: FrameStream) -> WireRefusedError | None:
    deadline = time.monotonic() + _LAST_WORDS_S
    try:
        while True:
            frame = stream.receive(deadline)
            if frame.kind == ERROR:
                return refusal(frame)
    except WireError:
        return None
