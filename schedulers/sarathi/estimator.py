"""Predicted step times: a profiled model with one online correction, or one learnt online."""

from __future__ import annotations

from collections.abc import Callable

from vllm_plugins.engine.cost_model import Correction, OnlineFit, Spread, StepCostModel, StepWork


class StepTimeEstimator:
    """Predicts the time of a step and learns from every step that ran.

    With a profile, its model is kept and one factor ``g`` follows the machine; without one, the
    model itself is fitted to the steps that are served.

    Args:
        profiled: The profile's model, or None to learn one.
        tile: Rows are rounded up to a multiple of this.
        online: Whether to learn at all.
    """

    def __init__(self, profiled: StepCostModel | None, tile: int, online: bool) -> None:
        self._profiled = profiled
        self._fit = OnlineFit(tile) if profiled is None and online else None
        self._correction = Correction() if profiled is not None and online else None
        self._spread = Spread() if online else None

    @property
    def correction(self) -> float:
        """The factor ``g``; 1 where nothing is corrected."""
        return self._correction.g if self._correction else 1.0

    @property
    def spread(self) -> float:
        """Factor within which of the prediction 99 of 100 steps with prefill stay."""
        return self._spread.value if self._spread else 1.0

    def predictor(self) -> Callable[[StepWork], float] | None:
        """Return the prediction in seconds as of now; None before there is anything to go by."""
        model = self._profiled or (self._fit.model if self._fit else None)
        if model is None:
            return None
        g = self.correction
        return lambda work: g * model.seconds(work)

    def learn(self, work: StepWork, measured: float) -> None:
        """Take a step that took ``measured`` seconds."""
        predict = self.predictor()
        if self._spread is not None and predict is not None and work.prefill_work:
            self._spread.learn(predict(work), measured)
        if self._fit is not None:
            self._fit.learn(work, measured)
        elif self._correction is not None and self._profiled is not None:
            self._correction.learn(self._profiled.seconds(work), measured)
