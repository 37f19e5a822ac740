"""Seed and extend: maximal common runs of a prompt and stored text, and the choice among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_plugins.kv_connectors.kvshare.intervals import Interval, choose
from vllm_plugins.kv_connectors.kvshare.segments import Run, Segment, Tokens, context_digests

APPROXIMATE_WORTH = 17 << 10
"""Worth of a token that is reused approximately: some 15 of 100 are computed again."""

EXACT_WORTH = 20 << 10
"""Worth of a token that is reused exactly."""

LEAST_EXTENSIONS = 64
"""Extensions that any search may try before it leaves out tokens that have a match already."""


@dataclass(frozen=True, slots=True)
class Match:
    """A maximal common run of the prompt and a stored text: runs that join, of one source."""

    runs: Sequence[Run]

    @property
    def start(self) -> int:
        """First position in the prompt."""
        return self.runs[0].start

    @property
    def end(self) -> int:
        """Position after the last one."""
        return self.runs[-1].end

    def part(self, start: int, end: int, exact: bool) -> Iterator[Run]:
        """Yield what of the runs lies in [start, end)."""
        for run in self.runs:
            low, high = max(start, run.start), min(end, run.end)
            if low < high:
                yield Run(low, run.segment, run.offset + low - run.start, high - low, exact)


class Search:
    """Follows seeds, which must come in order of position, to maximal common runs.

    Args:
        text: The prompt up to where the plan ends, shape (n,).
        start: First position of the plan.
        min_run: Least length of a match, in tokens.
    """

    def __init__(self, text: Tokens, start: int, min_run: int) -> None:
        self.matches: list[Match] = []
        self._text = text
        self._start = start
        self._min_run = min_run
        # Per source and shift, up to where the prompt has been compared.
        self._compared: dict[tuple[int, int], int] = {}
        self._covered = start
        self._left = max(LEAST_EXTENSIONS, (len(text) - start) // 16)

    def extend(self, at: int, segment: Segment, offset: int) -> None:
        """Follow the equality of ``text[at]`` and ``segment.tokens[offset]`` both ways."""
        line = segment.source, at - segment.position - offset
        if at < self._compared.get(line, 0):
            return
        # Periodic text matches itself at every shift; other text never gets here.
        if self._left <= 0 and at < self._covered:
            return
        self._left -= 1
        runs = self._runs(at, segment, offset)
        if not runs:
            return
        self._compared[line] = runs[-1].end
        if runs[-1].end - runs[0].start >= self._min_run:
            self.matches.append(Match(runs))
            self._covered = max(self._covered, runs[-1].end)

    def _runs(self, at: int, segment: Segment, offset: int) -> list[Run]:
        run = self._run(at, segment, offset)
        if run is None:
            return []
        runs = [run]
        while (run := self._before(runs[0])) is not None:
            runs.insert(0, run)
        while (run := self._after(runs[-1])) is not None:
            runs.append(run)
        return runs

    def _before(self, run: Run) -> Run | None:
        previous = run.segment.previous
        if run.offset or previous is None or run.start == self._start:
            return None
        return self._run(run.start - 1, previous, len(previous) - 1)

    def _after(self, run: Run) -> Run | None:
        following = run.segment.following
        at_end = run.offset + run.length == len(run.segment)
        if not at_end or following is None or run.end == len(self._text):
            return None
        return self._run(run.end, following, 0)

    def _run(self, at: int, segment: Segment, offset: int) -> Run | None:
        """Return the largest run around ``at`` inside one segment."""
        shift = at - offset
        low, high = max(self._start, shift), min(len(self._text), shift + len(segment))
        differs = np.flatnonzero(self._text[low:high] != segment.tokens[low - shift : high - shift])
        after = int(np.searchsorted(differs, at - low))
        end = low + int(differs[after]) if after < len(differs) else high
        if end == at:
            return None
        begin = low + int(differs[after - 1]) + 1 if after else low
        return Run(begin, segment, begin - shift, end - begin)


def choose_runs(text: Tokens, matches: Sequence[Match], min_run: int) -> list[Run]:
    """Choose non-overlapping runs: the most tokens, exact ones before others."""
    exact = _exact_matches(text, matches)
    intervals = [
        Interval(match.start, match.end, _worth(match, i in exact), i)
        for i, match in enumerate(matches)
    ]
    runs: list[Run] = []
    for part in choose(intervals, min_run):
        runs.extend(matches[part.index].part(part.start, part.end, part.index in exact))
    return runs


def _worth(match: Match, exact: bool) -> int:
    """Worth per token; generation and shift only tip the balance."""
    if exact:
        return EXACT_WORTH
    first = match.runs[0]
    return APPROXIMATE_WORTH + (first.shift == 0) - 2 * min(first.segment.generation, 1000)


def _exact_matches(text: Tokens, matches: Sequence[Match]) -> set[int]:
    """Return the indices of matches whose source has the prompt's own left context."""
    firsts: dict[bytes, dict[int, Segment]] = {}
    for i, match in enumerate(matches):
        if _may_be_exact(match, text):
            segment = match.runs[0].segment
            firsts.setdefault(segment.domain, {})[i] = segment
    exact: set[int] = set()
    for domain, segments in firsts.items():
        digests = context_digests(domain, text, (s.position for s in segments.values()))
        exact.update(i for i, s in segments.items() if digests[s.position] == s.context)
    return exact


def _may_be_exact(match: Match, text: Tokens) -> bool:
    first = match.runs[0]
    if first.shift or first.segment.generation:
        return False
    # What of the segment lies before the run must be the prompt's own too.
    own = text[first.segment.position : first.start]
    return np.array_equal(own, first.segment.tokens[: first.offset])
