"""The step cost model: seconds of one engine step from what the step contains.

    t = a + b * rows + h * max(0, rows - knee) + e * requests + c * S_dec + d * A_pre

``rows`` is the number of tokens in the step, rounded up to the matrix tile; ``S_dec`` the sum of
the decodes' context lengths (KV that has to be read); ``A_pre`` the query-key products of the
prefill chunks, ``sum q * (context + q / 2)``; ``requests`` the sequences that the step samples or
keeps books for. The hinge joins the memory-bound and the compute-bound regime without a jump, so
that with non-negative coefficients the time never falls when work is added, which the budget
search relies on.

The two regimes and the first three features follow the linear predictors of the public Niyama
code (successor of Sarathi-Serve). The product form of ``A_pre``, the ``requests`` term and the
hinge are this package's own: a guess until fitted, hence the report with every fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FEATURES = ("constant", "rows", "rows_above_knee", "requests", "decode_context", "prefill_work")
# Share of the best tokens per second from which on a prompt counts as keeping the device busy.
SATURATED = 0.95
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step contains.

    Args:
        rows: Tokens in the step, decodes and prefill chunks together.
        requests: Requests in the step.
        decode_context: Sum of the decodes' context lengths, in tokens.
        prefill_work: Query-key products of the prefill chunks, in token pairs.
    """

    rows: int
    requests: int = 0
    decode_context: float = 0.0
    prefill_work: float = 0.0


def chunk_work(tokens: int, context: int) -> float:
    """Query-key products of one prefill chunk of ``tokens`` after ``context`` tokens."""
    return tokens * (context + tokens / 2)


