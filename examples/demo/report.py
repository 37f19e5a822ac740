"""What the demo prints: latencies side by side, the answers, the plug-in's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table
from workload import Answer, Run

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

PREFIX = "vllm_plugins:"
HISTOGRAM_PARTS = ("_bucket", "_sum", "_count", "_created")


def latency_table(runs: dict[str, Run], slo_ms: float) -> Table:
    """Return the table of latencies, one row per server."""
    prompt = next(iter(runs.values())).long.prompt_tokens
    table = Table(
        title=f"Running chats while a prompt of {prompt:,} tokens arrives "
        f"(TBT target {slo_ms:.0f} ms)",
        caption="TBT: time between two tokens of a running chat. Late: what the gaps exceed the "
        "target by, summed, per chat. TTFT: time to the first token.",
    )
    heads = ("TBT p50", "TBT p99", "TBT max", "over target", "late", "TTFT, long", "total")
    table.add_column("server")
    for head in heads:
        table.add_column(head, justify="right")
    for name, run in runs.items():
        table.add_row(name, *_latencies(run, slo_ms))
    return table


def _latencies(run: Run, slo_ms: float) -> list[str]:
    gaps_ms = 1000 * np.asarray(run.gaps)
    middle, tail = np.percentile(gaps_ms, [50, 99])
    return [
        *(f"{value:,.0f} ms" for value in (middle, tail, gaps_ms.max())),
        f"{(gaps_ms > slo_ms).mean():.1%}",
        f"{np.maximum(gaps_ms - slo_ms, 0).sum() / 1000 / len(run.chats):.1f} s",
        f"{run.long.ttft:.1f} s",
        f"{run.seconds:.0f} s",
    ]


def print_answers(console: Console, answers: Sequence[Answer]) -> None:
    """Print questions and answers; of a long question its last line."""
    for answer in answers:
        console.print(f"\n[bold]Q:[/bold] {answer.question.splitlines()[-1]}", highlight=False)
        console.print("[bold]A:[/bold]", end=" ")
        console.print(answer.text.strip(), markup=False, highlight=False)


def metrics_table(samples: Sequence[Sample]) -> Table:
    """Return the plug-ins' metrics; of a histogram its count and mean."""
    table = Table(f"metric ({PREFIX}...)", "labels", title="The plug-in's part of /metrics")
    table.add_column("value", justify="right")
    by_key = {
        (s.name.removeprefix(PREFIX), _labels(s)): s.value
        for s in samples
        if s.name.startswith(PREFIX)
    }
    for (name, labels), value in sorted(by_key.items()):
        if name.endswith("_count"):
            name = name.removesuffix("_count")
            mean = by_key[f"{name}_sum", labels] / value if value else 0.0
            table.add_row(name, labels, f"{value:,.0f} values, mean {mean:.4g}")
        elif not name.endswith(HISTOGRAM_PARTS):
            table.add_row(name, labels, f"{value:,.4g}")
    return table


def _labels(sample: Sample) -> str:
    # The model's name is the path of its folder: long, and the same everywhere.
    shown = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine", "le")}
    return ", ".join(f"{key}={value}" for key, value in shown.items())
