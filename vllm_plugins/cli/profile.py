"""``vllm-plugins profile MODEL``: fit the step cost model on the running hardware."""

from __future__ import annotations

import argparse
import os
import random
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_plugins.engine.cost_model import FitReport, StepCostModel, StepWork

HELP = "Measure step times of a model here and fit the step cost model."
HELD_OUT = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", help="Model folder or name, as for `vllm serve`.")
    parser.add_argument("--out", type=Path, default=Path("cost_profile.json"), help="JSON result.")
    parser.add_argument("--plot", type=Path, help="Also draw predicted against measured (PNG).")
    parser.add_argument("--steps-csv", type=Path, help="Also write every measured step.")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="How long to measure; default 120."
    )
    parser.add_argument("--tile", type=int, default=1, help="Matrix tile in rows; CUDA: 128.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the workload.")
    parser.add_argument(
        "--serve-args",
        default="",
        help="Engine arguments of the server that the profile is for, in one string.",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, fit, report and write the profile."""
    # The profiler steps the engine itself, so the engine has to be in this process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    config, works, seconds = _measure(args)
    model, fitted, held_out = _fit(works, seconds, args.tile, args.seed)
    _write(args.out, config, model, {"fit": fitted.as_dict(), "held_out": held_out.as_dict()})
    if args.steps_csv:
        _write_steps(args.steps_csv, works, seconds)
    if args.plot:
        _plot(args.plot, model, works, seconds, held_out)
    _print(args.out, model, fitted, held_out, config.model_config.max_model_len)
    return 0


def _measure(args: argparse.Namespace) -> tuple[VllmConfig, list[StepWork], list[float]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from vllm_plugins.engine.step_profiler import StepProfiler

    engine = _engine(args.model, shlex.split(args.serve_args))
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("Measuring steps", total=1.0)
        profiler = StepProfiler(engine, args.seed)
        profiler.run(args.seconds, lambda share: progress.update(task, completed=share))
    recorder = profiler.recorder
    return engine.vllm_config, recorder.works, recorder.seconds


def _engine(model: str, arguments: Sequence[str]) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.llm_engine import LLMEngine

    from vllm_plugins.plugin import SCHEDULER_HOST

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    # Random prompts do not hit, but looking them up would be timed.
    fixed = ["--model", model, "--scheduler-cls", SCHEDULER_HOST, "--no-enable-prefix-caching"]
    parsed = parser.parse_args([*fixed, *arguments])
    return LLMEngine.from_engine_args(EngineArgs.from_cli_args(parsed))


def _fit(
    works: Sequence[StepWork], seconds: Sequence[float], tile: int, seed: int
) -> tuple[StepCostModel, FitReport, FitReport]:
    from vllm_plugins.engine.cost_model import FEATURES, fit, report
    from vllm_plugins.errors import PluginError

    if len(works) < 10 * len(FEATURES):
        raise PluginError("profile", f"only {len(works)} steps were measured", "raise --seconds")
    order = list(range(len(works)))
    random.Random(seed).shuffle(order)
    cut = round(len(order) * HELD_OUT)
    test, train = order[:cut], order[cut:]
    model = fit([works[i] for i in train], [seconds[i] for i in train], tile)
    reports = [report(model, [works[i] for i in part], [seconds[i] for i in part])
               for part in (train, test)]  # fmt: skip
    return model, reports[0], reports[1]


def _write(path: Path, config: VllmConfig, model: StepCostModel, reports: dict[str, Any]) -> None:
    import math

    from vllm_plugins.engine.cost_profile import CostProfile, profile_key

    profile = CostProfile(
        key=profile_key(config),
        coefficients=model.coefficients,
        knee=model.knee if math.isfinite(model.knee) else None,
        tile=model.tile,
        report=reports,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profile.model_dump_json(indent=2) + "\n")


def _write_steps(path: Path, works: Sequence[StepWork], seconds: Sequence[float]) -> None:
    import csv

    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["rows", "requests", "decode_context", "prefill_work", "seconds"])
        for work, measured in zip(works, seconds, strict=True):
            writer.writerow(
                [work.rows, work.requests, work.decode_context, work.prefill_work, measured]
            )


def _plot(
    path: Path, model: StepCostModel, works: Sequence[StepWork], seconds: Sequence[float],
    held_out: FitReport,
) -> None:  # fmt: skip
    from vllm_plugins.cli.pictures import pyplot

    plt = pyplot()
    predicted = [1000 * model.seconds(work) for work in works]
    measured = [1000 * value for value in seconds]
    figure, axes = plt.subplots(figsize=(6, 5.5))
    mixed = [work.prefill_work > 0 for work in works]
    for kind, label in ((False, "decode only"), (True, "with prefill")):
        xs = [m for m, k in zip(measured, mixed, strict=True) if k is kind]
        ys = [p for p, k in zip(predicted, mixed, strict=True) if k is kind]
        axes.scatter(xs, ys, s=8, alpha=0.5, label=label)
    span = [min(measured), max(measured)]
    axes.plot(span, span, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="measured step time (ms)",
             ylabel="predicted step time (ms)")  # fmt: skip
    axes.set_title(
        f"held out: R² {held_out.r2:.3f}, median error {held_out.median_error:.1%}, "
        f"p90 {held_out.p90_error:.1%}", fontsize=10
    )  # fmt: skip
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _print(
    path: Path, model: StepCostModel, fitted: FitReport, held_out: FitReport, longest: int
) -> None:
    from rich.console import Console
    from rich.table import Table

    from vllm_plugins.engine.cost_model import FEATURES, saturating_prefill

    table = Table(title=f"Step cost model, written to {path}")
    for column in ("feature", "microseconds per unit"):
        table.add_column(column)
    for name, value in zip(FEATURES, model.coefficients, strict=True):
        table.add_row(name, f"{1e6 * value:.4g}")
    console = Console()
    console.print(table, f"knee: {model.knee:g} rows")
    console.print(f"saturating prefill (L_m): {saturating_prefill(model, longest)} tokens")
    for name, part in (("fit", fitted), ("held out", held_out)):
        console.print(
            f"{name}: {part.steps} steps, R² {part.r2:.3f}, error median {part.median_error:.1%}, "
            f"p90 {part.p90_error:.1%}, p99 {part.p99_error:.1%}"
        )
