"""Messages between a decode worker and a prefill worker, and how both divide KV into pieces.

========== ============================================ =====================================
Kind       Header                                       Answer
========== ============================================ =====================================
DESCRIBE   generation                                   SHARD: the worker's `geometry.Shard`
CACHES     generation                                   HANDLES: `direct.CacheHandles`; empty
                                                        where the caches cannot be mapped
PULL       transfer, digest, groups, layers, heads,     PIECE frames in any order, then END
           reader, readers, shared, direct
PIECE      layer, first, count; slot in shared memory,  an ACK for each, in shared memory only
           whose bytes are then no payload
PIECE      direct: layers, by index in the PULL and     an ACK for each, once the reader has copied
           all of one group, first, count, blocks
DONE       none: the reader has all that it wants       direct: KEPT, if the blocks were the
                                                        prompt's until now; otherwise none
RENEW      transfers                                    RENEWED: those that still exist
RELEASE    transfers                                    RELEASED
========== ============================================ =====================================

Every message names the generation of the worker that it means, so that a worker that took a dead
one's port refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from vllm_plugins.kv_connectors.pd.geometry import MAX_LAYERS
from vllm_plugins.wire.errors import WireError, WireRefusedError

# Bytes of one piece at most, unless one block alone is larger: small enough that reading, the wire
# and writing overlap, large enough that a message costs little.
PIECE_BYTES = 8 << 20
# Bytes of one layer in a direct piece: no buffer is of its size, and a message takes as long as the
# device needs for all its layers.
DIRECT_BYTES = 64 << 20
# Pieces that the writer may be ahead of the reader, in shared memory or directly.
SLOTS = 4
# As many names of the greatest length fit into a header.
MAX_TRANSFERS = 2048
MAX_GROUPS = 64
MAX_BLOCKS = 1 << 24
# Block ids of one direct piece, which stand in its header.
MAX_PIECE_BLOCKS = 1 << 15


# Begins what a worker answers where there is no such transfer, or no more.
GONE = "gone: "


class Kind(IntEnum):
    """Kinds of frames."""

    DESCRIBE = 1
    SHARD = 2
    PULL = 3
    PIECE = 4
    END = 5
    DONE = 6
    ACK = 7
    RENEW = 8
    RENEWED = 9
    RELEASE = 10
    RELEASED = 11
    CACHES = 12
    HANDLES = 13
    KEPT = 14


@dataclass(frozen=True)
class Span:
    """Positions ``[first, last)`` in a request's block table of one KV cache group."""

    first: int
    last: int

    def pieces(self, block_bytes: int, size: int) -> Iterator[Span]:
        """Divide into spans of at most ``size`` bytes, but at least one block."""
        step = max(1, size // block_bytes)
        for first in range(self.first, self.last, step):
            yield Span(first, min(first + step, self.last))

    def __len__(self) -> int:
        return max(0, self.last - self.first)


@dataclass(frozen=True)
class PullRequest:
    """What a reader asks of one writer.

    Attributes:
        transfer_id: The transfer.
        digest: Digest of the prompt that the reader wants.
        groups: Wanted positions, by KV cache group.
        layers: Wanted layers with their group.
        heads: Wanted heads, first and last.
        reader: Rank of the reader.
        readers: How many readers pull from this writer.
        shared: Bytes of the shared memory whose descriptor follows; 0 for none.
        direct: Whether the reader copies out of the mapped caches itself, and is sent block ids.
    """

    transfer_id: str
    digest: str
    groups: tuple[Span, ...]
    layers: tuple[tuple[str, int], ...]
    heads: tuple[int, int]
    reader: int
    readers: int
    shared: int
    direct: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the header."""
        return {
            "transfer": self.transfer_id,
            "digest": self.digest,
            "groups": [[span.first, span.last] for span in self.groups],
            "layers": [list(layer) for layer in self.layers],
            "heads": list(self.heads),
            "reader": self.reader,
            "readers": self.readers,
            "shared": self.shared,
            "direct": self.direct,
        }

    @classmethod
    def from_json(cls, header: Mapping[str, Any]) -> PullRequest:
        """Return the request in a peer's header.

        Raises:
            ValueError: It is malformed.
        """
        groups = header.get("groups")
        layers = header.get("layers")
        if not isinstance(groups, list) or not 0 < len(groups) <= MAX_GROUPS:
            raise ValueError("groups is no list of spans")
        if not isinstance(layers, list) or not 0 < len(layers) <= MAX_LAYERS:
            raise ValueError("layers is no list")
        heads = integers(header.get("heads"), 2, MAX_BLOCKS)
        reader, readers, shared = (
            integers([header.get(name)], 1, 1 << 40)[0] for name in ("reader", "readers", "shared")
        )
        direct = header.get("direct")
        if type(direct) is not bool:
            raise ValueError("direct is neither true nor false")
        named = tuple(_layer(layer, len(groups)) for layer in layers)
        if len(dict(named)) != len(named):
            raise ValueError("a layer is named twice")
        return cls(
            text(header, "transfer"),
            text(header, "digest"),
            tuple(Span(*integers(group, 2, MAX_BLOCKS)) for group in groups),
            named,
            (heads[0], heads[1]),
            reader,
            readers,
            shared,
            direct,
        )


def says_gone(error: WireError) -> bool:
    """Whether a worker answered that a transfer is not there, and will not be."""
    return isinstance(error, WireRefusedError) and GONE in str(error)


def _layer(value: Any, groups: int) -> tuple[str, int]:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        raise ValueError("a layer is no pair of name and group")
    return value[0], integers(value[1:], 1, groups - 1)[0]


def text(header: Mapping[str, Any], name: str) -> str:
    """Return a string of a header.

    Raises:
        ValueError: There is none.
    """
    value = header.get(name)
    if not isinstance(value, str) or len(value) > 256:
        raise ValueError(f"{name} is no short text")
    return value


def integers(value: Any, count: int, most: int) -> list[int]:
    """Return a list of so many integers in [0, most].

    Raises:
        ValueError: It is something else.
    """
    if (
        not isinstance(value, list)
        or len(value) != count
        or not all(type(item) is int and 0 <= item <= most for item in value)
    ):
        raise ValueError(f"not {count} integers up to {most}")
    return value


def transfers(header: Mapping[str, Any]) -> list[str]:
    """Return the transfers that a header lists.

    Raises:
        ValueError: It lists none, or too many.
    """
    value = header.get("transfers")
    if not isinstance(value, list) or len(value) > MAX_TRANSFERS:
        raise ValueError("transfers is no list")
    return [text({"transfer": item}, "transfer") for item in value]
