import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_plugins.bench.capacity import find_capacity


def falling_from(knee):
    """Attainment of a server that keeps up until the knee and then falls behind."""
    return lambda rate: 1.0 if rate <= knee else knee / rate


@given(st.floats(0.05, 50), st.floats(0.1, 20))
def test_bisection_finds_the_knee_within_its_precision(knee, start):
    true = knee / 0.9
    found = find_capacity(falling_from(knee), start, trials=40, precision=1.02)
    assert found.is_bracketed
    assert true / 1.02 <= found.rate <= true
    assert found.fails_at > true


@given(st.floats(0.01, 100), st.integers(1, 8))
def test_trials_are_bounded_and_the_bracket_holds_the_truth(knee, trials):
    found = find_capacity(falling_from(knee), 1.0, trials=trials)
    assert len(found.measured) <= trials
    assert found.rate <= knee / 0.9
    assert found.fails_at is None or found.fails_at > knee / 0.9


def test_six_trials_from_nearby_are_within_a_tenth():
    found = find_capacity(falling_from(2.7), 2.0, trials=6)
    assert 3.0 / 1.1 <= found.rate <= 3.0


def test_search_doubles_then_bisects_on_a_logarithmic_scale():
    found = find_capacity(falling_from(2.7), 1.0, trials=4)
    assert [rate for rate, _ in found.measured] == pytest.approx([1, 2, 4, 8**0.5])


def test_a_server_that_never_keeps_up_has_no_capacity_and_says_so():
    found = find_capacity(lambda _: 0.0, 8.0, trials=4)
    assert (found.rate, found.fails_at, found.is_bracketed) == (0.0, 1.0, False)


def test_a_server_that_always_keeps_up_is_not_bracketed():
    found = find_capacity(lambda _: 1.0, 1.0, trials=3)
    assert (found.rate, found.fails_at, found.is_bracketed) == (4.0, None, False)


def test_target_is_met_when_reached_exactly():
    assert find_capacity(lambda _: 0.9, 1.0, target=0.9, trials=1).rate == 1.0
