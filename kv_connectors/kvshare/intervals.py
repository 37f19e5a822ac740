"""Weighted interval scheduling in which intervals may be trimmed.

Common runs of a prompt with different segments overlap. Chosen are non-overlapping parts of them,
each at least ``least`` long, that are worth the most. The best parts begin and end at ends of
intervals, or some multiple of ``least`` away where parts in a row are no longer than they must be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PART_COST = 1 << 9
"""Cost of one more part, so that of equally good choices the one with the fewest parts wins."""

TIGHT = 2
"""Parts in a row of least length that are reckoned with; more of them may be worth a bit less than
the best choice."""

CROWD = 12
"""Overlapping intervals above which those that no cover needs are left out, to bound the time."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An interval [start, end) whose every token is worth ``worth``; ``index`` is the caller's."""

    start: int
    end: int
    worth: int
    index: int


@dataclass(slots=True)
class _Open:
    """The best place so far at which a part of an interval may begin."""

    value: int
    begin: int
    following: int
    """Next point that comes into question."""


def choose(intervals: Sequence[Interval], least: int) -> list[Interval]:
    """Return the parts to use, in order; intervals shorter than ``least`` are not used."""
    long = [interval for interval in intervals if interval.end - interval.start >= least]
    long.sort(key=lambda i: (i.start, -i.end, -i.worth, i.index))
    chosen: list[Interval] = []
    for cluster in _clusters(long):
        cluster = _undominated(cluster)
        if len(cluster) > CROWD:
            cluster = _cover(cluster)
        chosen += cluster if len(cluster) == 1 else _best_parts(cluster, least)
    return chosen


def _clusters(intervals: Sequence[Interval]) -> Iterator[list[Interval]]:
    """Split intervals in order of start into groups that do not overlap each other."""
    cluster: list[Interval] = []
    reach = 0
    for interval in intervals:
        if cluster and interval.start >= reach:
            yield cluster
            cluster = []
        reach = max(reach, interval.end)
        cluster.append(interval)
    if cluster:
        yield cluster


def _undominated(cluster: Sequence[Interval]) -> list[Interval]:
    """Leave out intervals inside one that is worth at least as much per token."""
    reach: dict[int, int] = {}
    kept: list[Interval] = []
    for interval in cluster:
        if all(end < interval.end for worth, end in reach.items() if worth >= interval.worth):
            kept.append(interval)
            reach[interval.worth] = interval.end
    return kept


def _cover(cluster: Sequence[Interval]) -> list[Interval]:
    """Keep of the intervals of each worth those that reach farthest and cover the same tokens."""
    kept: list[Interval] = []
    for worth in {interval.worth for interval in cluster}:
        reach = -1
        best: Interval | None = None
        for interval in (i for i in cluster if i.worth == worth):
            if best and interval.start > reach:
                kept.append(best)
                reach, best = best.end, None
            if best is None or interval.end > best.end:
                best = interval
        if best and best.end > reach:
            kept.append(best)
    return sorted(kept, key=lambda i: (i.start, i.index))


def _best_parts(cluster: Sequence[Interval], least: int) -> list[Interval]:
    """Choose parts by dynamic programming over the points at which parts may begin and end."""
    points = _points(cluster, least)
    values = [0]
    parts: list[Interval | None] = [None]
    states = [_Open(-1, -1, points.index(interval.start)) for interval in cluster]
    for point in points[1:]:
        value, part = values[-1], None
        for interval, state in zip(cluster, states, strict=True):
            if interval.start < point <= interval.end:
                _advance(state, points, values, point - least, interval.worth)
                reached = state.value + interval.worth * point - PART_COST
                if state.begin >= 0 and reached > value:
                    value = reached
                    part = Interval(state.begin, point, interval.worth, interval.index)
        values.append(value)
        parts.append(part)
    return _walk_back(points, parts)


def _points(cluster: Sequence[Interval], least: int) -> list[int]:
    points: set[int] = set()
    for interval in cluster:
        for away in range(-TIGHT * least, TIGHT * least + 1, least):
            points.update((interval.start + away, interval.end + away))
    begin, end = cluster[0].start, max(interval.end for interval in cluster)
    return sorted(point for point in points if begin <= point <= end)


def _advance(
    state: _Open, points: Sequence[int], values: Sequence[int], last: int, worth: int
) -> None:
    """Consider beginnings up to ``last``."""
    while points[state.following] <= last:
        begin = points[state.following]
        value = values[state.following] - worth * begin
        if state.begin < 0 or value > state.value:
            state.value, state.begin = value, begin
        state.following += 1


def _walk_back(points: Sequence[int], parts: Sequence[Interval | None]) -> list[Interval]:
    chosen: list[Interval] = []
    i = len(points) - 1
    while i > 0:
        part = parts[i]
        if part is None:
            i -= 1
        else:
            chosen.append(part)
            i = points.index(part.start)
    return chosen[::-1]
