"""Sarathi-Serve on a machine whose speed is known: targets met, models learnt, no oscillation."""

from itertools import pairwise

import numpy as np
import pytest

from tests.engine.simulation import MACHINE, engine, profile_file, request
from vllm_plugins.engine.cost_model import StepCostModel
from vllm_plugins.schedulers.sarathi import metrics as m
from vllm_plugins.schedulers.sarathi.least_slack import least_slack_order

SLO = 0.05


def slow(factor):
    """The simulated machine, so many times slower than its profile says."""
    return lambda work: factor * MACHINE.seconds(work)


def chat(count, rate, prompts=(20, 3000), answers=40):
    """Chats with short and long prompts, arriving evenly."""
    for i in range(count):
        yield request(f"{i}", i / rate, prompts[i % len(prompts)], answers)


def serve(*plugins, requests, **arguments):
    arguments = {"max_num_seqs": 64, "max_num_batched_tokens": 2048} | arguments
    simulated = engine(*plugins, **arguments)
    simulated.add(requests)
    simulated.run()
    return simulated


def gaps(simulated):
    return np.concatenate([record.gaps for record in simulated.records.values()])


def with_profile(tbt_ms=50, **arguments):
    sizes = {"max_num_seqs": 64, "max_num_batched_tokens": 2048}
    return f"sarathi:tbt_slo_ms={tbt_ms:g},profile={profile_file(**sizes, **arguments)}"


def policy_of(simulated):
    return simulated.scheduler.plugin_policies[0]


