"""Which rows of a span are computed beside the chosen ones, and what passes are thought to cost."""

from itertools import combinations, groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_plugins.kv_connectors.kvshare.work import PASS_COST, PassSize, bridged


def rows(text):
    return np.array([letter == "1" for letter in text], bool)


def cost(mask, max_runs):
    runs = sum(value for value, _ in groupby(mask))
    return mask.sum() + PASS_COST * -(-runs // max_runs)


@pytest.mark.parametrize(
    ("wanted", "filled"),
    [("1011", "1111"), ("1001", "1001"), ("0101", "0111"), ("0", "0"), ("10101", "11111")],
)
def test_a_row_between_two_wanted_ones_is_computed_with_them(wanted, filled):
    assert (bridged(rows(wanted), 256) == rows(filled)).all()


def test_few_rows_are_computed_to_save_a_pass_and_no_more_than_needed():
    wanted = rows("1000100100")
    assert (bridged(wanted, 1) == rows("1111111100")).all()
    # Two passes of two runs: one hole less makes it one.
    four = rows("100010010001")
    assert (bridged(four, 3) == rows("100011110001")).all()
    far = rows("1" + "0" * (PASS_COST + 1) + "1")
    assert (bridged(far, 1) == far).all()


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 5))
def test_no_other_choice_of_holes_is_cheaper(flags, max_runs):
    wanted = np.array(flags)
    found = bridged(wanted, max_runs)
    assert (found | ~wanted).all()
    # What is added lies between wanted rows.
    assert not found[: int(np.argmax(wanted))].any()
    edges = np.flatnonzero(np.diff(np.concatenate(([False], wanted, [False]))))
    holes = list(zip(edges[1:-1:2], edges[2::2], strict=True))[:8]
    single = wanted.copy()
    for begin, end in zip(edges[1:-1:2], edges[2::2], strict=True):
        single[begin:end] |= end - begin == 1
    for count in range(len(holes) + 1):
        for chosen in combinations(holes, count):
            other = single.copy()
            for begin, end in chosen:
                other[begin:end] = True
            assert cost(found, max_runs) <= cost(other, max_runs)


def test_passes_cost_more_the_fewer_runs_they_hold():
    costs = [PassSize(runs, 10_000).cost(300, 260, 6.0) for runs in (256, 32, 8, 4, 1)]
    assert costs[0] == pytest.approx(300 + PASS_COST + 4 * PASS_COST / 256)
    assert costs == sorted(costs)
    # At last all rows between are computed, in one pass.
    assert costs[-1] == pytest.approx(300 + PASS_COST + 259 * 6)
    assert PassSize(8, 100).cost(1000) == 1000 + 10 * PASS_COST


@given(st.integers(1, 400), st.integers(1, 64), st.integers(0, 10**6))
def test_the_estimate_is_near_what_scattered_rows_cost(chosen, max_runs, seed):
    wanted = np.zeros(2000, bool)
    wanted[np.random.default_rng(seed).choice(2000, chosen, replace=False)] = True
    actual = cost(bridged(wanted, max_runs), max_runs)
    guess = PassSize(max_runs, 10**6).cost(chosen, chosen, (2000 - chosen) / chosen)
    assert 0.6 * actual - 2 * PASS_COST <= guess <= 2 * actual + 2 * PASS_COST
