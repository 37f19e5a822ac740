"""Comparing variants: which static setting is best, and paired ratios with their spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_plugins.bench.metrics import Slo

# The interval of fewer pairs says next to nothing: of two it covers their median every second time.
FEWEST_PAIRS = 3
Summary = Mapping[str, float]


@dataclass(frozen=True)
class Figure:
    """How one figure of a summary is shown: its label, unit, and which direction is better."""

    label: str
    unit: str
    higher_is_better: bool


FIGURES = {
    "capacity": Figure("capacity", "req/s", True),
    "goodput": Figure("goodput", "req/s", True),
    "attainment": Figure("SLO attainment", "", True),
    "ttft_p50_ms": Figure("TTFT p50", "ms", False),
    "ttft_p99_ms": Figure("TTFT p99", "ms", False),
    "tbt_p50_ms": Figure("TBT p50", "ms", False),
    "tbt_p99_ms": Figure("TBT p99", "ms", False),
    "tbt_max_ms": Figure("TBT max", "ms", False),
    "stall_tbt_p99_ms": Figure("TBT p99 in stalls", "ms", False),
    "stall_tbt_max_ms": Figure("TBT max in stalls", "ms", False),
    "stall_ttft_p50_ms": Figure("TTFT of long prompt", "ms", False),
    "requests_per_s": Figure("throughput", "req/s", True),
    "output_tokens_per_s": Figure("output tokens", "tok/s", True),
    "total_tokens_per_s": Figure("all tokens", "tok/s", True),
}


@dataclass(frozen=True)
class Interval:
    """A median and its bootstrap interval."""

    median: float
    low: float
    high: float


def bootstrap_median(
    values: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Median with a percentile-bootstrap interval.

    Below about six values the interval is close to the range of the values, whose coverage of the
    true median is ``1 - 2 ** (1 - n)``: 94 % for five.

    Args:
        values: Independent observations, at least one, all finite.
        level: Coverage that is aimed at.
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling.
    """
    data = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    medians = np.median(data[rng.integers(0, len(data), (resamples, len(data)))], axis=1)
    tail = 50 * (1 - level)
    low, high = np.percentile(medians, [tail, 100 - tail])
    return Interval(float(np.median(data)), float(low), float(high))


@dataclass(frozen=True)
class Ratio:
    """Paired ratios of one figure; ``interval`` is None where a pair has no finite ratio."""

    figure: str
    values: tuple[float, ...]
    interval: Interval | None

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or ``no difference shown``, by the interval against 1.

        ``too few rounds`` below three, ``undefined`` where a pair has no finite ratio.
        """
        if self.interval is None:
            return "undefined"
        if len(self.values) < FEWEST_PAIRS:
            return "too few rounds"
        if self.interval.low <= 1 <= self.interval.high:
            return "no difference shown"
        return "better" if (self.interval.low > 1) == _higher(self.figure) else "worse"


def _higher(figure: str) -> bool:
    return FIGURES[figure].higher_is_better


def paired_ratios(
    challenger: Sequence[Summary], baseline: Sequence[Summary], seed: int = 0
) -> list[Ratio]:
    """Ratios challenger over baseline, pair by pair, for every figure both sides have.

    Args:
        challenger: One summary per round.
        baseline: The summaries of the same rounds.
        seed: Seed of the bootstrap.
    """
    names = [n for n in FIGURES if all(n in s for s in (*challenger, *baseline))]
    return [_ratio(name, challenger, baseline, seed) for name in names]


def _ratio(
    name: str, challenger: Sequence[Summary], baseline: Sequence[Summary], seed: int
) -> Ratio:
    values = tuple(
        a[name] / b[name] if b[name] else float("nan")
        for a, b in zip(challenger, baseline, strict=True)
    )
    finite = bool(values) and bool(np.isfinite(values).all())
    return Ratio(name, values, bootstrap_median(values, seed=seed) if finite else None)


def median_summary(summaries: Sequence[Summary]) -> dict[str, float]:
    """Median of each figure over rounds, for tables; a figure missing in one round is left out."""
    names = [n for n in summaries[0] if all(n in s for s in summaries)]
    return {n: float(np.median([s[n] for s in summaries])) for n in names}


Key = tuple[float, ...]


def _by_goodput(summary: Summary, slo: Slo) -> Key:
    return (summary["goodput"], summary["attainment"], -summary["ttft_p99_ms"])


def _by_stall(summary: Summary, slo: Slo) -> Key:
    # Among settings that keep the TBT target the one that serves the long prompt soonest wins.
    tbt = summary["stall_tbt_p99_ms"]
    if tbt <= slo.tbt_ms:
        return (1.0, -summary["stall_ttft_p50_ms"])
    return (0.0, -tbt)


CRITERIA: dict[str, Callable[[Summary, Slo], Key]] = {
    "goodput": _by_goodput,
    "attainment": lambda s, _: (s["attainment"], s["goodput"]),
    "throughput": lambda s, _: (s["output_tokens_per_s"],),
    "ttft-p99": lambda s, _: (-s["ttft_p99_ms"],),
    "tbt-p99": lambda s, _: (-s["tbt_p99_ms"],),
    "stall": _by_stall,
    "capacity": lambda s, _: (s["capacity"], s["attainment"]),
}


def best(summaries: Mapping[str, Summary], criterion: str, slo: Slo) -> str:
    """Name of the best variant by a criterion; the first of equals.

    A figure that could not be measured (NaN) never wins.
    """
    keys = {name: CRITERIA[criterion](summary, slo) for name, summary in summaries.items()}
    return max(keys, key=lambda name: tuple(np.nan_to_num(keys[name], nan=-np.inf)))
