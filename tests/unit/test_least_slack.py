"""Moore and Hodgson's rule against all subsets, and the bound on waiting."""

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_plugins.schedulers.sarathi.least_slack import (
    Overtaking,
    Waiting,
    least_slack_order,
    moore_hodgson,
)

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


def given_to(overtaking, name, steps, used=False):
    """Return which steps are given to a request whenever it may have one."""
    given = []
    for step in range(steps):
        if overtaking.may(name):
            overtaking.let_past(name)
            given.append(step)
        overtaking.scheduled(used)
    return given


def test_one_that_cannot_start_is_given_ever_fewer_steps():
    overtaking = Overtaking()
    assert given_to(overtaking, "loads", 230) == [0, 2, 5, 10, 19, 36, 69, 134, 199]
    # Nobody else is kept back by it, nor it itself once it could start.
    assert given_to(overtaking, "ready", 3, used=True) == [0, 1, 2]
    given_to(overtaking, "loads", 70, used=True)
    assert overtaking.may("loads")
    assert given_to(overtaking, "loads", 6)[:2] == [0, 2]
    overtaking.forget(["loads", "never seen"])
    assert overtaking.may("loads") and not overtaking._in_vain
