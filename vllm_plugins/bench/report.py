"""What a reader sees: tables in the terminal, and a JSON file that holds every number."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from vllm_plugins.bench.compare import FIGURES, Summary, median_summary
from vllm_plugins.bench.results import SWEEP, Comparison, Record, Results

SCHEMA = 1
# With five rounds the range of the ratios covers their median 94 % of the time.
FEWEST_ROUNDS = 5
Rows = list[tuple[str, Summary]]
ALWAYS = ("goodput", "attainment", "ttft_p50_ms", "ttft_p99_ms", "tbt_p50_ms", "tbt_p99_ms")
COLUMNS = (*ALWAYS, "tbt_max_ms", "output_tokens_per_s", "requests_per_s")
STALL_COLUMNS = ("stall_ttft_p50_ms", "stall_tbt_p99_ms", "stall_tbt_max_ms")
VERDICT_STYLES = {"better": "green", "worse": "red"}


class TrialProgress:
    """Progress bar over trials with the time that remains; a line per trial stays behind."""

    def __init__(self, console: Console, total: int) -> None:
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            # Trials are minutes apart: the speed is taken over the whole run.
            speed_estimate_period=24 * 3600,
        )
        self._task = self._bar.add_task("starting", total=total)

    def __enter__(self) -> TrialProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, label: str) -> None:
        """Show what is being measured."""
        self._bar.update(self._task, description=label)

    def done(self, trials: int, outcome: str) -> None:
        """Advance the bar and keep a line with the outcome."""
        self._bar.advance(self._task, trials)
        task = self._bar.tasks[0]
        eta = f", eta {task.time_remaining:.0f} s" if task.time_remaining else ""
        self._bar.console.print(
            f"[{task.completed:.0f}/{task.total:.0f}{eta}] {outcome}", markup=False, highlight=False
        )


def print_report(results: Results, console: Console) -> None:
    """Print the sweep, the medians of the pairs, the ratios and the accuracy."""
    swept = [record for record in results.records if record.phase == SWEEP]
    if swept:
        title = f"Static settings of stock vLLM at {results.points[0].label}"
        rows: Rows = [(_mark(r.variant, results), r.summary) for r in swept]
        console.print(summary_table(title, rows))
    for point in results.points:
        rows = [(n, median_of(results.pair_records(n, point.label))) for n in _measured(results)]
        if rows:
            title = f"Medians over {results.config.repeats} rounds at {point.label}"
            console.print(summary_table(title, rows))
    for comparison in results.comparisons():
        console.print(ratio_table(comparison))
    for line in notes(results):
        console.print(line, markup=False)


def _mark(name: str, results: Results) -> str:
    chosen = results.best_static is not None and results.best_static.name == name
    return f"{name} (best)" if chosen else name


def _measured(results: Results) -> list[str]:
    label = results.points[0].label
    return [name for name in results.paired_names() if results.pair_records(name, label)]


def median_of(records: list[Record]) -> Summary:
    """Median figures of a variant's rounds; empty where there are none."""
    return median_summary([record.summary for record in records]) if records else {}


def summary_table(title: str, rows: Rows) -> Table:
    """One row per variant, one column per figure that any of them has."""
    names = ("capacity", *COLUMNS, *STALL_COLUMNS)
    shown = [n for n in names if any(n in summary for _, summary in rows)]
    table = Table(title=title, title_justify="left")
    table.add_column("variant")
    for name in shown:
        figure = FIGURES[name]
        table.add_column(f"{figure.label}\n{figure.unit}".strip(), justify="right")
    table.add_column("failed", justify="right")
    for label, summary in rows:
        cells = [number(summary.get(name)) for name in shown]
        table.add_row(label, *cells, f"{summary.get('failed', math.nan):.0f}")
    return table


def ratio_table(comparison: Comparison) -> Table:
    """Ratios with their intervals; a verdict only where the interval clears 1."""
    title = f"{comparison.challenger} / {comparison.baseline} at {comparison.point}"
    table = Table(title=title, title_justify="left")
    for name in ("figure", "better is", "median ratio", "95 % interval", "verdict"):
        table.add_column(name, justify="left" if name in ("figure", "verdict") else "right")
    for ratio in comparison.ratios:
        figure, interval = FIGURES[ratio.figure], ratio.interval
        spread = f"{interval.low:.3f} to {interval.high:.3f}" if interval else "-"
        verdict = f"[{VERDICT_STYLES.get(ratio.verdict, 'dim')}]{ratio.verdict}"
        median = f"{interval.median:.3f}" if interval else "-"
        direction = "higher" if figure.higher_is_better else "lower"
        table.add_row(figure.label, direction, median, spread, verdict)
    return table


def number(value: float | None) -> str:
    """Format a figure with three significant digits, whole from 100 on."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def notes(results: Results) -> list[str]:
    """What the figures do not say by themselves: targets, accuracy, and grounds for doubt."""
    slo, config = results.config.slo, results.config
    lines = [
        f"good request: TTFT <= {slo.ttft_ms:g} ms and its TBT {slo.tbt_stat} <= {slo.tbt_ms:g} ms"
    ]
    if len(config.statics) == 1:
        lines.append(f"baseline '{config.statics[0].name}' was given, not found by a sweep")
    lines += [f"identical greedy completions, {k}: {v:.0%}" for k, v in results.accuracy().items()]
    if results.comparisons() and config.repeats < FEWEST_ROUNDS:
        covers = 1 - 2.0 ** (1 - config.repeats)
        lines.append(
            f"warning: {config.repeats} rounds: an interval covers the true ratio at most "
            f"{covers:.0%} of the time, whatever it is called; use at least {FEWEST_ROUNDS}"
        )
    failed = sum(int(record.summary["failed"]) for record in results.records)
    if failed:
        lines.append(f"warning: {failed} requests failed (see the server logs)")
    short = [
        r
        for r in results.records
        if r.summary.get("stall_decodes", math.inf) < config.stall.decodes
    ]
    if short:
        lines.append(
            f"warning: in {len(short)} trials not every decode streamed from before to after the "
            "prefill of each long prompt, so their stalls look better than they are: raise "
            "--decode-tokens or --stall-start"
        )
    loose = [r for r in results.records if r.capacity and not r.capacity.is_bracketed]
    if loose:
        lines.append(
            f"warning: {len(loose)} capacity searches ended without a rate on both sides of the "
            "target: raise --capacity-trials or change --capacity-start"
        )
    return lines


def to_json(results: Results, context: dict[str, Any]) -> dict[str, Any]:
    """Everything measured, as plain values.

    Args:
        results: The run.
        context: Machine, command line, times and outcome.
    """
    chosen = results.best_static
    plain: dict[str, Any] = _plain(
        {
            "schema": SCHEMA,
            **context,
            "config": asdict(results.config),
            "best_static": chosen.name if chosen else None,
            "trials": [_record(record) for record in results.records],
            "comparisons": [
                {
                    **asdict(comparison),
                    "ratios": [
                        {**asdict(ratio), "verdict": ratio.verdict} for ratio in comparison.ratios
                    ],
                }
                for comparison in results.comparisons()
            ],
            "accuracy": results.accuracy(),
            "notes": notes(results),
        }
    )
    return plain


def _record(record: Record) -> dict[str, Any]:
    names = ("phase", "round", "variant", "summary", "files", "startup_s")
    plain = {name: getattr(record, name) for name in names}
    capacity = asdict(record.capacity) if record.capacity else None
    return {**plain, "point": asdict(record.point), "capacity": capacity}


def _plain(value: Any) -> Any:
    """Make a value fit for strict JSON: paths become text, and what is not finite null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result file."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
