"""Moore and Hodgson's rule against all subsets, and the bound on waiting."""

import itertools
import random
from dataclasses import dataclass
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_plugins.schedulers.sarathi.least_slack import (
    Overtaking,
    Waiting,
    least_slack_order,
    moore_hodgson,
)
from vllm_plugins.schedulers.sarathi.plugin import SarathiOptions
from vllm_plugins.schedulers.sarathi.policy import SarathiPolicy

TIMES = st.integers(0, 30)
WAITING = st.lists(st.tuples(TIMES, TIMES, st.integers(1, 12)), max_size=7).map(
    lambda rows: [Waiting(i, float(a), float(d), float(w)) for i, (a, d, w) in enumerate(rows)]
)


def all_in_time(chosen, start):
    """Whether requests are all in time when served by deadline; no other order can do better."""
    finish = start
    for request in sorted(chosen, key=lambda w: w.deadline):
        finish += request.work
        if finish > request.deadline:
            return False
    return True


@settings(max_examples=150, deadline=None, derandomize=True)
@given(WAITING, st.integers(0, 5))
def test_as_many_in_time_as_any_subset(waiting, start):
    in_time, late = moore_hodgson(waiting, start)
    assert sorted(w.index for w in in_time + late) == list(range(len(waiting)))
    assert all_in_time(in_time, start)
    best = max(
        size
        for size in range(len(waiting) + 1)
        for subset in itertools.combinations(waiting, size)
        if all_in_time(subset, start)
    )
    assert len(in_time) == best


@settings(max_examples=150, deadline=None, derandomize=True)
@given(WAITING, st.integers(0, 40), st.integers(1, 40))
def test_order_is_a_permutation_with_the_overdue_in_front(waiting, now, max_wait):
    order = least_slack_order(waiting, now, max_wait)
    assert sorted(order) == list(range(len(waiting)))
    overdue = [now - waiting[i].arrived >= max_wait for i in order]
    assert overdue == sorted(overdue, reverse=True)
    arrivals = [waiting[i].arrived for i in order if now - waiting[i].arrived >= max_wait]
    assert arrivals == sorted(arrivals)


def test_nobody_waits_longer_than_the_bound():
    # Overload: twice the work that can be done, for a long time, and one request nobody wants.
    source = random.Random(3)
    max_wait, now, started = 20.0, 0.0, {}
    requests = {0: Waiting(0, 3.2, 4.2, 9.0)}
    for i in range(1, 400):
        requests[i] = Waiting(i, i / 2, i / 2 + 2.0, source.uniform(0.5, 1.5))
    pending = dict(requests)
    while pending:
        here = [w for w in pending.values() if w.arrived <= now]
        if not here:
            now = min(w.arrived for w in pending.values())
            continue
        positions = [Waiting(i, w.arrived, w.deadline, w.work) for i, w in enumerate(here)]
        chosen = here[least_slack_order(positions, now, max_wait)[0]]
        started[chosen.index] = now
        del pending[chosen.index]
        now += chosen.work
    longest = max(w.work for w in requests.values())
    for index, request in requests.items():
        # What was overdue before it: the earlier arrivals that had not started by then.
        due = request.arrived + max_wait
        ahead = sum(w.work for w in requests.values()
                    if w.arrived < request.arrived and started[w.index] >= due)  # fmt: skip
        assert started[index] <= due + ahead + longest
    assert 3.2 + max_wait <= started[0] <= 3.2 + max_wait + longest


def given_to(overtaking, names, steps, starts=(), lost=True):
    """Return which steps are given to requests, as soon as one of them may have one."""
    given = []
    for step in range(steps):
        if any(overtaking.may(name) for name in names):
            overtaking.let_past(names)
            given.append(step)
        overtaking.scheduled(starts, lost)
    return given


def test_those_who_cannot_start_are_given_ever_fewer_steps():
    """As many as one alone would be, however many they are."""
    overtaking, names = Overtaking(), [f"loads {i}" for i in range(100)]
    assert given_to(overtaking, names, 230) == [0, 2, 5, 10, 19, 36, 69, 134, 199]
    # One who comes is not kept back by them, and is by itself soon as rare.
    assert given_to(overtaking, ["comes", *names], 30) == [0, 2, 5, 10, 19]
    overtaking.forget([*names, "comes", "never seen"])
    assert overtaking.may("comes") and not overtaking._in_vain


def test_no_step_is_in_vain_in_which_one_starts_or_there_was_nothing_to_be_had():
    overtaking = Overtaking()
    assert given_to(overtaking, ["loads", "ready"], 3, starts=["other", "ready"]) == [0, 1, 2]
    assert given_to(overtaking, ["waits for room"], 3, lost=False) == [0, 1, 2]
    assert not overtaking._in_vain


class Planned(SimpleNamespace):
    """What a policy sees and hides of a step with prompts under way."""

    def __init__(self, *under_way):
        super().__init__(prefills=list(under_way), hidden=[], can_admit=lambda request: True)

    def hide(self, request):
        self.hidden.append(request.request_id)


def requests(*names):
    return [Named(name) for name in names]


@dataclass(frozen=True)
class Named:
    request_id: str


def test_prompts_under_way_give_steps_to_who_comes_before_them():
    policy = SarathiPolicy(SarathiOptions(order="least_slack"), None)
    first, under, ready, late, behind = requests("first", "under", "ready", "late", "behind")
    order = [first, under, ready, late, behind]
    plan = Planned(under, late)
    policy._let_past(plan, order)
    assert plan.hidden == ["under", "late"]
    # It is not the first one that has started; nobody before the first to be overtaken has.
    policy._overtaking.scheduled(["ready"], lost=True)
    plan = Planned(under, late)
    policy._let_past(plan, order)
    assert plan.hidden == ["late"]
    policy._overtaking.scheduled(["ready"], lost=True)
    plan = Planned(under, late)
    plan.can_admit = lambda request: False
    policy._let_past(plan, order)
    assert not plan.hidden
    policy._let_past(Planned(), [])
