"""The fleet's rules, health, and the waiting room."""

from __future__ import annotations

from itertools import pairwise

import pytest
from routing_fleets import fleet

from vllm_plugins.errors import PluginError
from vllm_plugins.routing import Health, Instance, QueueFull, Role, State, WaitingRoom


def names(instances):
    return [one.id for one in instances]


def test_only_instances_that_are_up_get_new_work():
    few = fleet("P0 P1 P2 P3 D0")
    few.drain("P0")
    few.fail("P1")
    few.remove("P2")
    assert names(few.serving(Role.PREFILL)) == ["P3"]
    assert few.counts() == {Role.ENCODE: 0, Role.PREFILL: 1, Role.DECODE: 1}
    few.resume("P0")
    assert names(few.serving(Role.PREFILL)) == ["P0", "P3"]


@pytest.mark.parametrize("order", ["drain", "remove"])
def test_no_order_leaves_a_stage_with_too_few(order):
    few = fleet("P0 P1 P2 D0", least=2)
    getattr(few, order)("P0")
    with pytest.raises(PluginError, match="only 1 of role prefill would be left, 2 must"):
        getattr(few, order)("P1")
    assert few["P1"].state is State.UP


def test_a_failure_is_not_asked_and_a_dead_instance_can_be_removed():
    few = fleet("P0 P1")
    few.fail("P0")
    few.fail("P1")
    assert few.remove("P0").state is State.REMOVED
    assert "P0" not in few and len(few) == 1


def test_unknown_twice_and_wrong_role_are_refused():
    few = fleet("P0 P1")
    with pytest.raises(PluginError, match="name one of: P0, P1"):
        few.drain("P7")
    with pytest.raises(PluginError, match="P0 at http://P0 is in the fleet already"):
        few.add(Instance("P9", "http://P0", Role.PREFILL))
    few.drain("P0")
    with pytest.raises(PluginError, match="cannot serve decode, it was started for prefill"):
        few.relabel("P0", Role.DECODE)
    few.fail("P0")
    with pytest.raises(PluginError, match="is down and cannot be drained"):
        few.drain("P0")


def test_relabelling_needs_a_drain():
    few = fleet("P0 P1 D0", roles="PD")
    with pytest.raises(PluginError, match="is up, not draining"):
        few.relabel("P0", Role.DECODE)
    few.drain("P0")
    few.relabel("P0", Role.DECODE)
    assert names(few.serving(Role.DECODE)) == ["P0", "D0"]


def test_health_takes_out_after_failures_in_a_row_and_back_after_one_success():
    few = fleet("P0 P1")
    health = Health(few, fail_threshold=3)
    one = few["P0"]
    assert [health.failed(one, 0.0) for _ in range(2)] == [False, False]
    assert not health.succeeded(one)
    assert [health.failed(one, 0.0) for _ in range(4)] == [False, False, True, False]
    assert one.state is State.DOWN
    assert health.succeeded(one) and one.state is State.UP
    assert not health.failed(one, 1.0)


def test_probes_of_a_dead_instance_become_rarer_up_to_a_limit():
    few = fleet("P0")
    health = Health(few, fail_threshold=1, probe_s=1.0, longest_probe_s=8.0)
    probed = []
    for tick in range(400):
        now = tick / 10
        if health.due(now):
            probed.append(now)
            health.failed(few["P0"], now)
    gaps = [round(later - earlier, 6) for earlier, later in pairwise(probed)]
    assert gaps == [1, 2, 4, 8, 8, 8, 8]
    health.succeeded(few["P0"])
    at = probed[-1] + 8
    assert health.due(at) and not health.due(at + 0.5) and health.due(at + 1.0)


def test_health_survives_years_of_failures_and_forgets_removed_instances():
    few = fleet("P0 P1")
    health, one = Health(few), few["P0"]
    for _ in range(5000):
        health.failed(one, 0.0)
    few.remove("P0")
    assert not health.failed(one, 0.0) and not health.succeeded(one)
    assert names(health.due(1e9)) == ["P1"]


def test_a_draining_instance_that_fails_comes_back_draining():
    few = fleet("P0 P1")
    health, one = Health(few, fail_threshold=1), few.drain("P0")
    health.failed(one, 0.0)
    assert one.state is State.DOWN
    health.succeeded(one)
    assert one.state is State.DRAINING


def test_waiting_is_first_come_first_served():
    room = WaitingRoom(10)
    first, second, third = object(), object(), object()
    for item in (first, second, third):
        room.enter(item, 0.0)
    assert room.head() is first
    assert room.leave(second) and not room.leave(second)
    assert list(room) == [first, third]
    room.admit(third, 1.0)
    room.admit(first, 1.0)
    assert room.head() is None and len(room) == 0


def test_a_full_room_refuses_with_the_time_the_queue_takes():
    room = WaitingRoom(20)
    for item in range(20):
        room.enter(item, 0.0)
    with pytest.raises(QueueFull) as unknown:
        room.enter("x", 0.0)
    assert unknown.value.retry_after_s == 60.0
    for second in range(10):
        room.admit(room.head(), second / 2)
        room.enter(object(), second / 2)
    # Ten left in five seconds, and twenty wait.
    with pytest.raises(QueueFull, match="in 10 s") as refused:
        room.enter("x", 5.0)
    assert refused.value.retry_after_s == pytest.approx(10.0)
    assert room.retry_after(15.0) == pytest.approx(30.0)
    assert room.retry_after(1e6) == 60.0


def test_a_room_of_no_places_refuses_all():
    room = WaitingRoom(0)
    with pytest.raises(QueueFull):
        room.enter("x", 0.0)
    assert room.retry_after(0.0) == 1.0
