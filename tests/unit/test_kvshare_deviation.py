"""Which reused tokens each selector recomputes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_plugins.kv_connectors.kvshare.deviation import SELECTORS, Budget, Reused

BUDGET = Budget(least=0.05, most=0.15, skip_eps=1e-3, theta=2.0)


def reused(deviation, links=(), norm=1.0, seed=0):
    deviation = np.asarray(deviation, np.float32)
    mask = np.zeros(len(deviation), bool)
    mask[list(links)] = True
    return Reused(deviation, np.full(len(deviation), norm, np.float32), mask, seed)


def chosen(name, *args, budget=BUDGET, **kwargs):
    return np.flatnonzero(SELECTORS[name](reused(*args, **kwargs), budget)).tolist()


def test_dhd_takes_what_deviates_by_twice_the_median():
    deviation = np.ones(100)
    deviation[[3, 40, 41, 42, 43, 44, 80]] = 5
    assert chosen("dhd", deviation) == [3, 40, 41, 42, 43, 44, 80]


def test_dhd_keeps_within_its_bounds():
    many = np.ones(100)
    many[:40] = np.arange(40) + 10
    assert chosen("dhd", many) == list(range(25, 40))
    assert len(chosen("dhd", np.ones(100))) == 5


def test_dhd_spends_the_least_where_nothing_deviates():
    deviation = np.full(100, 1e-6)
    deviation[7] = 5e-4
    assert 7 in chosen("dhd", deviation)
    assert len(chosen("dhd", deviation)) == 5
    none = Budget(least=0.0, most=0.15, skip_eps=1e-3, theta=2.0)
    assert chosen("dhd", deviation, budget=none) == []


def test_what_deviates_is_taken_alone_where_nothing_else_does():
    deviation = np.full(1000, 1e-7)
    deviation[::2] = 3e-7
    deviation[[5, 300]] = 0.2
    none = Budget(least=0.0, most=0.15, skip_eps=1e-3, theta=2.0)
    assert chosen("dhd", deviation, links=range(300, 316), budget=none) == [5, 300]


def test_links_are_candidates_below_twice_the_median():
    deviation = np.ones(100)
    deviation[50:55] = 9
    assert chosen("dhd", deviation, links=range(10, 16)) == [*range(10, 16), *range(50, 55)]


def test_links_make_way_for_what_deviates_more():
    deviation = np.ones(100)
    deviation[50:65] = 9
    deviation[12] = 20
    assert chosen("dhd", deviation, links=range(10, 16)) == [12, *range(50, 64)]


def test_the_other_rules_are_those_of_their_methods():
    deviation = np.arange(100.0)
    assert chosen("cacheblend", deviation) == list(range(85, 100))
    assert chosen("epic", deviation, links=[1, 2, 70]) == [1, 2, 70]
    assert chosen("none", deviation) == []
    assert len(chosen("random", deviation)) == 15
    assert chosen("random", deviation, seed=3) == chosen("random", deviation, seed=3)
    assert chosen("random", deviation, seed=3) != chosen("random", deviation, seed=4)


def test_of_equal_deviations_the_earlier_is_taken_on_every_rank():
    assert chosen("cacheblend", np.ones(20)) == [0, 1, 2]


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0, 1e4])
def test_dhd_takes_the_highest_at_every_scale(scale):
    deviation = np.random.default_rng(0).permutation(np.arange(1, 1001)) * scale
    taken = SELECTORS["dhd"](reused(deviation, norm=1e-12), Budget(0.1, 0.1, 1e-3, 2.0))
    assert set(np.flatnonzero(taken)) == set(np.argsort(-deviation)[:100])


@pytest.mark.parametrize("name", ["dhd", "cacheblend", "random"])
def test_with_all_of_the_budget_everything_is_recomputed(name):
    everything = Budget(least=1.0, most=1.0, skip_eps=1e-3, theta=2.0)
    assert chosen(name, np.zeros(50), budget=everything) == list(range(50))


@given(
    st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=200),
    st.floats(0, 1),
    st.floats(0, 1),
    st.data(),
)
def test_dhd_never_leaves_its_budget(deviation, least, share, data):
    most = least + (1 - least) * share
    links = data.draw(st.sets(st.integers(0, len(deviation) - 1)))
    budget = Budget(least, most, 1e-3, 2.0)
    count = len(chosen("dhd", deviation, links=links, budget=budget))
    low, high = budget.tokens(len(deviation))
    # Rounding may put the least above the most by one token.
    assert min(low, high) <= count <= max(low, high)
