"""What is known of one media item's embeddings, and what of it travels in ``ec_transfer_params``.

An encode server's answer carries, for each media id, where its embeddings are and what they look
like; a router copies that into the request to a prefill server. There it is a client's JSON, so
every field is checked before anything is allocated or connected to.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_plugins.wire.address import Address, is_loopback
from vllm_plugins.wire.errors import WireError

KEY = "vllm_plugins_epd"
"""Name of this plug-in's entry in each item of ``ec_transfer_params``."""

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
DIGEST_BYTES = 16
MAX_ID_CHARACTERS = 256
MAX_ITEMS = 1024
MAX_TOKENS = 1 << 22
MAX_WIDTH = 1 << 20


class MalformedError(ValueError):
    """Parameters of a request are not what an encode server hands out."""


@dataclass(frozen=True)
class Shape:
    """Embeddings of one item: ``num_tokens`` rows of ``width`` values.

    Args:
        num_tokens: Rows, one per embedding that the prompt has a place for.
        width: Values in a row, as the encoder gives them.
        dtype: Name of their type, a key of `DTYPE_BYTES`.
    """

    num_tokens: int
    width: int
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * DTYPE_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.num_tokens * self.row_bytes

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return {"num_tokens": self.num_tokens, "width": self.width, "dtype": self.dtype}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Shape:
        """Read a shape that a peer or a client wrote.

        Raises:
            MalformedError: A field is missing, of another type or out of bounds.
        """
        tokens = _integer(raw, "num_tokens", 1, MAX_TOKENS)
        width = _integer(raw, "width", 1, MAX_WIDTH)
        dtype = raw.get("dtype")
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise MalformedError(f"dtype is not one of {', '.join(DTYPE_BYTES)}")
        return cls(tokens, width, dtype)


@dataclass(frozen=True)
class Source:
    """Where the embeddings of one item can be fetched, or will be.

    An item that is *awaited* has been sent to the encode server, which has not answered yet: its
    shape, digest and lease are not known.

    Args:
        address: Of the encode server.
        generation: Hexadecimal name of that server's life; a restarted one has another.
        shape: What the server says the item looks like; None while it is awaited.
        digest: First 16 bytes of the rows' SHA-256, in hexadecimal; empty while it is awaited.
        lease: Hexadecimal name of the lease under which the server keeps the item; likewise.
        lease_end: When that lease ends, in seconds since 1970 on the server's clock.
    """

    address: Address
    generation: str
    shape: Shape | None = None
    digest: str = ""
    lease: str = ""
    lease_end: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return what goes into the item's entry of ``ec_transfer_params``."""
        where = {"address": self.address.to_json(), "generation": self.generation}
        if self.shape is None:
            return {**where, "awaited": True}
        return {
            **where,
            **self.shape.to_json(),
            "checksum": self.digest,
            "lease": self.lease,
            "lease_end": self.lease_end,
        }

    @classmethod
    def from_json(cls, raw: Any) -> Source:
        """Read a source that a client sent.

        Raises:
            MalformedError: It is not what an encode server hands out.
        """
        if not isinstance(raw, Mapping):
            raise MalformedError(f"{KEY} is not an object")
        try:
            address = Address.from_json(raw.get("address"))
        except WireError as error:
            raise MalformedError(f"address: {error}") from error
        generation = _hexadecimal(raw, "generation", 16)
        if raw.get("awaited") is True:
            return cls(address, generation)
        return cls(
            address,
            generation,
            Shape.from_json(raw),
            _hexadecimal(raw, "checksum", DIGEST_BYTES),
            _hexadecimal(raw, "lease", 16),
            _number(raw, "lease_end"),
        )


def sources_of(params: Any, allow_remote: bool) -> dict[str, Source]:
    """Read all items of a request's ``ec_transfer_params``, by media id.

    Items without this plug-in's entry are another connector's and are passed over.

    Args:
        params: What the client sent.
        allow_remote: Whether an address other than loopback may be connected to.

    Raises:
        MalformedError: Not an object, too many items, an entry that no encode server hands out,
            or an address that may not be connected to.
    """
    if params is None:
        return {}
    if not isinstance(params, Mapping):
        raise MalformedError("ec_transfer_params is not an object")
    if len(params) > MAX_ITEMS:
        raise MalformedError(f"ec_transfer_params has {len(params)} items; at most {MAX_ITEMS}")
    found: dict[str, Source] = {}
    for media, item in params.items():
        if not isinstance(item, Mapping) or KEY not in item:
            continue
        if not isinstance(media, str) or not 0 < len(media) <= MAX_ID_CHARACTERS:
            raise MalformedError(f"a media id has more than {MAX_ID_CHARACTERS} characters")
        found[media] = Source.from_json(item[KEY])
        _check_allowed(found[media].address.host, allow_remote)
    return found


def _check_allowed(host: str, allow_remote: bool) -> None:
    # Names are refused even then: what a name means can change between a check and a connection.
    if is_loopback(host):
        return
    try:
        literal = ipaddress.ip_address(host)
    except ValueError as error:
        raise MalformedError("address: the host is not an IP address") from error
    if not allow_remote:
        raise MalformedError("address: not loopback, and allow_remote is off")
    if literal.is_unspecified or literal.is_multicast or literal.is_link_local:
        raise MalformedError("address: not the address of one host")


def _integer(raw: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = raw.get(name)
    # A bool is an int to Python and not a number to anybody else.
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise MalformedError(f"{name} is not an integer from {low} to {high}")
    return value


def _number(raw: Mapping[str, Any], name: str) -> float:
    value = raw.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise MalformedError(f"{name} is not a finite number")
    return float(value)


def is_hexadecimal(value: object, num_bytes: int) -> bool:
    """Whether a value is a text of so many bytes in hexadecimal."""
    digits = set("0123456789abcdef")
    return isinstance(value, str) and len(value) == 2 * num_bytes and digits.issuperset(value)


def _hexadecimal(raw: Mapping[str, Any], name: str, num_bytes: int) -> str:
    value = raw.get(name)
    if not isinstance(value, str) or not is_hexadecimal(value, num_bytes):
        raise MalformedError(f"{name} is not {2 * num_bytes} hexadecimal digits")
    return value
