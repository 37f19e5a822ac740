"""What a benchmark run has measured so far, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from vllm_plugins.bench.capacity import Capacity
from vllm_plugins.bench.compare import Ratio, best, paired_ratios
from vllm_plugins.bench.config import BenchConfig
from vllm_plugins.bench.metrics import Trial, identical_share
from vllm_plugins.bench.variants import Variant

SWEEP, PAIR = "sweep", "pair"


@dataclass(frozen=True)
class Point:
    """One load point: its label, and its request rate in req/s where it has one."""

    label: str
    rate: float | None = None


@dataclass
class Record:
    """One trial.

    Attributes:
        phase: ``sweep`` or ``pair``.
        round: Round of pairs, from 0.
        variant: Name of the variant.
        point: Load point.
        summary: Figures of the trial; holds ``capacity`` where that was searched for.
        trial: Token times; not written to the result file, which names the raw files instead.
        files: Stem of the trial's raw files in the result folder.
        startup_s: How long its server took to get healthy.
        capacity: Search for the capacity on the same server, if any.
    """

    phase: str
    round: int
    variant: str
    point: Point
    summary: dict[str, float]
    trial: Trial
    files: str
    startup_s: float
    capacity: Capacity | None = None


@dataclass(frozen=True)
class Comparison:
    """Ratios of one variant over another at one load point."""

    challenger: str
    baseline: str
    point: str
    ratios: tuple[Ratio, ...]


@dataclass
class Results:
    """All records of a run.

    Attributes:
        config: What was asked for.
        points: Load points, in order.
        records: Trials, in order of measuring.
        completions: Greedy completions by variant and round.
        best_static: The static variant that the challengers are paired with, once known.
    """

    config: BenchConfig
    points: tuple[Point, ...]
    records: list[Record] = field(default_factory=list)
    completions: dict[tuple[str, int], tuple[str, ...]] = field(default_factory=dict)
    best_static: Variant | None = None

    def choose_best_static(self) -> Variant:
        """Choose the best static variant from the sweep, or the only one there is."""
        statics = {variant.name: variant for variant in self.config.statics}
        swept = {r.variant: r.summary for r in self.records if r.phase == SWEEP}
        only = self.config.statics[0].name
        name = best(swept, self.config.criterion, self.config.slo) if swept else only
        self.best_static = statics[name]
        return self.best_static

    def pair_records(self, variant: str, point: str) -> list[Record]:
        """Records of a variant at a load point, ordered by round."""
        found = [
            r
            for r in self.records
            if r.phase == PAIR and r.variant == variant and r.point.label == point
        ]
        return sorted(found, key=lambda record: record.round)

    def paired_names(self) -> list[str]:
        """Names of the alternated variants: the best static one, then the challengers."""
        first = [self.best_static.name] if self.best_static else []
        return first + [variant.name for variant in self.config.challengers]

    def comparisons(self) -> list[Comparison]:
        """Every challenger against the best static variant, and the first against the others."""
        return [
            Comparison(one, other, point.label, tuple(self._ratios(one, other, point.label)))
            for point in self.points
            for one, other in self._pairs()
            if self._ratios(one, other, point.label)
        ]

    def _pairs(self) -> Iterator[tuple[str, str]]:
        names = self.paired_names()
        for challenger in names[1:]:
            yield challenger, names[0]
        for other in names[2:]:
            yield names[1], other

    def _ratios(self, one: str, other: str, point: str) -> Sequence[Ratio]:
        a, b = self.pair_records(one, point), self.pair_records(other, point)
        # After an interruption the last round may have one side only.
        rounds = {r.round for r in a} & {r.round for r in b}
        ours, theirs = ([r.summary for r in side if r.round in rounds] for side in (a, b))
        return paired_ratios(ours, theirs, seed=self.config.seed) if rounds else []

    def accuracy(self) -> dict[str, float]:
        """Share of identical greedy completions, by the pair that was compared.

        The best static variant against itself on another server start is the noise of the engine:
        batches that form differently may round differently.
        """
        names = self.paired_names()
        shares = {}
        for one, other, rounds in [(n, names[0], (0, 0)) for n in names[1:]] + [
            (n, n, (1, 0)) for n in names[:1]
        ]:
            left = self.completions.get((one, rounds[0]))
            right = self.completions.get((other, rounds[1]))
            if left and right:
                label = f"{one} = {other}" if one != other else f"{one} = itself"
                shares[label] = identical_share(left, right)
        return shares
