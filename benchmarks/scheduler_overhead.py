"""CPU time that plug-ins add to vLLM's own scheduling, per engine step.

    python benchmarks/scheduler_overhead.py [--decodes 16 64 256] [--steps 400] [--out FILE]

Engines without a model (stock, the host with no plug-in, the host with Sarathi-Serve and SPF) take
the same step in turn, in random order, so that a slow moment of the machine, and caches full of
the engine before, fall on all of them alike. What is timed is ``schedule()`` plus
``update_from_output()``, on the thread's own CPU clock; what is reported is the median over steps
of the ratio to stock.

Two loads: ``decode`` (nothing but running decodes) and ``mixed`` (a long prompt is prefilled beside
them and others wait, which is when Sarathi-Serve searches a budget in every step).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Steps before the first one that counts: metrics files, online fit and caches exist by then.
WARM_UP = 60
CHUNK = 256


@dataclass(frozen=True)
class Variant:
    """An engine to measure: its plug-ins, and whether it uses vLLM's own scheduler class."""

    name: str
    plugins: tuple[str, ...] = ()
    stock: bool = False


VARIANTS = (
    Variant("stock", stock=True),
    Variant("empty host"),
    Variant("sarathi static + spf", ("sarathi", "spf")),
    Variant("sarathi model + spf", ("sarathi:tbt_slo_ms=50,profile={profile}", "spf")),
    Variant("sarathi online fit + spf", ("sarathi:tbt_slo_ms=50", "spf")),
)


class TimedEngine:
    """A simulated engine whose scheduler calls are timed."""

    def __init__(self, variant: Variant, make: Callable[[Variant], Any]) -> None:
        self.variant = variant
        self.engine = make(variant)
        self.spent_ns = 0
        for name in ("schedule", "update_from_output"):
            setattr(self.engine.scheduler, name, self._timed(getattr(self.engine.scheduler, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.thread_time_ns()
            result = method(*args)
            self.spent_ns += time.thread_time_ns() - start
            return result

        return timed

    def step(self) -> int:
        """Take one step and return the nanoseconds that scheduling it took."""
        self.spent_ns = 0
        self.engine.step()
        return self.spent_ns


def measure(engines: Sequence[TimedEngine], steps: int) -> dict[str, list[int]]:
    """Take steps in turn; nanoseconds per step of each engine, shape (steps,)."""
    times: dict[str, list[int]] = {engine.variant.name: [] for engine in engines}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for i in range(WARM_UP + steps):
            for engine in order.sample(engines, len(engines)):
                spent = engine.step()
                if i >= WARM_UP:
                    times[engine.variant.name].append(spent)
    finally:
        gc.enable()
    return times


def summarise(times: dict[str, list[int]]) -> dict[str, dict[str, float]]:
    """Median step time in microseconds and overhead over stock as a share, with quartiles."""
    result = {}
    for name, spent in times.items():
        ratios = [one / stock for one, stock in zip(spent, times["stock"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[name] = {
            "median_us": statistics.median(spent) / 1e3,
            "overhead": middle - 1,
            "overhead_q1": low - 1,
            "overhead_q3": high - 1,
        }
    return result


def workload(decodes: int, load: str, steps: int) -> Iterator[Any]:
    """Yield requests: decodes that outlast the measurement and, if mixed, long prompts."""
    from vllm_plugins.simulator.records import SimulatedRequest

    tokens = steps + WARM_UP + 1000
    for i in range(decodes):
        yield SimulatedRequest(f"decode-{i}", 0.0, (1 + i,) * 64, tokens)
    if load == "mixed":
        chunks = tokens * CHUNK
        for i in range(-(-chunks // 30000) + 16):
            yield SimulatedRequest(f"long-{i}", 0.0, (1 + i,) * 30000, 2)


def make_engine(
    folder: Path, decodes: int, load: str, steps: int, asynchronous: bool
) -> Callable[[Variant], Any]:
    """Return a function that makes a variant's engine with all decodes past their prompts."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_plugins.engine.scheduler_host import create_scheduler
    from vllm_plugins.simulator.config import make_config, write_model_config
    from vllm_plugins.simulator.engine import VirtualEngine

    stock = AsyncScheduler if asynchronous else Scheduler
    arguments = {
        "max_num_seqs": decodes + 1,
        "max_num_batched_tokens": decodes + CHUNK,
        "max_model_len": 32768,
        "enable_prefix_caching": True,
    }

    write_model_config(folder)
    write_profile(make_config(folder, **arguments), folder / "profile.json")

    def make(variant: Variant) -> VirtualEngine:
        plugins = [spec.format(profile=folder / "profile.json") for spec in variant.plugins]
        config = make_config(folder, *plugins, asynchronous=asynchronous, **arguments)
        engine = VirtualEngine(
            config,
            stock if variant.stock else create_scheduler,
            cost_model().seconds,
            blocks=200_000,
        )
        engine.add(workload(decodes, load, steps))
        while sum(len(r.token_times) > 1 for r in engine.records.values()) < decodes:
            engine.run(max_steps=len(engine.steps) + 1)
        return engine

    return make


def cost_model() -> Any:
    """Return a cost model under which every step of this benchmark meets 50 ms."""
    from vllm_plugins.engine.cost_model import StepCostModel

    return StepCostModel((2e-3, 2e-5, 1e-5, 1e-6, 1e-9, 1e-9), knee=128)


def write_profile(config: Any, path: Path) -> None:
    """Write a cost profile that is valid for a configuration."""
    from vllm_plugins.engine.cost_profile import CostProfile, profile_key

    model = cost_model()
    profile = CostProfile(
        key=profile_key(config), coefficients=model.coefficients, knee=model.knee, tile=model.tile
    )
    path.write_text(profile.model_dump_json())


def run(decodes: int, load: str, steps: int, asynchronous: bool) -> dict[str, dict[str, float]]:
    """Measure every variant under one load."""
    with tempfile.TemporaryDirectory() as folder:
        make = make_engine(Path(folder), decodes, load, steps, asynchronous)
        return summarise(measure([TimedEngine(v, make) for v in VARIANTS], steps))


def print_table(title: str, result: dict[str, dict[str, float]]) -> None:
    """Print one load's result."""
    print(f"\n{title}\n  {'':26} {'us/step':>8} {'over stock':>11}  quartiles")
    for name, row in result.items():
        print(
            f"  {name:26} {row['median_us']:8.0f} {row['overhead']:+10.1%}  "
            f"{row['overhead_q1']:+.1%} .. {row['overhead_q3']:+.1%}"
        )


def main() -> int:
    """Measure, print tables and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--decodes", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_plugins.bench.machine import describe_machine

    results = []
    for asynchronous in (False, True):
        for decodes in options.decodes:
            for load in ("decode", "mixed"):
                result = run(decodes, load, options.steps, asynchronous)
                kind = "asynchronous" if asynchronous else "synchronous"
                print_table(f"{decodes} decodes, {load}, {kind} scheduler", result)
                results.append(
                    {"decodes": decodes, "load": load, "scheduler": kind, "variants": result}
                )
    if options.out:
        command = " ".join(["python", "benchmarks/scheduler_overhead.py", *sys.argv[1:]])
        report = {"command": command, "machine": describe_machine(), "results": results}
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
