"""Dispatch against oracles: least backlog, round robin, and images over encoders."""

from __future__ import annotations

import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_fleets import fleet

from vllm_plugins.routing import (
    Capacity,
    LeastBacklog,
    Ledger,
    Role,
    RoundRobin,
    Work,
    assign_images,
)


def served(dispatcher, ledger, role, works):
    names = []
    for work in works:
        one = dispatcher.choose(role, work, 0.0)
        ledger.open(one, work, 0.0)
        names.append(one.id)
    return names


def test_least_backlog_equals_an_offline_oracle():
    rng = random.Random(0)
    few, ledger = fleet("P0 P1 P2"), Ledger()
    dispatcher = LeastBacklog(few, ledger)
    works = [Work(prompt_tokens=rng.randrange(1, 10_000)) for _ in range(500)]
    queued = dict.fromkeys(("P0", "P1", "P2"), 0)
    for work, name in zip(works, served(dispatcher, ledger, Role.PREFILL, works), strict=True):
        # Lengths are random, so that no two instances are equal after the first three.
        assert queued[name] == min(queued.values())
        queued[name] += work.prompt_tokens


def test_decode_goes_to_the_smallest_share_of_the_kv_cache():
    few, ledger = fleet("D0 D1"), Ledger()
    few["D0"].capacity = Capacity(kv_blocks=1000)
    few["D1"].capacity = Capacity(kv_blocks=3000)
    names = served(LeastBacklog(few, ledger), ledger, Role.DECODE, [Work(160, 160)] * 40)
    assert names.count("D0") == 10 and names.count("D1") == 30


def test_equal_instances_share_evenly_even_when_they_are_always_empty():
    few, ledger = fleet("P0 P1 P2"), Ledger()
    dispatcher = LeastBacklog(few, ledger)
    names = [dispatcher.choose(Role.PREFILL, Work(10), 0.0).id for _ in range(6)]
    assert names == ["P0", "P1", "P2", "P0", "P1", "P2"]


def test_a_tie_goes_to_the_fewest_requests():
    few, ledger = fleet("P0 P1"), Ledger()
    ledger.open(few["P0"], Work(100), 0.0).progress(100)
    chosen = LeastBacklog(few, ledger).choose(Role.PREFILL, Work(10), 0.0)
    assert chosen.id == "P1"


def test_load_from_elsewhere_counts():
    few, ledger = fleet("P0 P1"), Ledger()
    ledger.open(few["P1"], Work(100), 0.0)
    ledger.observe(few["P0"], running=1, waiting=5, kv_usage=0.0, now=0.0)
    assert LeastBacklog(few, ledger).choose(Role.PREFILL, Work(10), 1.0).id == "P1"


@pytest.mark.parametrize("kind", [LeastBacklog, RoundRobin])
def test_full_and_excluded_instances_are_passed_over(kind):
    few, ledger = fleet("P0 P1 P2", capacity=Capacity(max_prefill_tokens=100)), Ledger()
    dispatcher = kind(few, ledger)
    ledger.open(few["P0"], Work(60), 0.0)
    assert dispatcher.choose(Role.PREFILL, Work(50), 0.0, exclude=["P1"]).id == "P2"
    ledger.open(few["P1"], Work(60), 0.0)
    ledger.open(few["P2"], Work(60), 0.0)
    assert dispatcher.choose(Role.PREFILL, Work(50), 0.0) is None
    assert dispatcher.choose(Role.PREFILL, Work(40), 0.0) is not None


@pytest.mark.parametrize("kind", [LeastBacklog, RoundRobin])
def test_a_request_larger_than_the_limit_goes_where_nothing_is(kind):
    few, ledger = fleet("D0 D1", capacity=Capacity(kv_blocks=10)), Ledger()
    dispatcher = kind(few, ledger)
    ticket = ledger.open(few["D0"], Work(1), 0.0)
    assert dispatcher.choose(Role.DECODE, Work(1000), 0.0).id == "D1"
    ledger.open(few["D1"], Work(1), 0.0)
    assert dispatcher.choose(Role.DECODE, Work(1000), 0.0) is None
    ticket.close()
    assert dispatcher.choose(Role.DECODE, Work(1000), 0.0).id == "D0"


