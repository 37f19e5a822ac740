"""What the installed package costs vLLM while no plug-in is on.

    python benchmarks/off_cost.py [--rounds 12] [--repeats 60] [--model FOLDER] [--out FILE]

Every round starts three fresh processes, one after another, each with an engine of its own on the
same tiny model: `installed` (vLLM loads the package's entry point, no plug-in is named), `without`
(VLLM_PLUGINS leaves the entry point out) and `control` (again without). Then they run the same
batch in turn, in random order, so that a slow moment of the machine falls on all of them alike.
Batches are compared one by one; a round gives their median ratio, and the report the median over
the rounds with a 95 % bootstrap interval. Control against without is the same thing twice: what it
shows is the machine.

A process measures, in wall time and in its own CPU time: `entry_points`, the time that vLLM needs
to load all entry points, once; `start`, from before vLLM is imported until the engine is ready,
once; and `generate`, the batch (long and short prompts, some with a common prefix, short and long
answers, greedy and sampled). A tiny model makes vLLM's own Python code the larger part of a step,
which is where a cost would show.

`without` does not undo an editable installation's import hook, which every process of the
environment then has.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
Sample = Mapping[str, Sequence[float]]
"""Seconds by figure and clock, such as `generate_cpu`: one value, or one per batch."""


class Stopwatch:
    """Seconds since it was made, on each clock."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._start = {clock: read() for clock, read in CLOCKS.items()}

    def read(self) -> dict[str, float]:
        """Return the seconds by figure and clock."""
        return {
            f"{self._name}_{clock}": read() - self._start[clock] for clock, read in CLOCKS.items()
        }


def child(model: str) -> None:
    """Start an engine and run a batch for every line of standard input.

    Writes one line of JSON when the engine is ready and one after each batch. VLLM must not have
    been imported yet.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(values: Mapping[str, Any]) -> None:
        print(json.dumps(values), file=answers, flush=True)

    whole = Stopwatch("start")
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    loading = Stopwatch("entry_points")
    load_general_plugins()
    loaded = loading.read()
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
    answer({**loaded, **whole.read(), "loaded": hasattr(EngineArgs, f"_{ENTRY_POINT}_flag")})
    batch = _batch(SamplingParams)
    for _ in sys.stdin:
        llm.reset_prefix_cache()
        watch = Stopwatch("generate")
        llm.generate(*batch, use_tqdm=False)
        answer(watch.read())


def _batch(sampling_params: Any) -> tuple[list[Any], list[Any]]:
    prompts, params = [], []
    for i, length in enumerate((1, 300, 40, 700, 16, 120, 300, 5, 64, 240, 2, 90)):
        shared = i % 3 == 0
        ids = [(j if shared else 3 * i + j) % 500 for j in range(length)]
        prompts.append({"prompt_token_ids": ids})
        temperature = 0.8 if i % 4 == 1 else 0.0
        tokens = (8, 48, 24)[i % 3]
        params.append(sampling_params(temperature=temperature, max_tokens=tokens, ignore_eos=True))
    return prompts, params


class Child:
    """A process that measures itself; `start` is what it said when its engine was ready.

    Raises:
        RuntimeError: It ended, or did not load what the variant says.
    """

    def __init__(self, variant: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self._variant, self._process, self._log = variant, process, log
        self.start = self._answer()
        if self.start.pop("loaded") != VARIANTS[variant]:
            raise RuntimeError(f"{variant}: VLLM_PLUGINS did not do what it should")

    def run_batch(self) -> dict[str, float]:
        """Let it run one batch."""
        assert self._process.stdin
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._variant} ended:\n{self._log.read_text()[-3000:]}")
        answer: dict[str, float] = json.loads(line)
        return answer


@contextmanager
def started(variant: str, model: Path) -> Iterator[Child]:
    """Start a variant's process and end it on the way out."""
    from vllm_plugins.bench.process import logged_process

    command = [sys.executable, __file__, "--child", str(model)]
    names = ",".join(_entry_points(VARIANTS[variant]))
    log = model.parent / f"{variant}.log"
    with logged_process(
        command, log, {**ENVIRONMENT, "VLLM_PLUGINS": names}, talks=True
    ) as process:
        yield Child(variant, process, log)


def _entry_points(ours: bool) -> list[str]:
    """Names of what vLLM may load; both sides name it, since that changes what vLLM does."""
    points = [point for one in metadata.distributions() for point in one.entry_points]
    found = {point.name for point in points if point.group.startswith("vllm.")}
    return sorted(found | {ENTRY_POINT} if ours else found - {ENTRY_POINT})


def measure_round(model: Path, repeats: int, order: random.Random) -> dict[str, Sample]:
    """Start every variant afresh, one after another, and let them run batches in turn."""
    with ExitStack() as stack:
        names = order.sample(list(VARIANTS), len(VARIANTS))
        children = {name: stack.enter_context(started(name, model)) for name in names}
        samples = {
            name: {figure: [value] for figure, value in one.start.items()}
            for name, one in children.items()
        }
        for i in range(WARM_UP + repeats):
            for name in order.sample(names, len(names)):
                spent = children[name].run_batch()
                for figure, value in spent.items() if i >= WARM_UP else ():
                    samples[name].setdefault(figure, []).append(value)
    return samples


def summarise(rounds: Sequence[Mapping[str, Sample]]) -> dict[str, dict[str, Any]]:
    """Compare with `without`, by figure: ratios and seconds more, one of each per round."""
    from vllm_plugins.bench.compare import bootstrap_median

    summary: dict[str, dict[str, Any]] = {}
    for figure in rounds[0]["without"]:
        seconds = [statistics.median(one["without"][figure]) for one in rounds]
        row: dict[str, Any] = {"without_s": statistics.median(seconds)}
        for name in ("installed", "control"):
            pairs = [list(zip(r[name][figure], r["without"][figure], strict=True)) for r in rounds]
            ratios = [statistics.median([a / b for a, b in one]) for one in pairs]
            added = [statistics.median([a - b for a, b in one]) for one in pairs]
            row[name] = {
                "ratio": vars(bootstrap_median(ratios)),
                "added_s": vars(bootstrap_median(added)),
                "ratios": ratios,
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
    parser.add_argument("--repeats", type=int, default=60, help="batches per process")
    parser.add_argument("--model", type=Path, help="model folder; by default a tiny Llama")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        summary = summarise(run(_model(options.model, Path(folder)), options))
    print_table(summary)
    if options.out:
        _write(options.out, summary)
    return 0


def run(model: Path, options: argparse.Namespace) -> list[dict[str, Sample]]:
    """Measure all rounds, after a start that only warms the machine's caches."""
    order = random.Random(0)
    measure_round(model, 1, order)
    rounds = []
    for i in range(options.rounds):
        rounds.append(measure_round(model, options.repeats, order))
        print(f"round {i + 1} of {options.rounds}", file=sys.stderr, flush=True)
    return rounds


def _model(model: Path | None, folder: Path) -> Path:
    """Return a link to the model, or a tiny one, in a folder that takes the logs too."""
    link = folder / "model"
    if model is None:
        maker = ROOT / "examples" / "models" / "tiny.py"
        subprocess.run([sys.executable, str(maker), str(link)], check=True)
    else:
        link.symlink_to(model.resolve())
    return link


def _write(out: Path, summary: Mapping[str, Any]) -> None:
    from vllm_plugins.bench.machine import describe_machine

    report = {
        "command": " ".join(["python", "benchmarks/off_cost.py", *sys.argv[1:]]),
        "machine": describe_machine(),
        "environment": ENVIRONMENT,
        "summary": summary,
    }
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
