"""What the installed package costs vLLM while no plug-in is on.

    python benchmarks/off_cost.py [--rounds 12] [--repeats 40] [--model FOLDER] [--out FILE]

Every round starts three fresh processes, one after another, each with an engine of its own on the
same tiny model: `installed` (vLLM loads the package's entry point, no plug-in is named), `without`
(VLLM_PLUGINS leaves the entry point out) and `control` (again without). The order turns round every
time. Ratios are taken round by round; the report shows their median with a 95 % bootstrap interval.
Control against without is the same thing twice: what it shows is the machine.

A process measures, in wall time and in its own CPU time: `entry_points`, the time that vLLM needs
to load all entry points, once; `start`, from before vLLM is imported until the engine is ready,
once; and `generate`, a fixed mixed batch (long and short prompts, some with a common prefix, short
and long answers, greedy and sampled), of which it keeps the median over the repeats. A tiny model
makes vLLM's own Python code the larger part of a step, which is where a cost would show.

`without` does not undo an editable installation's import hook, which every process of the
environment then has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENTRY_POINT = "vllm_plugins"
VARIANTS = {"installed": True, "without": False, "control": False}
CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
WARM_UP = 5
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # One process does everything, so that its CPU clock sees everything.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
Sample = Mapping[str, float]


class Stopwatch:
    """Seconds since it was made, on each clock."""

    def __init__(self) -> None:
        self._start = {name: clock() for name, clock in CLOCKS.items()}

    def read(self) -> dict[str, float]:
        """Return the seconds by clock."""
        return {name: clock() - self._start[name] for name, clock in CLOCKS.items()}


def measure_here(model: str, repeats: int) -> dict[str, Any]:
    """Measure this process, which must not have imported vLLM yet.

    Returns:
        Seconds by figure and clock, such as `generate_cpu`, and whether the package is there.
    """
    whole = Stopwatch()
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    loading = Stopwatch()
    load_general_plugins()
    entry_points = loading.read()
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        distributed_executor_backend="uni",
        max_model_len=1024,
        max_num_batched_tokens=256,
        max_num_seqs=16,
        disable_log_stats=True,
    )
    figures = {"entry_points": entry_points, "start": whole.read()}
    figures["generate"] = _generate(llm, SamplingParams, repeats)
    named = {f"{n}_{clock}": s for n, both in figures.items() for clock, s in both.items()}
    return {**named, "loaded": hasattr(EngineArgs, f"_{ENTRY_POINT}_flag")}


def _generate(llm: Any, sampling_params: Any, repeats: int) -> dict[str, float]:
    prompts, params = [], []
    for i, length in enumerate((1, 300, 40, 700, 16, 120, 300, 5, 64, 240, 2, 90)):
        shared = i % 3 == 0
        ids = [(j if shared else 3 * i + j) % 500 for j in range(length)]
        prompts.append({"prompt_token_ids": ids})
        temperature = 0.8 if i % 4 == 1 else 0.0
        tokens = (8, 48, 24)[i % 3]
        params.append(sampling_params(temperature=temperature, max_tokens=tokens, ignore_eos=True))
    spent = []
    for i in range(WARM_UP + repeats):
        llm.reset_prefix_cache()
        watch = Stopwatch()
        llm.generate(prompts, params, use_tqdm=False)
        if i >= WARM_UP:
            spent.append(watch.read())
    return {clock: statistics.median(one[clock] for one in spent) for clock in CLOCKS}


def measure(variant: str, model: Path, repeats: int) -> Sample:
    """Measure a variant in a fresh process.

    Raises:
        RuntimeError: The process failed, or did not load what the variant says.
    """
    command = [sys.executable, __file__, "--child", str(model), "--repeats", str(repeats)]
    installed = VARIANTS[variant]
    env = {**os.environ, **ENVIRONMENT, "VLLM_PLUGINS": ",".join(_entry_points(installed))}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{variant}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    sample: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if sample.pop("loaded") != installed:
        raise RuntimeError(f"{variant}: the entry point is {'not ' * installed}loaded")
    return sample


def _entry_points(ours: bool) -> list[str]:
    """Names of what vLLM may load; both sides name it, since that changes what vLLM does."""
    points = [point for one in metadata.distributions() for point in one.entry_points]
    found = {point.name for point in points if point.group.startswith("vllm.")}
    return sorted(found | {ENTRY_POINT} if ours else found - {ENTRY_POINT})


def run(model: Path, rounds: int, repeats: int) -> dict[str, list[Sample]]:
    """Measure every variant once a round, after one process that only warms the caches."""
    measure("installed", model, 1)
    samples: dict[str, list[Sample]] = {name: [] for name in VARIANTS}
    for i in range(rounds):
        for name in reversed(VARIANTS) if i % 2 else VARIANTS:
            samples[name].append(measure(name, model, repeats))
        print(f"round {i + 1} of {rounds}", file=sys.stderr, flush=True)
    return samples


def summarise(samples: Mapping[str, Sequence[Sample]]) -> dict[str, dict[str, Any]]:
    """Compare round by round: ratios to `without` and seconds more than it, by figure."""
    from vllm_plugins.bench.compare import bootstrap_median

    summary: dict[str, dict[str, Any]] = {}
    for figure in samples["without"][0]:
        base = [sample[figure] for sample in samples["without"]]
        row: dict[str, Any] = {"without_s": statistics.median(base)}
        for name in ("installed", "control"):
            values = [sample[figure] for sample in samples[name]]
            pairs = list(zip(values, base, strict=True))
            row[name] = {
                "ratio": vars(bootstrap_median([a / b for a, b in pairs])),
                "added_s": vars(bootstrap_median([a - b for a, b in pairs])),
            }
        summary[figure] = row
    return summary


def print_table(summary: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the summary: one line per figure and variant."""
    print(f"{'':20}{'without':>10}  {'':10}{'ratio':>8}  95 % interval     {'added':>9}")
    for figure, row in summary.items():
        for name in ("installed", "control"):
            ratio, added = row[name]["ratio"], row[name]["added_s"]["median"]
            print(
                f"{figure:20}{row['without_s']:9.4f}s  {name:10}{ratio['median']:8.4f}  "
                f"{ratio['low']:.4f} .. {ratio['high']:.4f}  {1e3 * added:+7.2f}ms"
            )


def main() -> int:
    """Measure, print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=40, help="batches per process")
    parser.add_argument("--model", type=Path, help="model folder; by default a tiny Llama")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure_here(options.child, options.repeats)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        samples = run(options.model or _tiny(Path(folder)), options.rounds, options.repeats)
    summary = summarise(samples)
    print_table(summary)
    if options.out:
        _write(options.out, summary, samples)
    return 0


def _tiny(folder: Path) -> Path:
    maker = ROOT / "examples" / "models" / "tiny.py"
    subprocess.run([sys.executable, str(maker), str(folder / "tiny")], check=True)
    return folder / "tiny"


def _write(out: Path, summary: Mapping[str, Any], samples: Mapping[str, Any]) -> None:
    from vllm_plugins.bench.machine import describe_machine

    report = {
        "command": " ".join(["python", "benchmarks/off_cost.py", *sys.argv[1:]]),
        "machine": describe_machine(),
        "environment": ENVIRONMENT,
        "summary": summary,
        "samples": samples,
    }
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
