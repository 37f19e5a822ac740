"""One picture per run: TBT and TTFT distributions, and ratios or capacities with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_plugins.bench.compare import FIGURES, Ratio
from vllm_plugins.bench.config import STALL
from vllm_plugins.bench.errors import BenchError
from vllm_plugins.bench.metrics import Floats, stall_gaps
from vllm_plugins.bench.results import Comparison, Record, Results

# Okabe and Ito's colours, told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FOREST = (
    "capacity", "goodput", "attainment", "stall_tbt_p99_ms", "stall_tbt_max_ms",
    "stall_ttft_p50_ms", "tbt_p50_ms", "tbt_p99_ms", "tbt_max_ms", "ttft_p50_ms", "ttft_p99_ms",
    "output_tokens_per_s",
)  # fmt: skip
# Points of a distribution that are drawn; more cannot be seen.
CURVE_POINTS = 2000
SHORTEST_MS = 0.1


def require_matplotlib() -> Any:
    """Return ``matplotlib.pyplot`` set to draw without a display.

    Raises:
        BenchError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise BenchError(
            f"the picture needs matplotlib ({error}): pip install 'vllm-plugins[tools]', or give "
            "--no-plot"
        ) from None
    return plt


def draw(results: Results, path: Path) -> None:
    """Draw a run's result.

    Args:
        results: A run with at least one round of pairs.
        path: PNG file to write.
    """
    plt = require_matplotlib()
    names = results.paired_names()
    colours = dict(zip(names, COLOURS * len(names), strict=False))
    has_capacity = any(record.capacity for record in results.records)
    widths = [1.0, 1.0, 0.8, 1.25] if has_capacity else [1.0, 1.0, 1.25]
    figure, axes = plt.subplots(
        1, len(widths), figsize=(4.6 * sum(widths), 4.4), width_ratios=widths, layout="constrained"
    )
    label = results.points[0].label
    _distributions(axes[:2], results, label, colours)
    if has_capacity:
        _capacities(axes[2], results, label, colours)
    _forest(axes[-1], [c for c in results.comparisons() if c.point == label], colours)
    _entitle(figure, results, label)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _entitle(figure: Any, results: Results, label: str) -> None:
    config, names = results.config, results.paired_names()
    at = "" if label == config.workload else f" at {label}"
    figure.suptitle(
        f"{' vs '.join(names[1:] + names[:1])}: {config.workload} workload{at}, "
        f"{Path(config.model).name}, alternated rounds: {config.repeats}",
        fontsize=11,
    )


def _distributions(
    axes: Sequence[Any], results: Results, label: str, colours: dict[str, str]
) -> None:
    slo, is_stall = results.config.slo, results.config.workload == STALL
    for name, colour in colours.items():
        records = results.pair_records(name, label)
        tbt = np.concatenate([_gaps(results, r) for r in records] or [np.empty(0)]) * 1e3
        ttft = np.concatenate([_ttft(results, r) for r in records] or [np.empty(0)]) * 1e3
        for axis, values in zip(axes, (tbt, ttft), strict=True):
            _cumulative(axis, values, name, colour)
    where = " of decodes while a long prompt is served" if is_stall else ""
    _finish(axes[0], f"TBT{where} (ms)", slo.tbt_ms)
    _finish(axes[1], f"TTFT{' of long prompts' if is_stall else ''} (ms)", slo.ttft_ms)
    axes[0].set_ylabel("share of observations")


def _long(results: Results, record: Record) -> Any:
    # The stall workload lists its decodes first.
    return np.arange(len(record.trial.start_s)) >= results.config.stall.decodes


def _gaps(results: Results, record: Record) -> Floats:
    if results.config.workload == STALL:
        return stall_gaps(record.trial, _long(results, record))
    return record.trial.gap_s


def _ttft(results: Results, record: Record) -> Floats:
    chosen = ~record.trial.failed
    if results.config.workload == STALL:
        chosen = chosen & _long(results, record)
    return record.trial.ttft_s[chosen]


def _cumulative(axis: Any, values: Floats, name: str, colour: str) -> None:
    if not len(values):
        return
    shares = np.linspace(0, 1, min(CURVE_POINTS, len(values)) + 1)
    # Every step ends at an observation, so that a single one is an upright line.
    steps = np.quantile(values, shares, method="inverted_cdf")
    axis.step(steps, shares, where="post", color=colour, label=name, lw=1.8)


