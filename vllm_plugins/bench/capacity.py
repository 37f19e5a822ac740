"""Capacity: the highest request rate at which enough requests meet their targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

DEFAULT_TARGET = 0.9


@dataclass(frozen=True)
class Capacity:
    """Result of a search.

    Attributes:
        rate: Highest rate in req/s that was measured and met the target; 0 when none did.
        fails_at: Lowest rate that was measured and missed it; None when none did.
        measured: Every rate and its attainment, in the order of measuring.
    """

    rate: float
    fails_at: float | None
    measured: tuple[tuple[float, float], ...]

    @property
    def is_bracketed(self) -> bool:
        """True when a rate that meets the target and one that misses it were both found."""
        return self.rate > 0 and self.fails_at is not None


def find_capacity(
    attainment: Callable[[float], float],
    start: float,
    target: float = DEFAULT_TARGET,
    trials: int = 6,
    precision: float = 1.03,
) -> Capacity:
    """Search by doubling or halving to a bracket, then bisecting it on a logarithmic scale.

    Args:
        attainment: Measures the share of good requests at a rate in req/s.
        start: First rate to measure.
        target: Share of good requests that is enough.
        trials: Most rates to measure.
        precision: Stop when the bracket's ratio is below this.
    """
    measured: list[tuple[float, float]] = []
    low: float = 0.0
    high: float | None = None
    while len(measured) < trials and not (high and low and high / low < precision):
        rate = _next(start, low, high)
        measured.append((rate, attainment(rate)))
        if measured[-1][1] >= target:
            low = rate
        else:
            high = rate
    return Capacity(low, high, tuple(measured))


def _next(start: float, low: float, high: float | None) -> float:
    if high is None:
        return low * 2 or start
    return sqrt(low * high) if low else high / 2