@pytest.mark.parametrize("mode", ["model", "slack"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_p99_meets_a_feasible_target(mode, asynchronous):
    requests = list(chat(60, 6.0))
    stock = serve(stock=True, requests=requests, asynchronous=asynchronous)
    plugin = f"{with_profile()},budget_mode={mode}"
    ours = serve(plugin, requests=requests, asynchronous=asynchronous)
    assert np.percentile(gaps(stock), 99) > 2 * SLO
    assert np.percentile(gaps(ours), 99) <= SLO
    assert gaps(ours).max() <= 1.2 * SLO
    # Not by giving prefills up: the whole workload takes about as long.
    assert ours.now < 1.25 * stock.now


def test_p99_meets_the_target_through_a_pipeline():
    requests = list(chat(60, 6.0))
    # A step of one micro-batch occupies one of two stages for half of its time.
    ours = serve("sarathi:tbt_slo_ms=50", requests=requests, stages=2)
    assert np.percentile(gaps(serve(stock=True, requests=requests, stages=2)), 99) > 2 * SLO
    assert np.percentile(gaps(ours), 99) <= 1.1 * SLO


def test_without_a_profile_the_target_is_learnt():
    ours = serve("sarathi:tbt_slo_ms=50", requests=chat(80, 6.0))
    settled = [gap for record in list(ours.records.values())[10:] for gap in record.gaps]
    assert np.percentile(settled, 99) <= SLO
    # Not even the first long prompt may stall the decodes for as long as a whole prompt takes.
    assert gaps(ours).max() <= 3 * SLO


def test_a_night_of_short_chats_does_not_make_the_next_long_prompt_a_stall():
    requests = [request(f"long-{i}", 0.1 * i, 3000, 10) for i in range(3)]
    requests += [request(f"{i}", 1.0 + i * 10, 2, 4000) for i in range(4)]
    requests += [request("late", 60.0, 3000, 10)]
    ours = serve("sarathi:tbt_slo_ms=50", requests=requests)
    late = ours.records["late"]
    during = [
        later - earlier
        for i in range(4)
        for earlier, later in pairwise(ours.records[f"{i}"].token_times)
        if late.request.arrival_s < later and earlier < late.first_token_s
    ]
    assert len(during) > 10
    assert max(during) <= SLO


@pytest.mark.parametrize("factor", [2.0, 0.6])
def test_correction_converges_and_targets_are_met(factor):
    ours = serve(with_profile(), requests=chat(60, 3.0), step_seconds=slow(factor))
    assert policy_of(ours)._estimator.correction == pytest.approx(factor, rel=0.03)
    settled = [gap for record in list(ours.records.values())[10:] for gap in record.gaps]
    assert np.percentile(settled, 99) <= SLO


def test_budgets_are_at_rest_when_the_load_is():
    tile = 32
    # Eight decodes and one endless prompt: nothing changes but the contexts, slowly.
    requests = [request(f"{i}", 0.0, 20, 2000) for i in range(8)]
    requests += [request(f"long-{i}", 1.0, 30000, 2) for i in range(2)]
    ours = serve(
        f"{with_profile()},tile={tile}",
        requests=requests,
        step_seconds=slow(1.3),
        max_num_seqs=9,
        max_num_batched_tokens=2048,
    )
    steps = [s for s in ours.steps if s.rows > s.decodes + 1][40:]
    budgets = [s.budget for s in steps[:120]]
    assert len(budgets) > 60
    changes = [abs(b - a) for a, b in pairwise(budgets)]
    # A budget is a multiple of the tile: at rest it stays, or follows the context by one tile.
    assert max(changes) <= tile
    signs = [np.sign(b - a) for a, b in pairwise(budgets) if a != b]
    assert sum(a != b for a, b in pairwise(signs)) <= 2


def test_a_request_s_own_target_is_honoured():
    strict = request("strict", 0.0, 20, 100, extra_args={"tbt_slo_ms": 25})
    others = [request(f"{i}", 0.5 + i / 4, 2500, 40) for i in range(8)]
    ours = serve(with_profile(200), requests=[strict, *others])
    record = ours.records["strict"]
    assert np.percentile(record.gaps, 99) <= 0.025
    # Once it has left, the others go by the looser default.
    after = [s.budget for s in ours.steps if s.scheduled_s > record.finished_s and s.rows > 64]
    before = [s.budget for s in ours.steps if s.scheduled_s < record.finished_s and s.rows > 64]
    assert np.median(after) > 2 * np.median(before)


def test_a_request_s_own_ttft_target_puts_it_ahead():
    requests = [request(f"{i}", 0.0, 2000, 4) for i in range(10)]
    requests.append(request("urgent", 0.1, 2000, 4, extra_args={"ttft_slo_ms": 900}))
    plugin = f"{with_profile()},ttft_slo_ms=30000"
    ours = serve(plugin, requests=requests)
    plain = serve(with_profile(), requests=requests)
    assert ours.records["urgent"].ttft <= 0.9 < plain.records["urgent"].ttft


def test_least_slack_keeps_more_in_time_than_arrival_order():
    requests = [request(f"{i}", i / 12, (100, 2600)[i % 3 == 0], 4) for i in range(120)]

    def in_time(simulated):
        return sum(record.ttft <= 1.0 for record in simulated.records.values())

    ordered = serve(f"{with_profile()},ttft_slo_ms=1000", requests=requests)
    arrival = serve(f"{with_profile()},ttft_slo_ms=1000,order=fcfs", requests=requests)
    assert in_time(ordered) > 1.5 * in_time(arrival)


def test_nobody_waits_much_longer_than_the_bound():
    requests = [request("unwanted", 0.0, 2600, 4)]
    requests += [request(f"{i}", i / 16, 2000, 4) for i in range(160)]
    plugin = f"{with_profile()},ttft_slo_ms=500,max_wait_ms=3000"
    ours = serve(plugin, requests=requests, max_num_seqs=4)
    # Overdue requests go by arrival, so it waits for the few that came with it.
    assert ours.records["unwanted"].ttft < 5.0


class Counted:
    """Counts what a policy writes to its metrics."""

    def __init__(self):
        self.values = {}

    def inc(self, name, amount=1.0, label=""):
        self.values[name] = self.values.get(name, 0) + amount

    def set(self, name, value, label=""):
        self.values[name] = value

    def observe(self, name, value):
        self.values.setdefault(name, []).append(value)


def counted(*plugins, requests, **arguments):
    simulated = engine(
        *plugins, **({"max_num_seqs": 64, "max_num_batched_tokens": 2048} | arguments)
    )
    metric = policy_of(simulated).metric = Counted()
    simulated.add(requests)
    simulated.run()
    return simulated, metric.values


@pytest.mark.parametrize("value", ["soon", -5, 0, float("nan"), float("inf"), 1e12, [40], True])
def test_malformed_target_is_ignored_and_counted(value):
    bad = request("bad", 0.0, 20, 20, extra_args={"tbt_slo_ms": value})
    simulated, metric = counted(with_profile(), requests=[bad, request("good", 0.0, 20, 20)])
    assert metric[m.INVALID.name] == 1
    assert len(simulated.records["bad"].tokens) == 20


def test_metrics_say_what_happened():
    requests = list(chat(20, 6.0))
    simulated, metric = counted(
        f"{with_profile()},ttft_slo_ms=400,order=fcfs", requests=requests, step_seconds=slow(1.5)
    )
    records = simulated.records.values()
    assert metric[m.TTFT_MISSES.name] == sum(record.ttft > 0.4 for record in records) > 0
    assert metric[m.TBT_MISSES.name] == sum((np.array(r.gaps) > SLO).sum() for r in records) > 0
    assert metric[m.CORRECTION.name] == pytest.approx(1.5, rel=0.05)
    durations = [s.finished_s - s.scheduled_s for s in simulated.steps if s.rows]
    assert metric[m.MEASURED.name] == pytest.approx(durations)
    assert m.STALLED.name not in metric
    assert max(metric[m.BUDGET.name]) <= 2048


def test_infeasible_target_is_counted_and_decodes_still_run():
    machine = StepCostModel((0.06, 1e-4, 0.0, 0.0, 0.0, 0.0))
    sizes = {"max_num_seqs": 16, "max_num_batched_tokens": 256}
    plugin = f"sarathi:tbt_slo_ms=61,profile={profile_file(machine, **sizes)},margin=1.5"
    requests = [request(f"{i}", i / 4, 300, 30) for i in range(6)]
    simulated, metric = counted(plugin, requests=requests, step_seconds=machine.seconds, **sizes)
    assert metric[m.INFEASIBLE.name] > 5
    assert m.STALLED.name not in metric
    assert all(len(record.tokens) == 30 for record in simulated.records.values())


def test_spf_ageing_serves_everybody_under_overload_and_without_it_the_shortest_first():
    # Short prompts for ever, at twice what can be served, and one long prompt.
    requests = [request("long", 1.0, 600, 2)]
    requests += [request(f"{i}", i / 80, 200, 2) for i in range(600)]

    def long_finished_after(gamma):
        simulated = serve(
            f"spf:gamma={gamma}",
            requests=requests,
            max_num_seqs=2,
            max_num_batched_tokens=256,
        )
        finished = sorted(simulated.records.values(), key=lambda record: record.finished_s)
        return [record.request.request_id for record in finished].index("long")

    assert long_finished_after(0) == 600
    # 400 tokens longer at 200 tokens a second: overtaken by what arrives within 2 s, 160 requests.
    assert 100 < long_finished_after(200) < 260


def test_preempted_answers_go_before_prompts_that_wait():
    simulated = engine(f"{with_profile()},ttft_slo_ms=300", max_num_seqs=64,
                       max_num_batched_tokens=2048)  # fmt: skip
    simulated.add([request("read", 0.0, 20, 40), request("next", 0.1, 20, 4)])
    simulated.run(max_steps=20)
    simulated.add([request("waits", simulated.now, 20, 4)])
    simulated.run(max_steps=22)
    read, waits = (simulated.scheduler.requests[name] for name in ("read", "waits"))
    # By the deadline of its first token the older one is hopelessly late, but that token is out.
    waits._output_token_ids.clear()
    dues = policy_of(simulated)._dues([waits, read])
    now = 0.4
    assert dues[1].deadline < now < dues[0].deadline
    assert least_slack_order(dues, now, 60.0) == [1, 0]