def _finish(axis: Any, label: str, target: float) -> None:
    axis.axvline(target, color="0.35", ls="--", lw=1)
    style = {"textcoords": "offset points", "color": "0.35", "fontsize": 8, "ha": "right"}
    axis.annotate("SLO", (target, 0.03), xytext=(-3, 0), **style)
    axis.set(xscale="log", xlabel=label, ylim=(0, 1.02))
    low, high = axis.get_xlim()
    # Tokens that came in one read of the client are microseconds apart: no reader needs to see it.
    axis.set_xlim(max(low, SHORTEST_MS), max(high, target * 1.2))
    _readable_ticks(axis)
    axis.grid(alpha=0.25, which="both", lw=0.5)
    axis.legend(fontsize=8, loc="upper left", framealpha=0.9)


def _readable_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_xlim()
    # A narrow range holds no power of ten: name some steps between them then.
    steps = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axis.xaxis.set_major_locator(LogLocator(subs=steps))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _capacities(axis: Any, results: Results, label: str, colours: dict[str, str]) -> None:
    for position, (name, colour) in enumerate(colours.items()):
        rates = [r.capacity.rate for r in results.pair_records(name, label) if r.capacity]
        if rates:
            axis.bar(position, np.median(rates), color=colour, alpha=0.55, width=0.6)
            offsets = np.linspace(-0.15, 0.15, len(rates)) if len(rates) > 1 else [0.0]
            axis.plot(position + np.asarray(offsets), rates, "o", color=colour, ms=4)
    axis.set_xticks(range(len(colours)), list(colours), rotation=20, ha="right")
    target = results.config.capacity.target
    axis.set_ylabel(f"capacity at {target:.0%} attainment (req/s)")
    axis.grid(alpha=0.25, axis="y", lw=0.5)


def _forest(axis: Any, comparisons: Sequence[Comparison], colours: dict[str, str]) -> None:
    """Median ratio and interval per figure; filled where the interval clears 1."""
    shown = [n for n in FOREST if any(_ratio(c, n) for c in comparisons)]
    for rank, comparison in enumerate(comparisons):
        shift = (rank - (len(comparisons) - 1) / 2) * 0.7 / max(1, len(comparisons))
        # The first challenger's further comparisons share its colour: the marker sets them apart.
        marker = "o" if comparison.baseline == next(iter(colours)) else "s"
        for row, name in enumerate(shown):
            _whisker(axis, comparison, name, row + shift, colours[comparison.challenger], marker)
        text = f"{comparison.challenger} / {comparison.baseline}"
        axis.plot([], [], marker, color=colours[comparison.challenger], label=text)
    axis.axvline(1, color="0.35", lw=1)
    arrows = [f"{FIGURES[n].label} {'↑' if FIGURES[n].higher_is_better else '↓'}" for n in shown]
    axis.set_yticks(range(len(shown)), arrows, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel("paired ratio, median and 95 % interval\n(↑ above 1 is better, ↓ below 1)")
    axis.grid(alpha=0.25, axis="x", lw=0.5)
    axis.set_xscale("log")
    _readable_ratios(axis)
    if comparisons:
        # Above the axes: whiskers may reach into every corner of it.
        axis.legend(
            fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False
        )


def _readable_ratios(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

    low, high = axis.get_xlim()
    low, high = min(low, 0.9), max(high, 1.1)
    axis.set_xlim(low, high)
    if high / low < 20:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _ratio(comparison: Comparison, name: str) -> Ratio | None:
    """The ratio of a figure, or None where it has no interval to draw."""
    found = (r for r in comparison.ratios if r.figure == name and r.interval and r.interval.low > 0)
    return next(found, None)


def _whisker(
    axis: Any, comparison: Comparison, name: str, height: float, colour: str, marker: str
) -> None:
    ratio = _ratio(comparison, name)
    if ratio is None or ratio.interval is None:
        return
    interval = ratio.interval
    axis.plot([interval.low, interval.high], [height, height], color=colour, lw=1.6)
    face = colour if ratio.verdict in ("better", "worse") else "white"
    axis.plot(interval.median, height, marker, color=colour, markerfacecolor=face, ms=6)