def test_kv_fraction_sets_how_much_may_be_promised():
    few, ledger = fleet("D0", capacity=Capacity(kv_blocks=10, kv_fraction=0.5)), Ledger()
    ledger.open(few["D0"], Work(64), 0.0)
    dispatcher = LeastBacklog(few, ledger)
    assert dispatcher.choose(Role.DECODE, Work(16, 1), 0.0) is None
    assert dispatcher.choose(Role.DECODE, Work(15, 1), 0.0) is few["D0"]


def test_nobody_of_the_role_gives_none():
    few, ledger = fleet("P0"), Ledger()
    for kind in (LeastBacklog, RoundRobin):
        assert kind(few, ledger).choose(Role.DECODE, Work(1), 0.0) is None
        assert kind(few, ledger).spread([5], 0.0) is None


def test_round_robin_goes_on_where_the_fleet_changes():
    few, ledger = fleet("P0 P1 P2"), Ledger()
    dispatcher = RoundRobin(few, ledger)
    names = [dispatcher.choose(Role.PREFILL, Work(1), 0.0).id for _ in range(2)]
    few.drain("P2")
    names.append(dispatcher.choose(Role.PREFILL, Work(1), 0.0).id)
    few.resume("P2")
    names += [dispatcher.choose(Role.PREFILL, Work(1), 0.0).id for _ in range(3)]
    assert names == ["P0", "P1", "P0", "P1", "P2", "P0"]


def makespan(images, chosen, backlog):
    total = dict(backlog)
    for tokens, name in zip(images, chosen, strict=True):
        total[name] += tokens
    return max(total.values())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(1, 3))
def test_images_end_within_four_thirds_of_the_optimum(images, encoders):
    empty = {f"E{i}": 0.0 for i in range(encoders)}
    best = min(makespan(images, way, empty) for way in product(empty, repeat=len(images)))
    assert makespan(images, assign_images(images, empty), empty) <= best * 4 / 3 + 1e-9


def test_the_bound_is_met_by_longest_first_alone():
    images, empty = [3, 3, 2, 2, 2], {"E0": 0.0, "E1": 0.0}
    assert makespan(images, assign_images(images, empty), empty) == 7
    in_turn = [f"E{i % 2}" for i in range(5)]
    assert makespan([3, 2, 3, 2, 2], in_turn, empty) == 8


@pytest.mark.parametrize("kind", [LeastBacklog, RoundRobin])
def test_equal_images_go_round_robin(kind):
    few, ledger = fleet("E0 E1 E2"), Ledger()
    dispatcher = kind(few, ledger)
    names = []
    for _ in range(2):
        chosen = dispatcher.spread([576] * 4, 0.0)
        names += [one.id for one in chosen]
        for one in chosen:
            ledger.open(one, Work(encoder_tokens=576), 0.0)
    assert names == ["E0", "E1", "E2", "E0", "E1", "E2", "E0", "E1"]


def test_images_avoid_a_busy_encoder():
    few, ledger = fleet("E0 E1"), Ledger()
    ledger.open(few["E0"], Work(encoder_tokens=2000), 0.0)
    chosen = LeastBacklog(few, ledger).spread([576, 576, 100], 0.0)
    assert [one.id for one in chosen] == ["E1", "E1", "E1"]


def test_encoders_over_their_limit_get_no_images():
    few = fleet("E0 E1", capacity=Capacity(max_encoder_tokens=1000))
    ledger = Ledger()
    ledger.open(few["E0"], Work(encoder_tokens=900), 0.0)
    dispatcher = LeastBacklog(few, ledger)
    assert {one.id for one in dispatcher.spread([500, 500], 0.0)} == {"E1"}
    ledger.open(few["E1"], Work(encoder_tokens=900), 0.0)
    assert dispatcher.spread([500], 0.0) is None
    assert dispatcher.spread([], 0.0) == []