@dataclass(frozen=True)
class StepCostModel:
    """A fitted cost model.

    Args:
        coefficients: Seconds per unit of each of :data:`FEATURES`; none is negative.
        knee: Rows at which the compute-bound regime begins; infinite for one regime.
        tile: Rows are rounded up to a multiple of this.
    """

    coefficients: tuple[float, ...]
    knee: float = math.inf
    tile: int = 1

    def seconds(self, work: StepWork) -> float:
        """Predict the time of a step, in seconds."""
        a, b, h, e, c, d = self.coefficients
        rows = -(-work.rows // self.tile) * self.tile
        above = h * (rows - self.knee) if rows > self.knee else 0.0
        return (
            a + b * rows + above + e * work.requests
            + c * work.decode_context + d * work.prefill_work
        )  # fmt: skip


def saturating_prefill(model: StepCostModel, longest: int) -> int:
    """Return the least prompt that keeps the device busy, DistServe's ``L_m``, in tokens.

    That is where tokens per second reach `SATURATED` of the most that any prompt up to ``longest``
    reaches; the paper profiles it without saying where on the curve (this point is our reading).

    Args:
        model: A fitted cost model.
        longest: Longest prompt to consider, in tokens, at least 1.
    """
    # Each length: with a tile the fastest ones are few, just below its multiples.
    lengths = range(1, longest + 1)
    works = [StepWork(n, 1, 0.0, chunk_work(n, 0)) for n in lengths]
    speed = np.array(lengths) / np.array([model.seconds(work) for work in works])
    return int(lengths[np.argmax(speed >= SATURATED * speed.max())])


def design_matrix(works: Iterable[StepWork], knee: float, tile: int) -> FloatArray:
    """Return the features of steps, shape (steps, features)."""
    raw = np.array(
        [(w.rows, w.requests, w.decode_context, w.prefill_work) for w in works], dtype=np.float64
    ).reshape(-1, 4)
    rows = np.ceil(raw[:, 0] / tile) * tile
    above = np.maximum(0.0, rows - knee) if math.isfinite(knee) else np.zeros_like(rows)
    return np.column_stack([np.ones_like(rows), rows, above, raw[:, 1], raw[:, 2], raw[:, 3]])


@dataclass(frozen=True)
class FitReport:
    """How well a cost model describes the steps it was fitted to, or held-out ones.

    Args:
        steps: Number of steps.
        r2: Share of the variance of step time that the model explains.
        median_error: Median of |predicted - measured| / measured; likewise the percentiles.
    """

    steps: int
    r2: float
    median_error: float
    p90_error: float
    p99_error: float

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return asdict(self)


def report(model: StepCostModel, works: Sequence[StepWork], seconds: Sequence[float]) -> FitReport:
    """Compare a model's predictions with measured step times, in seconds."""
    measured = np.asarray(seconds, dtype=np.float64)
    predicted = np.array([model.seconds(work) for work in works])
    spread = float(np.sum((measured - measured.mean()) ** 2))
    r2 = 1.0 - float(np.sum((measured - predicted) ** 2)) / spread if spread > 0 else math.nan
    errors = np.abs(predicted - measured) / measured
    p50, p90, p99 = (float(q) for q in np.quantile(errors, (0.5, 0.9, 0.99)))
    return FitReport(len(measured), r2, p50, p90, p99)


def fit(works: Sequence[StepWork], seconds: Sequence[float], tile: int = 1) -> StepCostModel:
    """Fit a cost model by non-negative least squares on relative errors.

    The knee is the one of the observed row counts that leaves the smallest residual; one regime
    is kept unless a knee lowers the squared residual by a twentieth.

    Args:
        works: What each step contained.
        seconds: How long each took.
        tile: Tile of the matrix products, in rows.

    Raises:
        ValueError: Fewer steps than features, or a step time that is not positive.
    """
    measured = np.asarray(seconds, dtype=np.float64)
    if len(measured) < len(FEATURES):
        raise ValueError(f"a fit needs at least {len(FEATURES)} steps, got {len(measured)}")
    if not np.all(measured > 0):
        raise ValueError("step times must be positive")
    rows = np.unique([work.rows for work in works])
    straight = _best_fit(works, measured, tile, [math.inf])
    coarse = np.quantile(rows, np.linspace(0.1, 0.9, 17))
    knee = _best_fit(works, measured, tile, coarse)[0]
    around = np.linspace(coarse[coarse <= knee][:-1].max(initial=rows[0]),
                         coarse[coarse >= knee][1:].min(initial=rows[-1]), 17)  # fmt: skip
    best = _best_fit(works, measured, tile, around)
    knee, coefficients, _ = best if best[2] < 0.95 * straight[2] else straight
    return StepCostModel(tuple(float(c) for c in coefficients), float(knee), tile)


def _best_fit(
    works: Sequence[StepWork], measured: FloatArray, tile: int, knees: Iterable[float]
) -> tuple[float, FloatArray, float]:
    """Return the knee with the smallest squared residual, its coefficients and that residual."""
    fits = ((knee, *_solve(design_matrix(works, knee, tile), measured)) for knee in knees)
    return min(fits, key=lambda item: item[2])


def _solve(features: FloatArray, measured: FloatArray) -> tuple[FloatArray, float]:
    """Minimise the squared error relative to the prediction, coefficients not negative.

    Dividing by the measured time instead would favour the fast steps among equal ones, and a
    machine's disturbances only ever make a step slower. So the weights are taken from the fit of
    the round before.
    """
    from scipy.optimize import nnls

    scale = measured
    for _ in range(4):
        weighted = features / scale[:, None]
        norms = np.linalg.norm(weighted, axis=0)
        norms[norms == 0] = 1.0
        solution, residual = nnls(weighted / norms, measured / scale)
        coefficients = solution / norms
        scale = np.maximum(features @ coefficients, 1e-3 * measured)
    return coefficients, float(residual) ** 2


class Correction:
    """One multiplicative correction of a profiled model, learnt while serving.

    ``g`` is an exponentially weighted mean of measured / predicted, clipped to [0.5, 2]: a machine
    that is uniformly slower or faster than the profile is followed, a broken profile is not hidden.

    Args:
        weight: Weight of the newest step.
    """

    LOW, HIGH = 0.5, 2.0

    def __init__(self, weight: float = 0.05) -> None:
        self._weight = weight
        self.g = 1.0

    def learn(self, predicted: float, measured: float) -> None:
        """Take one step's predicted and measured time, in seconds."""
        ratio = min(max(measured / predicted, self.LOW), self.HIGH)
        self.g += self._weight * (ratio - self.g)


class Spread:
    """How far steps exceed their predictions: a running quantile of measured / predicted.

    A least-squares model predicts the middle, and a target is missed by the slow tail. The
    quantile is followed by stochastic approximation: up by ``rate * quantile`` when a step exceeds
    it, down by ``rate * (1 - quantile)`` when not, so that it rests where that share exceeds it.

    Args:
        quantile: Share of the steps that should stay below.
        rate: Size of a move.
    """

    LIMIT = 3.0

    def __init__(self, quantile: float = 0.99, rate: float = 0.05) -> None:
        self._quantile = quantile
        self._rate = rate
        self.value = 1.0

    def learn(self, predicted: float, measured: float) -> None:
        """Take one step's predicted and measured time, in seconds."""
        above = measured > self.value * predicted
        self.value += self._rate * (self._quantile - (not above))
        self.value = min(max(self.value, 1.0), self.LIMIT)


class OnlineFit:
    """A cost model learnt from the steps that are being served, for use without a profile.

    Keeps the weighted normal equations of the fit with exponential forgetting, and solves them
    again after every few steps; memory and time per step do not grow. Steps with and without
    prefill are forgotten apart from each other: hours of decodes alone say nothing about what a
    prompt costs, and must not take away what is known of it.

    Args:
        tile: Rows are rounded up to a multiple of this.
        forgetting: Factor by which a step's weight falls with each later step of its kind.
        every: Steps between two solutions.
    """

    MIN_STEPS = 4
    # A step that took this many times its prediction was held up by something else.
    OUTLIER = 4.0

    def __init__(self, tile: int = 1, forgetting: float = 0.998, every: int = 8) -> None:
        # Here, because the import takes far longer than a step may.
        from scipy.optimize import nnls

        self._nnls = nnls
        self._tile = tile
        self._every = every
        self._decoding, self._prefilling = _Evidence(forgetting), _Evidence(forgetting)
        self.steps = 0
        self.model: StepCostModel | None = None

    def learn(self, work: StepWork, measured: float) -> None:
        """Take one step that took ``measured`` seconds."""
        # Relative to the prediction, as in the offline fit: relative to the measured time the fast
        # steps among equal ones would count most, and the model would promise too much.
        scale = measured if self.model is None else max(self.model.seconds(work), 1e-3 * measured)
        rows = -(-work.rows // self._tile) * self._tile
        features = (1.0, rows, 0.0, work.requests, work.decode_context, work.prefill_work)
        kind = self._prefilling if work.prefill_work else self._decoding
        ratio = min(measured / scale, self.OUTLIER)
        kind.pending.append([*(value / scale for value in features), ratio])
        self.steps += 1
        if self.steps >= self.MIN_STEPS and (self.steps <= 32 or self.steps % self._every == 0):
            self.model = self._refit()

    def _refit(self) -> StepCostModel:
        for kind in (self._decoding, self._prefilling):
            kind.fold()
        gram = self._decoding.gram + self._prefilling.gram
        moment = self._decoding.moment + self._prefilling.moment
        scale = np.sqrt(np.diag(gram))
        scale[scale == 0] = 1.0
        gram = gram / np.outer(scale, scale)
        # A little ridge keeps features that have not varied yet from trading off at random.
        root = np.linalg.cholesky(gram + 1e-6 * np.eye(len(scale)))
        target = np.linalg.solve(root, moment / scale)
        solution, _ = self._nnls(root.T, target)
        return StepCostModel(tuple(float(c) for c in solution / scale), math.inf, self._tile)


class _Evidence:
    """Normal equations of one kind of steps, with exponential forgetting.

    Attributes:
        gram: Weighted sum of products of features, shape (features, features).
        moment: Weighted sum of features times the relative time, shape (features,).
        pending: Relative features of steps that are not in the sums yet, the relative time last.
    """

    def __init__(self, forgetting: float) -> None:
        self._forgetting = forgetting
        self.gram = np.zeros((len(FEATURES), len(FEATURES)))
        self.moment = np.zeros(len(FEATURES))
        self.pending: list[list[float]] = []

    def fold(self) -> None:
        """Add the pending steps to the sums, all at once to spare work per step."""
        if not self.pending:
            return
        pending = np.array(self.pending)
        rows, ratios = pending[:, :-1], pending[:, -1]
        weights = self._forgetting ** np.arange(len(rows) - 1, -1, -1)
        kept = self._forgetting ** len(rows)
        self.gram = kept * self.gram + (rows * weights[:, None]).T @ rows
        self.moment = kept * self.moment + (weights * ratios) @ rows
        self.pending = []
