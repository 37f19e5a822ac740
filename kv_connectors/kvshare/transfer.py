"""What the scheduler's part tells the workers' in each step, and what they answer.

Everything here crosses process boundaries inside vLLM's own messages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm_plugins.kv_connectors.kvshare.anchors import Anchors
    from vllm_plugins.kv_connectors.kvshare.segments import Run, Segment


@dataclass(frozen=True)
class Source:
    """A run of a prompt and the stored KV that it takes.

    Attributes:
        start: First position in the prompt.
        length: Tokens.
        key: The stored segment.
        offset: First token in the segment.
        position: Position at which that token's KV was computed.
        continues: Whether its left neighbour in the prompt is its left neighbour in the text that
            was stored, so that no seam lies before it.
    """

    start: int
    length: int
    key: int
    offset: int
    position: int
    continues: bool


def sources_of(runs: Iterable[Run]) -> tuple[Source, ...]:
    """Return the runs as the workers see them, with the seams between them."""
    sources: list[Source] = []
    before: Run | None = None
    for run in runs:
        position = run.segment.position + run.offset
        continues = run.exact or (
            before is not None
            and before.end == run.start
            and before.segment.source == run.segment.source
            and before.segment.position + before.offset + before.length == position
        )
        sources.append(
            Source(run.start, run.length, run.segment.key, run.offset, position, continues)
        )
        before = run
    return tuple(sources)


@dataclass(frozen=True)
class Reuse:
    """One request's KV to be put together before it may run.

    Attributes:
        request_id: The request.
        token_ids: Prompt up to the end of the span, int32, shape (end,).
        start: First position of the span; what is before it is in the cache.
        sources: Runs in order, without overlap, all within the span.
        block_ids: KV blocks of the request from its first token on, int32.
        exact: Whether all KV of the span comes from the sources as a full prefill would give it, so
            that there is nothing to compute.
    """

    request_id: str
    token_ids: np.ndarray
    start: int
    sources: tuple[Source, ...]
    block_ids: np.ndarray
    exact: bool

    @property
    def end(self) -> int:
        """Position after the span."""
        return len(self.token_ids)


@dataclass(frozen=True, eq=False)
class Label:
    """What is known of a segment beside its KV: with it in the file, the index can be refilled.

    Attributes:
        domain: Digest of its tenant domain.
        tokens: Its token ids, int32, shape (n,).
        content: Digest of its tokens.
        context: Digest of the domain and all token ids before it.
        position: Position of its first token when its KV was computed.
        generation: See `Segment`.
        source: Names the computed text that it is part of.
        previous: Key of the segment that ended where this one begins, if it was stored then.
        anchors: Its selected windows.
    """

    domain: bytes
    tokens: np.ndarray
    content: bytes
    context: bytes
    position: int
    generation: int
    source: int
    previous: int | None
    anchors: Anchors

    @classmethod
    def of(cls, segment: Segment) -> Label:
        """Return the label of a stored segment."""
        return cls(
            domain=segment.domain,
            tokens=segment.tokens,
            content=segment.content,
            context=segment.context,
            position=segment.position,
            generation=segment.generation,
            source=segment.source,
            previous=segment.previous.key if segment.previous else None,
            anchors=segment.anchors,
        )


@dataclass(frozen=True)
class Save:
    """KV to keep under a new key: ``length`` tokens from ``position`` on.

    Attributes:
        key: The new segment.
        position: Its first position in the request.
        length: Its tokens.
        block_ids: KV blocks of the request from its first token on, int32.
        label: What goes into the segment's file; None where there is no disk tier.
    """

    key: int
    position: int
    length: int
    block_ids: np.ndarray
    label: Label | None = None


@dataclass(frozen=True)
class Refresh:
    """A decoding request whose stale tokens are to be looked at.

    Attributes:
        request_id: The request.
        position: Position of the last token whose KV is computed.
        token_id: That token.
        block_ids: KV blocks of the request from its first token on, int32.
    """

    request_id: str
    position: int
    token_id: int
    block_ids: np.ndarray


@dataclass
class Orders(KVConnectorMetadata):
    """What the workers have to do in one step.

    Attributes:
        reuses: Requests whose KV is to be put together from now on.
        cancelled: Requests that ended while that was under way.
        refreshes: Decoding requests to look at after this step.
        saves: What to store once this step's KV is computed.
        evicted: Segments to forget.
        known: In the first orders of an engine with a disk tier: all segments of its index. Other
            files that a worker finds are of no use any more.
    """

    reuses: list[Reuse] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    refreshes: list[Refresh] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    evicted: list[int] = field(default_factory=list)
    known: list[int] | None = None

    def anon_repr(self) -> str:
        """Return what vLLM may write into a log when a step fails: no token ids."""
        return f"Orders(reuses={len(self.reuses)}, saves={len(self.saves)})"


@dataclass
class Results(KVConnectorWorkerMetadata):
    """What a worker reports after a step.

    Attributes:
        lost: Segments that could not be loaded.
        failed: Requests that are given up because of that.
        recomputed: By request that is ready: how many reused tokens were computed again.
        refreshed: By decoding request: how many were, in this step; 0 where none may be any more.
        deviations: By request that is ready: the relative deviations of its reused tokens, as
            counts of the buckets of the metric, and their sum.
    """

    lost: set[int] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    recomputed: dict[str, int] = field(default_factory=dict)
    refreshed: dict[str, int] = field(default_factory=dict)
    deviations: dict[str, tuple[list[int], float]] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Results:
        """Join two ranks' reports: what one has lost is of no use to the others."""
        assert isinstance(other, Results)
        return Results(
            self.lost | other.lost,
            self.failed | other.failed,
            self.recomputed | other.recomputed,
            self.refreshed | other.refreshed,
            self.deviations | other.deviations,
        )
