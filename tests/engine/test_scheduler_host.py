"""The host around ``schedule()``: plans compose, the hidden come back, errors leave no trace."""

import pytest

from tests.engine.simulation import check_conservation, engine, request
from vllm_plugins.engine.policy import SchedulerPolicy
from vllm_plugins.engine.scheduler_host import AsyncSchedulerHost, SchedulerHost


class Planned(SchedulerPolicy):
    """A policy whose plan a test gives as a function, and which remembers what it is told."""

    def __init__(self, plan=lambda plan: None):
        self._plan = plan
        self.arrivals, self.steps, self.forgotten = {}, [], set()

    def added(self, request, arrived):
        self.arrivals[request.request_id] = arrived

    def plan(self, plan):
        self._plan(plan)

    def completed(self, step):
        self.steps.append(step)

    def forget(self, request_ids):
        self.forgotten |= set(request_ids)


def planned(*plans, **arguments):
    """An engine whose host has one policy for each plan."""
    simulated = engine(**arguments)
    simulated.scheduler.plugin_policies = [Planned(plan) for plan in plans]
    return simulated


def running(simulated):
    return [r.request_id for r in simulated.scheduler.running]


def start_decodes(simulated, count):
    simulated.add(request(f"{i}", 0.0, 8, 100) for i in range(count))
    while len(running(simulated)) < count or any(
        r.is_prefill_chunk for r in simulated.scheduler.running
    ):
        simulated.run(max_steps=len(simulated.steps) + 1)


@pytest.mark.parametrize(
    ("asynchronous", "host"), [(False, SchedulerHost), (True, AsyncSchedulerHost)]
)
def test_host_follows_the_engine_s_choice_of_scheduler(asynchronous, host):
    assert type(engine(asynchronous=asynchronous).scheduler) is host


def test_narrowest_budget_wins_whatever_the_order():
    budgets = []
    for sizes in ((32, 96), (96, 32)):
        plans = [lambda plan, size=size: plan.limit_tokens(size) for size in sizes]
        simulated = planned(*plans)
        simulated.add([request("long", 0.0, 500, 4)])
        simulated.run()
        budgets.append([step.rows for step in simulated.steps])
    assert budgets[0] == budgets[1]
    assert max(budgets[0]) == 32


@pytest.mark.parametrize("limits", [(0, 2), (2, 0)])
def test_narrowest_admission_limit_wins(limits):
    simulated = planned(*(lambda plan, n=n: plan.limit_admissions(n) for n in limits))
    simulated.add(request(f"{i}", 0.0, 8, 4) for i in range(4))
    simulated.run(max_steps=1)
    assert running(simulated) == []
    for policy in simulated.scheduler.plugin_policies:
        policy._plan = lambda plan: plan.limit_admissions(1)
    admitted = []
    for _ in range(4):
        simulated.run(max_steps=len(simulated.steps) + 1)
        admitted.append(len(running(simulated)))
    assert admitted[:3] == [1, 2, 3]


def test_hidden_requests_keep_their_place_blocks_and_slot():
    simulated = planned(lambda plan: None, max_num_seqs=4)
    start_decodes(simulated, 3)
    order = running(simulated)
    held = simulated.scheduler.kv_cache_manager.get_block_ids("1")
    simulated.scheduler.plugin_policies[0]._plan = lambda plan: plan.hide(plan.decodes[1])
    simulated.add(request(f"new-{i}", simulated.now, 8, 100) for i in range(3))
    simulated.run(max_steps=len(simulated.steps) + 1)
    # One slot was free: the hidden request's own must not be given away.
    assert running(simulated) == [*order, "new-0"]
    assert set(simulated.steps[-1].num_scheduled_tokens) == {"0", "2", "new-0"}
    assert simulated.scheduler.kv_cache_manager.get_block_ids("1") == held


def test_hidden_requests_survive_preemption_of_the_others():
    free = []

    def hide_first(plan):
        if len(plan.decodes) > 1:
            plan.hide(plan.decodes[0])

    simulated = planned(hide_first, blocks=24, max_model_len=320, max_num_batched_tokens=64)
    free.append(simulated.free_blocks)
    simulated.add(request(f"{i}", 0.0, 40, 120) for i in range(6))
    simulated.run()
    assert any(len(record.admissions) > 1 for record in simulated.records.values())
    check_conservation(simulated, free[0])


