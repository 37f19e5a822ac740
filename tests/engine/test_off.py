"""With no plug-in on, the package leaves vLLM as it is and costs next to nothing."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_plugins.metrics import OWN_DIRECTORY

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "off_cost.py"
CLOCKS = ("wall", "cpu")

# Names and identities of everything that vLLM's modules and their classes hold.
INVENTORY = """
import json, sys
import vllm.engine.arg_utils, vllm.entrypoints.llm, vllm.v1.core.sched.async_scheduler
import vllm.v1.engine.core, vllm.v1.engine.async_llm
from vllm_plugins.activation import register

def inventory():
    found, keep = {}, []
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] != "vllm":
            continue
        owners = {name: vars(module)}
        for key, value in list(vars(module).items()):
            if isinstance(value, type) and value.__module__.partition(".")[0] == "vllm":
                owners[f"{value.__module__}.{value.__qualname__}"] = vars(value)
        for owner, attributes in owners.items():
            for key, value in list(attributes.items()):
                found[f"{owner}:{key}"] = id(value)
                keep.append(value)
    return found, keep

(before, kept), modules = inventory(), set(sys.modules)
register()
register()
after, _ = inventory()
changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
print(json.dumps({
    "size": len(before),
    "changed": changed,
    "imported": sorted(set(sys.modules) - modules),
    "environment": sorted(k for k in __import__("os").environ if "PLUGIN" in k.upper()),
}))
"""

LOAD = """
import importlib.metadata, json, pydantic, sys, time
(point,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="vllm_plugins")
start = time.perf_counter()
point.load()()
seconds = time.perf_counter() - start
heavy = {"torch", "vllm", "numpy", "scipy", "rich", "matplotlib", "prometheus_client"}
plugins = {name for name in sys.modules if name.startswith("vllm_plugins.schedulers")}
print(json.dumps([seconds, sorted(heavy & sys.modules.keys()), sorted(plugins)]))
"""

# Greedy outputs and the tokens of every step, over a workload that chunks, shares and preempts.
STEPS = """
import json, sys
import tests.conftest
from tests.models import make_engine, scheduler_of
from vllm import SamplingParams

with make_engine(sys.argv[1], max_num_batched_tokens=96, max_num_seqs=6,
                 num_gpu_blocks_override=14, block_size=32, max_model_len=320) as llm:
    scheduler = scheduler_of(llm)
    name = f"{type(scheduler).__module__}.{type(scheduler).__qualname__}"
    stock, steps = scheduler.schedule, []
    def schedule(*args, **kwargs):
        output = stock(*args, **kwargs)
        steps.append(sorted((i.split("-")[0], n) for i, n in output.num_scheduled_tokens.items()))
        return output
    scheduler.schedule = schedule
    prompts = [[(7 * i + j) % 500 for j in range(n)] for i, n in enumerate((1, 40, 150, 260, 16))]
    prompts += [prompts[3][:200] + [5, 6], prompts[2]]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    results = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
print(json.dumps([name, [list(r.outputs[0].token_ids) for r in results], steps]))
"""


def run(script: str, *arguments: str, **environment: str) -> object:
    command = [sys.executable, "-c", script, *arguments]
    env = {k: v for k, v in os.environ.items() if k != OWN_DIRECTORY} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.engine
def test_loading_the_entry_point_changes_three_methods_of_the_engine_arguments_alone():
    found = run(INVENTORY, VLLM_PLUGINS="")
    assert found["size"] > 10_000
    hooked = "vllm.engine.arg_utils.EngineArgs"
    assert found["changed"] == [
        f"{hooked}:_vllm_plugins_flag",
        f"{hooked}:add_cli_args",
        f"{hooked}:create_engine_config",
        f"{hooked}:from_cli_args",
    ]
    assert found["imported"] == []
    assert found["environment"] == ["VLLM_PLUGINS"]


def test_loading_the_entry_point_is_quick_and_light():
    """Against a process that has pydantic already, as every vLLM process has."""
    measured = [run(LOAD) for _ in range(3)]
    assert min(seconds for seconds, _, _ in measured) <= 0.3
    assert all((heavy, plugins) == ([], []) for _, heavy, plugins in measured)


@pytest.mark.engine
def test_outputs_and_step_schedules_are_stocks(tiny_llama):
    installed = run(STEPS, str(tiny_llama))
    without = run(STEPS, str(tiny_llama), VLLM_PLUGINS="")
    name, outputs, steps = installed
    assert name == "vllm.v1.core.sched.scheduler.Scheduler"
    assert [len(tokens) for tokens in outputs] == [40] * 7
    # Chunked (no step is above the budget), and resumed after preemption: more rows than a run
    # without one would take.
    rows = [sum(tokens for _, tokens in step) for step in steps]
    assert max(rows) == 96
    assert installed == without


@pytest.mark.engine
def test_the_benchmark_compares_with_and_without(tiny_llama, tmp_path):
    """One pair shows no cost to be trusted; that the right things are compared it does show."""
    out = tmp_path / "off.json"
    command = [sys.executable, str(BENCHMARK), "--rounds", "1", "--repeats", "1"]
    subprocess.run([*command, "--model", str(tiny_llama), "--out", str(out)], check=True)
    summary = json.loads(out.read_text())["summary"]
    names = ("entry_points", "start", "generate")
    assert summary.keys() == {f"{name}_{clock}" for name in names for clock in CLOCKS}
    assert summary["entry_points_wall"]["installed"]["added_s"]["median"] <= 0.5
    assert all(0.3 < summary[f"generate_{c}"]["installed"]["ratio"]["median"] < 3 for c in CLOCKS)


def test_the_benchmark_compares_batch_by_batch_and_round_by_round():
    summarise = runpy.run_path(str(BENCHMARK))["summarise"]
    rounds = [
        {
            "without": {"x": [1.0 * slow, 2.0 * slow, 4.0 * slow]},
            "control": {"x": [1.0 * slow, 2.0 * slow, 4.0 * slow]},
            "installed": {"x": [1.1 * slow, 2.2 * slow, 8.0 * slow]},
        }
        for slow in (1, 10, 3)
    ]
    row = summarise(rounds)["x"]
    assert row["without_s"] == 6.0
    assert row["control"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert row["installed"]["ratio"] == pytest.approx({"median": 1.1, "low": 1.1, "high": 1.1})
    assert row["installed"]["added_s"]["median"] == pytest.approx(0.6)
