"""Which tokens of a prompt take their KV from which stored segment, and what of it is stored.

Whole chunks that are stored, and anchors, name places where the prompt may equal stored text; from
each the equality is followed on token ids in both directions, also into the segments that were its
neighbours. So a run never holds a different token, and by winnowing no common run of ``min_run``
tokens is missed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from vllm_plugins.kv_connectors.kvshare.anchors import Anchors, winnow
from vllm_plugins.kv_connectors.kvshare.chunking import WINDOW, ChunkSizes, Hashes, WindowHash
from vllm_plugins.kv_connectors.kvshare.index import SegmentIndex
from vllm_plugins.kv_connectors.kvshare.matching import Search, choose_runs
from vllm_plugins.kv_connectors.kvshare.segments import (
    Draft,
    Run,
    Segment,
    Tokens,
    as_tokens,
    content_digest,
    context_digests,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How ``prompt[start:end]`` is made of runs and gaps.

    Args:
        start: First position; what is before it has KV already.
        end: Position after the last one.
        runs: In order, without overlap. A run shorter than ``min_run`` directly continues, or is
            continued by, another one, in the prompt and in the text that was stored.
        version: Version of the index that the plan was made from.
        behind: Highest generation of the approximate KV before ``start``; -1 where that is exact.
    """

    start: int
    end: int
    runs: tuple[Run, ...]
    version: int
    behind: int = -1

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """What no run covers: ``(start, end)``, in order."""
        return _complement(self.start, self.end, ((run.start, run.end) for run in self.runs))

    @property
    def reused(self) -> int:
        """Tokens that runs cover."""
        return sum(run.length for run in self.runs)

    @property
    def segments(self) -> list[Segment]:
        """The segments of the runs, each once, in order of first use."""
        return list({run.segment.key: run.segment for run in self.runs}.values())

    @property
    def exact_prefix_end(self) -> int:
        """How far from ``start`` exact runs reach without a gap."""
        reach = self.start
        for run in self.runs:
            if run.start != reach or not run.exact:
                break
            reach = run.end
        return reach

    @property
    def is_exact(self) -> bool:
        """Whether all of it is what a full prefill would give: there is nothing to compute."""
        return self.exact_prefix_end >= self.end

    def shortened(self, block: int, exact_only: bool) -> Plan:
        """Return the plan cut so that it ends on a block's edge, and not far beyond its last run.

        Args:
            block: Tokens of a KV block.
            exact_only: Whether it is to reach only as far as its exact runs, without a gap.
        """
        reach = self.runs[-1].end if self.runs else self.start
        if exact_only:
            end = self.exact_prefix_end // block * block
        else:
            end = min(-(-reach // block) * block, self.end)
        runs = (run for run in self.runs if run.start < end and (run.exact or not exact_only))
        kept = tuple(
            Run(r.start, r.segment, r.offset, min(r.length, end - r.start), r.exact) for r in runs
        )
        return replace(self, end=max(end, self.start), runs=kept)

    def generation_at(self, position: int) -> int:
        """Return the generation of KV that is computed at a position beside the runs."""
        used = (r.segment.generation for r in self.runs if not r.exact and r.start < position)
        return max((self.behind, *used)) + 1


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """A part of a prompt that becomes a draft: ``prompt[low:high]``."""

    low: int
    high: int
    generation: int
    anchors: Anchors
    continues: bool

    def draft(self, text: Tokens, context: bytes) -> Draft:
        """Return the draft, which keeps no reference to the prompt."""
        tokens = text[self.low : self.high].copy()
        return Draft(
            tokens=tokens,
            position=self.low,
            context=context,
            generation=self.generation,
            content=content_digest(tokens),
            anchors=self.anchors,
            continues=self.continues,
        )


class Planner:
    """Makes plans from an index, and drafts of what to store.

    Args:
        index: The stored segments, all of them drafted with the same ``min_run``.
        min_run: Least length of a run, in tokens; at least 16.
        max_generation: Segments of a higher generation are neither used nor stored.
        chunk_sizes: Bounds of the chunks that are stored.
        public: Digest of a domain whose text every other one may use too.
        exact_only: Whether text is stored again behind another context, as only there it is exact.
    """

    def __init__(
        self,
        index: SegmentIndex,
        min_run: int = 32,
        max_generation: int = 1,
        chunk_sizes: ChunkSizes | None = None,
        public: bytes | None = None,
        *,
        exact_only: bool = False,
    ) -> None:
        if min_run < WINDOW:
            raise ValueError(f"min_run={min_run} is below {WINDOW}")
        self._index = index
        self._min_run = min_run
        self._max_generation = max_generation
        self._chunks = chunk_sizes or ChunkSizes()
        self._public = public
        self._exact_only = exact_only

    def plan(self, domain: bytes, tokens: Iterable[int] | Tokens, start: int, end: int) -> Plan:
        """Plan the reuse for ``tokens[start:end]``.

        Args:
            domain: Digest of the request's tenant domain.
            tokens: The prompt from its first token on, shape (n,).
            start: Where to begin; what is before it has KV already.
            end: Where to stop, in [start, n].
        """
        text = as_tokens(tokens)[:end]
        search = Search(text, start, self._min_run)
        seeds = self._seeds(domain, text, start)
        if self._public is not None and self._public != domain:
            seeds += self._seeds(self._public, text, start)
        for at, segment, offset in sorted(seeds, key=lambda seed: seed[0]):
            if segment.generation <= self._max_generation:
                search.extend(at, segment, offset)
        runs = choose_runs(text, search.matches, self._min_run)
        return Plan(start, end, tuple(runs), self._index.version)

    def _seeds(self, domain: bytes, text: Tokens, start: int) -> list[tuple[int, Segment, int]]:
        """Return ``(position, segment, offset)`` of what may be equal to a domain's text."""
        hashes = WindowHash(domain)(text)
        seeds: list[tuple[int, Segment, int]] = []
        bounds = self._chunks.bounds(hashes, len(text))
        first = bisect_left(bounds, start)
        for low, high in pairwise(bounds[first:]):
            for segment in self._index.by_content(domain, content_digest(text[low:high])):
                seeds.append((low, segment, 0))
        anchors = winnow(hashes[start:], self._min_run)
        found = self._index.by_anchors(domain, anchors.hashes.tolist())
        for at, places in zip((anchors.offsets + start).tolist(), found, strict=True):
            for segment, offset in places:
                seeds.append((at, segment, offset))
        return seeds

    def new_segments(
        self,
        domain: bytes,
        tokens: Iterable[int] | Tokens,
        plan: Plan | None,
        start: int,
        end: int,
        *,
        exact: bool = False,
    ) -> list[Draft]:
        """Draft what is worth storing of a prompt whose KV is computed by now.

        That is the chunks of the whole prompt, less what the plan reused and what the domain has
        stored since; parts that would be shorter than ``min_run`` go with the part beside them.

        Args:
            domain: Digest of the request's tenant domain.
            tokens: The prompt from its first token on, shape (n,).
            plan: The plan by which the prompt was computed; None where nothing was reused.
            start: First position whose KV is at hand; what is before it has exact KV.
            end: Position after the last one.
            exact: Whether the KV is exact in spite of reuse, as everything was computed again.
        """
        text = as_tokens(tokens)[:end]
        done = plan or Plan(start, end, (), -1)
        hashes = WindowHash(domain)(text)
        bounds = self._chunks.bounds(hashes, len(text))
        pieces: list[_Piece] = []
        for low, high in _complement(start, end, self._held(domain, text, done, start, exact)):
            generation = 0 if exact else done.generation_at(low)
            if high - low >= self._min_run and generation <= self._max_generation:
                pieces.extend(self._pieces(hashes, bounds, low, high, generation))
        contexts = context_digests(domain, text, (piece.low for piece in pieces))
        return [piece.draft(text, contexts[piece.low]) for piece in pieces]

    def _held(
        self, domain: bytes, text: Tokens, done: Plan, start: int, exact: bool
    ) -> list[tuple[int, int]]:
        """Return what need not be stored: ``(start, end)``, in order of start."""
        held = [(run.start, run.end) for run in done.runs]
        if done.version != self._index.version:
            # Requests that ran beside this one may have stored the same text.
            now = self.plan(domain, text, start, len(text))
            for run in now.runs:
                allowed = 0 if exact else done.generation_at(run.start)
                serves = run.exact or not self._exact_only
                if serves and run.segment.generation <= allowed:
                    held.append((run.start, run.end))
        return sorted(held)

    def _pieces(
        self, hashes: Hashes, bounds: Sequence[int], low: int, high: int, generation: int
    ) -> Iterator[_Piece]:
        """Cut ``prompt[low:high]`` at the bounds of chunks."""
        cuts = [low]
        for bound in bounds[bisect_right(bounds, low) : bisect_left(bounds, high)]:
            if bound - cuts[-1] >= self._min_run:
                cuts.append(bound)
        if len(cuts) > 1 and high - cuts[-1] < self._min_run:
            cuts.pop()
        # Over all pieces at once, so that a common run across their seams has an anchor too.
        anchors = winnow(hashes[low : max(high - WINDOW + 1, low)], self._min_run)
        for begin, end in zip(cuts, [*cuts[1:], high], strict=True):
            own = anchors.between(begin - low, end - low)
            yield _Piece(begin, end, generation, own, continues=begin > low)


def _complement(start: int, end: int, spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return what of [start, end) spans in order of start leave out."""
    left: list[tuple[int, int]] = []
    reach = start
    for low, high in spans:
        if low > reach:
            left.append((reach, min(low, end)))
        reach = max(reach, high)
    if reach < end:
        left.append((reach, end))
    return left