def test_every_decode_first_when_one_policy_asks():
    def ask(plan):
        plan.decode_first = True

    simulated = planned(ask, lambda plan: plan.limit_tokens(24))
    start_decodes(simulated, 4)
    host = simulated.scheduler
    simulated.add([request("long", simulated.now, 200, 4)])
    simulated.run(max_steps=len(simulated.steps) + 1)
    host.running.insert(0, host.running.pop())
    assert running(simulated)[0] == "long"
    simulated.run(max_steps=len(simulated.steps) + 1)
    assert list(simulated.steps[-1].num_scheduled_tokens) == ["0", "1", "2", "3", "long"]


class BrokenError(Exception):
    """Raised inside vLLM's own method."""


def test_error_inside_schedule_restores_everything(monkeypatch):
    def narrow(plan):
        plan.limit_tokens(7)
        plan.limit_admissions(0)
        plan.hide(plan.decodes[0])

    simulated = planned(lambda plan: None)
    start_decodes(simulated, 3)
    host = simulated.scheduler
    host.plugin_policies[0]._plan = narrow
    names = ("max_num_scheduled_tokens", *host.plugin_admission_limits)
    before = [getattr(host, name) for name in names], running(simulated)

    def broken():
        assert host.max_num_scheduled_tokens == 7
        assert running(simulated) == ["1", "2"]
        raise BrokenError

    with monkeypatch.context() as patch:
        patch.setattr(host.kv_cache_manager, "new_step_starts", broken)
        with pytest.raises(BrokenError):
            host.schedule()
    assert ([getattr(host, name) for name in names], running(simulated)) == before
    assert not host.plugin_steps
    host.plugin_policies[0]._plan = lambda plan: None
    simulated.run()
    check_conservation(simulated, simulated.free_blocks)


def test_error_of_a_policy_is_not_swallowed():
    simulated = planned(lambda plan: 1 / 0)
    simulated.add([request("0", 0.0, 8, 4)])
    with pytest.raises(ZeroDivisionError):
        simulated.run()


def test_arrival_counts_the_wait_in_the_input_queue():
    # A request that comes during a step is seen after it, and its wait has begun long before.
    simulated = planned(lambda plan: None, step_seconds=lambda work: 1.0)
    simulated.add([request("0", 0.0, 8, 4), request("1", 0.25, 8, 4)])
    simulated.run()
    assert simulated.scheduler.plugin_policies[0].arrivals == {"0": 0.0, "1": 0.25}


@pytest.mark.parametrize(
    ("asynchronous", "stages", "share"), [(False, 1, 1), (True, 1, 1), (False, 2, 2)]
)
def test_steps_are_timed_without_overlap(asynchronous, stages, share):
    # Two steps are in flight, yet each has the engine, or a stage of it, for its own time only.
    simulated = planned(
        lambda plan: plan.limit_tokens(16),
        asynchronous=asynchronous,
        stages=stages,
        step_seconds=lambda work: 0.25,
    )
    simulated.add(request(f"{i}", 0.0, 8, 40) for i in range(4))
    simulated.run()
    durations = [
        step.duration
        for step in simulated.scheduler.plugin_policies[0].steps
        if step.duration is not None and step.plan.decodes
    ]
    assert len(durations) > 30
    steady = sorted(durations)[len(durations) // 2]
    assert steady == pytest.approx(0.25 / share)


def test_policies_hear_of_every_end():
    simulated = planned(lambda plan: None)
    simulated.add([request("done", 0.0, 8, 4), request("left", 0.0, 8, 400)])
    simulated.add([request("never", 0.0, 30000, 4)])
    simulated.abort("left", 0.2)
    simulated.abort("never", 0.05)
    simulated.run()
    policy = simulated.scheduler.plugin_policies[0]
    assert policy.forgotten == {"done", "left", "never"}
    emitted = [i for step in policy.steps for i in step.emitted]
    assert emitted.count("done") == 4
    assert emitted.count("left") == len(simulated.records["left"].tokens) < 400
