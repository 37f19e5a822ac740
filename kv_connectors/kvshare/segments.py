"""Stored pieces of text whose KV can be reused, and runs of a prompt that equal them.

Digests are BLAKE2b over little-endian token ids, so that they are the same in every process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from vllm_plugins.kv_connectors.kvshare.anchors import Anchors

Tokens = NDArray[np.int32]
"""Token ids, shape (n,)."""

DIGEST_BYTES = 32


def as_tokens(tokens: Iterable[int] | Tokens) -> Tokens:
    """Return token ids as a contiguous array of shape (n,); no copy where they are one already."""
    values = tokens if isinstance(tokens, np.ndarray) else list(tokens)
    return np.ascontiguousarray(values, dtype="<i4")


def content_digest(tokens: Tokens) -> bytes:
    """Return the digest of a text alone, wherever it stands."""
    text = as_tokens(tokens).tobytes()
    return blake2b(text, digest_size=DIGEST_BYTES, person=b"kvshare-content").digest()


def context_digests(domain: bytes, tokens: Tokens, positions: Iterable[int]) -> dict[int, bytes]:
    """Return the digest of the whole left context of some positions, in one pass.

    Args:
        domain: Digest of the tenant domain.
        tokens: The prompt from its first token on, shape (n,).
        positions: Positions in the prompt, in [0, n].

    Returns:
        Per position the digest of the domain and ``tokens[:position]``.
    """
    state = blake2b(digest_size=DIGEST_BYTES, person=b"kvshare-context")
    # With its length, so that no domain's end passes for the beginning of a text.
    state.update(len(domain).to_bytes(4, "little") + domain)
    text = memoryview(as_tokens(tokens).tobytes())
    digests: dict[int, bytes] = {}
    done = 0
    for position in sorted(set(positions)):
        state.update(text[4 * done : 4 * position])
        digests[position] = state.copy().digest()
        done = position
    return digests


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """A piece of a computed prompt that is worth storing.

    Args:
        tokens: Its token ids, shape (n,).
        position: Position of its first token in the prompt.
        context: Digest of the domain and all token ids before it.
        generation: See `Segment`.
        content: Digest of its tokens.
        anchors: Its selected windows; the last ones may reach into the piece that follows.
        continues: Whether it begins where the draft before it in the list ends.
    """

    tokens: Tokens
    position: int
    context: bytes
    generation: int
    content: bytes
    anchors: Anchors
    continues: bool = False


@dataclass(slots=True, eq=False)
class Segment:
    """A stored piece of text.

    Args:
        key: Unique in the store's life.
        domain: Digest of the tenant domain; nobody else may use the segment.
        tokens: Its token ids, shape (n,).
        position: Position of its first token when its KV was computed.
        context: Digest of the domain and all token ids before it.
        generation: 0 where its KV was computed in an exact context; k + 1 where that context held
            approximate KV of generation k.
        content: Digest of its tokens.
        anchors: Its selected windows.
        source: Names the computed text that it is part of; segments of one source that are
            neighbours there are linked.
        previous: The segment that ended where this one begins, while it is stored.
        following: The segment that began where this one ends, while it is stored.
        references: Plans in flight that use it; it is not evicted before they let go.
        hits: Plans that ever used it.
        last_used: Number of plans that the index had seen when one last did, or it was stored.
        chances: Evictions that it is spared because of its hits.
        proven: Whether it was reused, or its text came back after it had been evicted.
    """

    key: int
    domain: bytes
    tokens: Tokens
    position: int
    context: bytes
    generation: int
    content: bytes
    anchors: Anchors = field(repr=False)
    source: int
    previous: Segment | None = field(default=None, repr=False)
    following: Segment | None = field(default=None, repr=False)
    references: int = 0
    hits: int = 0
    last_used: int = 0
    chances: int = 0
    proven: bool = False

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Run:
    """``prompt[start : start + length]`` equals ``segment.tokens[offset : offset + length]``.

    Args:
        start: First position in the prompt.
        segment: Where the KV comes from.
        offset: First token in the segment.
        length: Tokens.
        exact: Whether the segment's position and whole left context are the prompt's own and its
            KV was computed in an exact context, so that its KV is what a full prefill would give.
    """

    start: int
    segment: Segment
    offset: int
    length: int
    exact: bool = False

    @property
    def end(self) -> int:
        """Position after the last one."""
        return self.start + self.length

    @property
    def shift(self) -> int:
        """How many positions the KV moves to the right."""
        return self.start - (self.segment.position + self.offset)
