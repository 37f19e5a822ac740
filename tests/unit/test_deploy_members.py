"""Which instances the router should have, and the steps there."""

from __future__ import annotations

from vllm_plugins.deploy.members import Members, Seen, Step
from vllm_plugins.routing import Role, State

P, D = Role.PREFILL, Role.DECODE
PATIENCE_S = 10.0


def seen(name: str, state: State = State.UP, role: Role = D) -> Seen:
    return Seen(f"id-{name}", name, role, state)


def members(*names: str, at: float = 0.0) -> Members:
    made = Members(PATIENCE_S)
    for name in names:
        made.announce(name, D, at)
    return made


def test_who_announces_itself_is_added_once() -> None:
    made = members("a", "b")
    assert made.plan([seen("a")], 1) == [Step("add", "b", D)]
    assert made.plan([seen("a"), seen("b")], 1) == []


def test_who_leaves_is_drained_and_who_has_ended_is_removed() -> None:
    made = members("a", "b")
    both = [seen("a"), seen("b")]
    made.leave("a")
    assert made.plan(both, 1) == [Step("drain", "a", D, "id-a")]
    draining = [seen("a", State.DRAINING), seen("b")]
    assert made.plan(draining, 1) == []
    # A last announcement that was on its way does not bring it back.
    made.announce("a", D, 1)
    assert made.plan(draining, 1) == []
    made.remove("a")
    assert made.plan(draining, 2) == [Step("remove", "a", D, "id-a")]
    # Refused, perhaps, as the last of its role: asked again until it is gone.
    assert made.plan(draining, 3) == [Step("remove", "a", D, "id-a")]
    assert made.plan([seen("b")], 4) == []
    made.announce("a", D, 5)
    assert made.plan([seen("b")], 5) == [Step("add", "a", D)]


def test_who_leaves_before_the_router_knows_it_is_not_added() -> None:
    made = members("a")
    made.leave("a")
    made.leave("unknown")
    assert made.plan([], 1) == []


def test_who_is_silent_and_down_is_removed() -> None:
    made = members("a", "b", "c")
    made.announce("b", D, PATIENCE_S)
    now = PATIENCE_S + 1
    down = [seen("a", State.DOWN), seen("b", State.DOWN), seen("c")]
    # b speaks still, and c is silent but serves: Ray's controller may be away.
    assert made.plan(down, now) == [Step("remove", "a", D, "id-a")]


def test_who_is_silent_and_unknown_to_the_router_is_forgotten() -> None:
    made = members("a")
    assert made.plan([], PATIENCE_S + 1) == []


def test_instances_of_others_are_left_alone() -> None:
    assert members().plan([seen("theirs"), seen("down", State.DOWN)], 99) == []


def test_a_router_that_starts_anew_is_told_of_all() -> None:
    made = members("a", "b")
    made.plan([seen("a"), seen("b")], 1)
    assert made.plan([seen("a")], 2) == [Step("add", "b", D)]


def test_the_router_is_started_with_those_that_have_just_spoken() -> None:
    made = members("old", "leaving")
    made.announce("p", P, PATIENCE_S + 1)
    made.announce("leaving", D, PATIENCE_S + 1)
    made.leave("leaving")
    assert made.fresh(PATIENCE_S + 1) == {P: ["p"]}
    made.announce("old", D, PATIENCE_S + 2)
    assert made.fresh(PATIENCE_S + 2) == {P: ["p"], D: ["old"]}
