"""The choice of parts of intervals against dynamic programming over every position."""

import itertools
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_plugins.kv_connectors.kvshare.intervals import PART_COST, Interval, choose

WORTHS = (17 << 10, (17 << 10) - 2, 20 << 10)


def intervals(most, least=4, span=60):
    row = st.tuples(st.integers(0, span), st.integers(least, 25), st.sampled_from(WORTHS))
    return st.lists(row, min_size=1, max_size=most).map(
        lambda rows: [Interval(s, s + n, worth, i) for i, (s, n, worth) in enumerate(rows)]
    )


def total(parts):
    return sum(part.worth * (part.end - part.start) - PART_COST for part in parts)


def best(given, least):
    """The most that any choice is worth."""
    end = max(interval.end for interval in given)
    values = [0] * (end + 1)
    for x in range(1, end + 1):
        values[x] = values[x - 1]
        for i in given:
            if i.start < x <= i.end:
                begins = range(i.start, x - least + 1)
                reached = (values[y] + i.worth * (x - y) - PART_COST for y in begins)
                values[x] = max(values[x], *reached, 0)
    return values[end]


def check_parts(parts, given, least):
    by_index = {interval.index: interval for interval in given}
    for part in parts:
        whole = by_index[part.index]
        assert whole.start <= part.start < part.end <= whole.end
        assert part.worth == whole.worth
        assert part.end - part.start >= least
    assert all(a.end <= b.start for a, b in itertools.pairwise(parts))


@settings(max_examples=250, deadline=None, derandomize=True)
@given(intervals(8), st.sampled_from([3, 4, 8]))
def test_nothing_is_worth_more(given, least):
    parts = choose(given, least)
    check_parts(parts, given, least)
    long = [i for i in given if i.end - i.start >= least]
    assert total(parts) == (best(long, least) if long else 0)


def test_parts_of_least_length_in_a_row_are_found():
    # The third begins four late, at 20, so that the two before it have eight tokens each.
    given = [Interval(4, 15, WORTHS[0], 0), Interval(11, 21, WORTHS[0], 1),
             Interval(16, 30, WORTHS[2], 2)]  # fmt: skip
    assert total(choose(given, 8)) == best(given, 8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(intervals(60, span=100))
def test_a_crowd_costs_little(given):
    parts = choose(given, 4)
    check_parts(parts, given, 4)
    covered = set().union(*(range(i.start, i.end) for i in given))
    chosen = set().union(*(range(i.start, i.end) for i in parts))
    assert len(chosen) >= len(covered) - 8
    assert total(parts) >= 0.8 * best(given, 4)


def test_very_many_overlapping_intervals_take_no_time():
    # Each begins and ends one after the one before, as matches of periodic text do.
    given = [Interval(i, i + 512, WORTHS[0], i) for i in range(4000)]
    start = time.thread_time()
    parts = choose(given, 32)
    assert time.thread_time() - start < 1
    check_parts(parts, given, 32)
    assert sum(part.end - part.start for part in parts) == 4511
    assert len(parts) == 9


def test_fewer_parts_win_a_tie():
    given = [Interval(0, 20, WORTHS[0], 0), Interval(20, 40, WORTHS[0], 1),
             Interval(0, 40, WORTHS[0], 2)]  # fmt: skip
    assert [part.index for part in choose(given, 5)] == [2]
