"""Properties of every step, on the real schedulers with a fake executor."""

from collections import deque

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.simulation import (
    Invariants,
    abort_some,
    check_conservation,
    engine,
    mixed_workload,
    request,
)

EXAMPLES = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
SARATHI = (
    "sarathi:token_budget=96,tile=32",
    "sarathi:token_budget=64,min_budget=8,max_prefills_per_step=1",
    "sarathi:tbt_slo_ms=30,tile=16",
    "sarathi:tbt_slo_ms=20,budget_mode=slack",
    "sarathi:token_budget=128,tile=64,order=least_slack,ttft_slo_ms=500",
)


def longest_prompt(blocks):
    """Short prompts in small caches: vLLM admits what fits, and answers then outgrow the cache."""
    return 900 if blocks > 100 else 150


def simulate(plugins, seed, blocks, observer, count=25, aborts=True, **arguments):
    """Run a mixed workload to its end and check that nothing was lost."""
    simulated = engine(*plugins, blocks=blocks, observer=observer, **arguments)
    free = simulated.free_blocks
    requests = mixed_workload(seed, count, longest_prompt(blocks))
    simulated.add(requests)
    if aborts:
        abort_some(simulated, seed, requests)
    simulated.run()
    assert len(simulated.records) == count
    check_conservation(simulated, free)
    return simulated


@EXAMPLES
@given(
    plugin=st.sampled_from(SARATHI),
    seed=st.integers(0, 10_000),
    blocks=st.sampled_from([40, 120, 4096]),
    asynchronous=st.booleans(),
    caching=st.booleans(),
    spf=st.booleans(),
)
def test_sarathi_keeps_decodes_going_within_its_budget(
    plugin, seed, blocks, asynchronous, caching, spf
):
    plugins = (plugin, "spf") if spf and "least_slack" not in plugin else (plugin,)
    tile = int(plugin.split("tile=")[1].split(",")[0]) if "tile=" in plugin else 1
    observer = Invariants(True, "max_prefills" in plugin, tile)
    simulated = simulate(
        plugins,
        seed,
        blocks,
        observer,
        asynchronous=asynchronous,
        enable_prefix_caching=caching,
    )
    assert observer.prefill_steps > 2
    for policy in simulated.scheduler.plugin_policies:
        kept = [value for value in vars(policy).values() if isinstance(value, dict)]
        assert not any(kept)
    assert not simulated.scheduler.plugin_policies[0]._ledger._arrived
    assert not simulated.scheduler.plugin_policies[0]._ledger._last_token
    assert not simulated.scheduler.plugin_steps


@EXAMPLES
@given(
    plugins=st.sampled_from([(), ("sarathi:token_budget=96",), ("sarathi:tbt_slo_ms=30",)]),
    seed=st.integers(0, 10_000),
    blocks=st.sampled_from([40, 120, 4096]),
    asynchronous=st.booleans(),
)
def test_priorities_are_conserved(plugins, seed, blocks, asynchronous):
    observer = Invariants(decode_first=bool(plugins), strict=False)
    simulate(
        plugins, seed, blocks, observer, asynchronous=asynchronous, scheduling_policy="priority"
    )


def test_small_caches_preempt():
    # What the properties say about preemption would be empty if none happened.
    simulated = simulate(
        ("sarathi:token_budget=96",), 1, 40, Invariants(True), count=40, aborts=False
    )
    assert sum(len(record.admissions) - 1 for record in simulated.records.values()) > 4


@EXAMPLES
@given(
    neutral=st.sampled_from(
        [(), ("sarathi:token_budget=256,tile=1",), ("sarathi:token_budget=256,decode_first=false",)]
    ),
    seed=st.integers(0, 10_000),
    blocks=st.sampled_from([40, 120, 4096]),
    asynchronous=st.booleans(),
    caching=st.booleans(),
    priority=st.booleans(),
)
def test_neutral_settings_schedule_as_stock(neutral, seed, blocks, asynchronous, caching, priority):
    # Under priorities stock lets a prompt go before running decodes, which decode_first forbids.
    reorders = bool(neutral) and "decode_first=false" not in neutral[0]
    arguments = {
        "asynchronous": asynchronous,
        "enable_prefix_caching": caching,
        "scheduling_policy": "priority" if priority and not reorders else "fcfs",
        "blocks": blocks,
    }
    ours = engine(*neutral, **arguments)
    stock = engine(stock=True, **arguments)
    assert type(ours.scheduler) is not type(stock.scheduler)
    for simulated in (ours, stock):
        requests = mixed_workload(seed, 25, longest_prompt(blocks))
        simulated.add(requests)
        abort_some(simulated, seed, requests)
        simulated.run()
    assert [s.num_scheduled_tokens for s in ours.steps] == [
        s.num_scheduled_tokens for s in stock.steps
    ]
    assert [r.tokens for r in ours.records.values()] == [r.tokens for r in stock.records.values()]
    assert len(stock.steps) > 30


class Balance:
    """Decodes of each step against those that were in the engine, in a pipeline."""

    def __init__(self):
        self.counts = deque()

    def before(self, simulated):
        self.decodes = {r.request_id for r in simulated.scheduler.running if not r.is_prefill_chunk}

    def after(self, simulated, output):
        self.counts.append(len(self.decodes & output.num_scheduled_tokens.keys()))


@pytest.mark.parametrize("decodes", [1, 2, 7, 8])
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(
    ("asynchronous", "runner"), [(False, "V1"), (True, "V2")], ids=["synchronous", "asynchronous"]
)
def test_pipeline_stages_share_decodes(decodes, stages, asynchronous, runner):
    observer = Balance()
    simulated = engine(
        "sarathi:token_budget=128",
        observer=observer,
        asynchronous=asynchronous,
        stages=stages,
        runner=runner,
    )
    simulated.add(request(f"{i}", 0.0, 8, 60) for i in range(decodes))
    simulated.run()
    middle = list(observer.counts)[6 * stages : -6 * stages]
    assert len(middle) >= 20 * stages
    for i in range(len(middle) - stages + 1):
        window = middle[i : i + stages]
        assert sum(window) == decodes
        assert max(window) - min(window) <= 1
    check_conservation(simulated, simulated.free_blocks)


def test_without_balance_one_stage_takes_every_decode():
    observer = Balance()
    simulated = engine("sarathi:token_budget=128,pp_balance=false", observer=observer, stages=2)
    simulated.add(request(f"{i}", 0.0, 8, 60) for i in range(8))
    simulated.run()
    assert set(observer.counts) == {0, 8}


@settings(EXAMPLES, max_examples=8)
@given(seed=st.integers(0, 10_000), blocks=st.sampled_from([40, 4096]), asynchronous=st.booleans())
def test_pipelines_conserve(seed, blocks, asynchronous):
    simulate(
        ("sarathi:tbt_slo_ms=40", "spf"),
        seed,
        blocks,
        None,
        stages=2,
        asynchronous=asynchronous,
        runner="V2" if asynchronous else "V1",
    )
