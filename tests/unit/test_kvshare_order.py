"""Order of waiting requests by how much of their prompt is stored."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm_plugins.kv_connectors.kvshare.hit_rate_order import Waiting, hit_rate_order


def order(*waiting, now=100.0, full=5.0, most=8):
    return hit_rate_order(waiting, now, full, most)


def waiting(arrived=100.0, hit=0.0, bypassed=0, started=False, domain=None):
    return Waiting(arrived, hit, bypassed, started, domain)


def test_who_has_most_stored_goes_first_and_equals_keep_their_order():
    assert order(waiting(hit=0.2), waiting(hit=0.9), waiting(hit=0.2)) == [1, 0, 2]


def test_waiting_weighs_up_a_hit():
    assert order(waiting(arrived=94.0), waiting(hit=1.0)) == [0, 1]
    assert order(waiting(arrived=96.0), waiting(hit=1.0)) == [1, 0]


def test_whoever_was_overtaken_often_goes_before_all_others():
    assert order(waiting(hit=1.0), waiting(bypassed=8)) == [1, 0]
    assert order(waiting(hit=1.0), waiting(bypassed=7)) == [0, 1]


def test_a_preempted_answer_goes_first():
    assert order(waiting(bypassed=9), waiting(hit=1.0), waiting(started=True)) == [2, 0, 1]


WAITING = st.builds(
    Waiting,
    st.floats(0, 100),
    st.floats(0, 1),
    st.integers(0, 12),
    st.booleans(),
    st.sampled_from([None, b"one", b"two"]),
)


@given(st.lists(WAITING, max_size=12), st.lists(st.floats(0, 1), min_size=12, max_size=12))
def test_what_one_domain_has_stored_does_not_move_anothers_requests(requests, hits):
    changed = [
        replace(request, hit=hit) if request.domain == b"one" else request
        for request, hit in zip(requests, hits, strict=False)
    ]
    before, after = (hit_rate_order(some, 100.0, 5.0, 8) for some in (requests, changed))
    for place, index in enumerate(before):
        if requests[index].domain != b"one":
            assert after[place] == index


@given(st.lists(WAITING, max_size=20))
def test_nobody_is_left_out(requests):
    assert sorted(hit_rate_order(requests, 100.0, 5.0, 8)) == list(range(len(requests)))


def test_no_request_is_overtaken_more_often_than_allowed():
    """A stream of full hits against one without: it is through after max_bypass of them."""
    lonely, passed = waiting(arrived=0.0), 0
    while True:
        now = passed * 0.001
        hit = Waiting(now, 1.0, 0, False)
        lonely = Waiting(0.0, 0.0, passed, False)
        if hit_rate_order([lonely, hit], now, 1e6, 8)[0] == 0:
            break
        passed += 1
    assert passed == 8
