"""Frames between a prefill server, which asks, and an encode server, which answers.

| asked   | header                                        | answered                              |
|---------|-----------------------------------------------|---------------------------------------|
| FETCH   | ``media``, ``generation``, ``first``, ``rows`` | ROWS with the rows, or MISSING        |
| RENEW   | ``generation``, ``lease``                     | DONE, or MISSING where it has ended   |
| RELEASE | ``generation``, ``lease``, ``media``          | DONE                                  |

ROWS carries the item's shape and digest beside the rows asked for; MISSING a ``reason``, and
``lasting`` where asking again is of no use. With ``wait`` in its header, a FETCH of an item that is
not there is answered a little later, so that an item which is being encoded is there by then.
"""

from __future__ import annotations

from vllm_plugins.wire.frame import Limits

FETCH, RENEW, RELEASE = 32, 33, 34
ROWS, MISSING, DONE = 48, 49, 50

# Of a FETCH with `wait`. Short, since it keeps a thread at either end that others need too.
WAIT_S = 0.05

HEADER_BYTES = 1 << 14
# Requests carry no payload; a longer one is refused before it is read.
SERVER_LIMITS = Limits(header_bytes=HEADER_BYTES, payload_bytes=0)
"""What an encode server accepts."""


def client_limits(most_bytes: int) -> Limits:
    """Return what a prefill server accepts: nothing longer than its arena."""
    return Limits(header_bytes=HEADER_BYTES, payload_bytes=most_bytes)
