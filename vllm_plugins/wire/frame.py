"""The format of a frame, the unit of everything on the wire.

A frame is a prelude of fixed size, a header (a small JSON object), a payload (raw bytes) and the
payload's checksum; docs/wire.md has the layout byte by byte. The payload's checksum stands behind
it so that both ends can compute it while the bytes move.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from vllm_plugins.wire.errors import WireDamagedError, WireRefusedError

MAGIC = b"vPLw"
VERSION = 1
# Magic and version keep their places in every version, so that any two can refuse each other.
PRELUDE = struct.Struct("!4sBBHIIQII")
CHECKSUM = struct.Struct("!I")
SEQUENCES = 1 << 32

# Kinds of frames from here on belong to the wire itself.
RESERVED_KINDS = 0xFF00
HELLO, PROOF, ERROR, DESCRIPTOR = range(RESERVED_KINDS, RESERVED_KINDS + 4)
MOST_ERROR_CHARACTERS = 1000


@dataclass(frozen=True)
class Limits:
    """What one end accepts from the other.

    Attributes:
        header_bytes: Longest header.
        payload_bytes: Longest payload.
    """

    header_bytes: int = 1 << 20
    payload_bytes: int = 1 << 32


# Of peers that have not proved yet that they know the secret.
HANDSHAKE_LIMITS = Limits(header_bytes=4096, payload_bytes=0)


@dataclass
class Frame:
    """A frame that has arrived.

    Attributes:
        kind: What it is about, below `RESERVED_KINDS`.
        header: A JSON object.
        payload: Its bytes, in the buffer that the receiver named or in one of its own.
    """

    kind: int
    header: dict[str, Any]
    payload: memoryview


class Prelude(NamedTuple):
    """The checked contents of a frame's first bytes; lengths in bytes."""

    kind: int
    sequence: int
    header_bytes: int
    payload_bytes: int
    header_checksum: int


def pack_prelude(kind: int, sequence: int, header: bytes, payload_bytes: int, seed: int) -> bytes:
    """Return the first bytes of a frame.

    Args:
        kind: 0 to 65535.
        sequence: Number of the frame in its direction, modulo `SEQUENCES`.
        header: Encoded header.
        payload_bytes: Length of the payload.
        seed: Value from which the connection's checksums in this direction start.
    """
    fields = (kind, sequence, len(header), payload_bytes, zlib.crc32(header, seed))
    unchecked = PRELUDE.pack(MAGIC, VERSION, 0, *fields, 0)[: -CHECKSUM.size]
    return unchecked + CHECKSUM.pack(zlib.crc32(unchecked, seed))


def unpack_prelude(data: bytes | bytearray, seed: int) -> Prelude:
    """Read and check the first bytes of a frame.

    Raises:
        WireDamagedError: They are not those of a frame on this connection.
        WireRefusedError: The peer speaks another version.
    """
    magic, version, flags, *fields, checksum = PRELUDE.unpack(data)
    if magic != MAGIC:
        raise WireDamagedError("what arrived is not a frame of this wire")
    if version != VERSION:
        raise WireRefusedError(
            f"the peer speaks version {version} of the wire, this end version {VERSION}"
        )
    if zlib.crc32(data[: -CHECKSUM.size], seed) != checksum or flags:
        raise WireDamagedError("a frame's prelude is damaged")
    return Prelude(*fields)


def encode_header(header: Mapping[str, Any]) -> bytes:
    """Return a header's bytes.

    Raises:
        TypeError: It has values that JSON does not.
        ValueError: It has NaN, an infinity or a reference to itself.
    """
    return json.dumps(dict(header), separators=(",", ":"), allow_nan=False).encode()


def decode_header(data: bytes | bytearray) -> dict[str, Any]:
    """Read a header.

    Raises:
        WireDamagedError: It is not a JSON object.
    """
    try:
        header = json.loads(data.decode(), parse_constant=_refuse_constant)
    # Deep nesting ends in the one, numbers of thousands of digits in the other.
    except (RecursionError, ValueError) as error:
        raise WireDamagedError(f"a frame's header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise WireDamagedError("a frame's header is not a JSON object")
    return header


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def printable(text: object) -> str:
    """Return a bounded text that can go into a log line, whatever a peer has put into it."""
    short = str(text)[:MOST_ERROR_CHARACTERS]
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in short)
