"""The monitor's rule against a table, its pauses, and the life of a change of role."""

from __future__ import annotations

import pytest
from routing_fleets import fleet

from vllm_plugins.errors import PluginError
from vllm_plugins.routing import Ledger, Move, Phase, Role, RoleMonitor, RoleSwitch, State, Work
from vllm_plugins.routing.roles import needed_move, predicted_gain

E, P, D = Role.ENCODE, Role.PREFILL, Role.DECODE


@pytest.mark.parametrize(
    ("loads", "counts", "move"),
    [
        # The longest queue gets an instance of the stage with most to spare.
        ((10, 1, 1), (2, 3, 4), (D, E)),
        ((1, 10, 1), (5, 1, 4), (E, P)),
        ((1, 1, 10), (2, 3, 1), (P, D)),
        # A queue of exactly half the longest is busy; all of them are, so nothing moves.
        ((10, 5, 5), (2, 2, 2), None),
        ((10, 4.9, 5), (2, 2, 3), (D, E)),
        ((10, 4.9, 10), (2, 2, 3), (P, E)),
        # Nobody waits.
        ((0, 0, 0), (2, 2, 2), None),
        # Equal longest queues: neither gives to the other.
        ((8, 8, 0), (3, 3, 1), None),
        ((8, 8, 0), (3, 3, 2), (D, E)),
        # One engine left everywhere else.
        ((1, 10, 1), (1, 4, 1), None),
        ((1, 10, 2), (1, 4, 2), (D, P)),
        # Equal spare engines: the first stage gives.
        ((1, 1, 10), (3, 3, 1), (E, D)),
    ],
)
def test_the_rule(loads, counts, move):
    stages = (E, P, D)
    found = needed_move(
        dict(zip(stages, loads, strict=True)), dict(zip(stages, counts, strict=True))
    )
    assert found == move


def test_the_rule_leaves_as_many_as_must_stay():
    loads, counts = {P: 0.0, D: 9.0}, {P: 3, D: 2}
    assert needed_move(loads, counts, min_per_stage=2) == (P, D)
    assert needed_move(loads, counts, min_per_stage=3) is None


@pytest.mark.parametrize(
    ("loads", "counts", "gain"),
    [
        ({P: 12, D: 0}, {P: 2, D: 3}, 1 - 4 / 6),
        ({P: 12, D: 8}, {P: 2, D: 2}, 1 - 8 / 6),
        ({P: 0, D: 0}, {P: 2, D: 2}, 0.0),
        ({P: 12, D: 0}, {P: 0, D: 2}, 0.0),
    ],
)
def test_gain_is_the_share_by_which_the_longest_queue_per_instance_shrinks(loads, counts, gain):
    assert predicted_gain(loads, counts, source=D, target=P) == pytest.approx(gain)


def monitored(names="P0 P1 D0 D1 D2", **options):
    few, ledger = fleet(names, roles="PD"), Ledger()
    return few, ledger, RoleMonitor(few, ledger, **options)


def test_samples_are_averaged_over_the_last_twenty_seconds():
    _, _, monitor = monitored()
    assert monitor.averages() == {} and monitor.decide(0.0) is None
    for second in range(30):
        monitor.sample({P: float(second), D: 0.0}, float(second))
        monitor.sample({P: 1e6, D: 1e6}, second + 0.5)
    assert monitor.averages() == {P: sum(range(10, 30)) / 20, D: 0.0}


def test_decisions_come_at_intervals_and_moves_after_a_pause():
    few, _, monitor = monitored(interval_s=5.0, cooldown_s=30.0)
    moves = []
    for second in range(80):
        monitor.sample({P: 100.0, D: 0.0}, float(second))
        if (move := monitor.decide(float(second))) is not None:
            moves.append((second, move.instance.id))
            few.drain(move.instance.id)
            few.relabel(move.instance.id, move.target)
    # Two of three decodes go, then the last one stays.
    assert moves == [(0, "D0"), (30, "D1")]


def test_a_move_must_gain_enough():
    loads = {P: 100.0, D: 49.0}
    for min_gain, moves in ((0.1, False), (-1.0, True)):
        _, _, monitor = monitored("P0 P1 P2 P3 D0 D1", min_gain=min_gain)
        monitor.sample(loads, 0.0)
        assert (monitor.decide(0.0) is not None) is moves


def test_the_idlest_instance_that_holds_the_role_moves():
    few, ledger, monitor = monitored()
    few["D1"].roles = frozenset({D})
    ledger.open(few["D0"], Work(10, 10), 0.0)
    monitor.sample({P: 9.0, D: 0.0}, 0.0)
    assert monitor.decide(0.0) == Move(few["D2"], D, P)


def test_an_instance_without_the_role_does_not_move():
    few, ledger = fleet("P0 D0 D1"), Ledger()
    monitor = RoleMonitor(few, ledger)
    monitor.sample({P: 9.0, D: 0.0}, 0.0)
    assert monitor.decide(0.0) is None


def switched():
    few, ledger = fleet("P0 D0 D1", roles="PD"), Ledger()
    ticket = ledger.open(few["D0"], Work(10, 10), 0.0)
    switch = RoleSwitch(Move(few["D0"], D, P), few, ledger, 0.0, drain_s=30.0)
    return few, ledger, ticket, switch


def test_a_soft_switch_waits_for_the_last_request():
    few, _, ticket, switch = switched()
    assert switch.step(1.0) is Phase.DRAINING
    assert [one.id for one in few.serving(D)] == ["D1"]
    ticket.close()
    assert switch.step(2.0) is Phase.ACTIVE
    assert [one.id for one in few.serving(P)] == ["P0", "D0"]
    assert switch.step(3.0) is Phase.ACTIVE


def test_after_the_deadline_a_soft_switch_takes_its_requests_along():
    few, ledger, ticket, switch = switched()
    assert switch.step(30.0) is Phase.ACTIVE
    assert few["D0"].active is P and not ticket.closed
    assert ledger.load(few["D0"]).kv_blocks == 2 and ledger.backlog(few["D0"], 30.0) == 0


def test_a_switch_outlives_a_failure_but_not_a_removal():
    few, ledger, _, switch = switched()
    few.fail("D0")
    ledger.forget(few["D0"])
    assert switch.step(1.0) is Phase.DRAINING
    few["D0"].state = State.DRAINING
    assert switch.step(2.0) is Phase.ACTIVE
    few, _, _, switch = switched()
    few.remove("D0")
    assert switch.step(1.0) is Phase.ABANDONED


def test_the_last_instance_does_not_switch():
    few, ledger = fleet("P0 D0", roles="PD"), Ledger()
    with pytest.raises(PluginError, match="only 0 of role decode would be left"):
        RoleSwitch(Move(few["D0"], D, P), few, ledger, 0.0)
