"""The cost model: fits recover what generated the data; online learning follows the machine."""

import math
import random

import numpy as np
import pytest

from vllm_plugins.engine.cost_model import (
    Correction,
    OnlineFit,
    StepCostModel,
    StepWork,
    chunk_work,
    fit,
    report,
)

TRUE = StepCostModel((0.012, 9e-5, 1.5e-4, 4e-5, 1.2e-7, 3e-9), knee=512)


def random_work(source, decode_only=False):
    """A step of running decodes and, mostly, a chunk of a prompt."""
    decodes = source.randrange(0 if not decode_only else 1, 128)
    tokens = 0 if decode_only or source.random() < 0.3 else source.randrange(1, 2048)
    context = decodes * source.randrange(10, 4000)
    prefill = chunk_work(tokens, source.randrange(20_000)) if tokens else 0.0
    return StepWork(max(decodes + tokens, 1), decodes + bool(tokens), context, prefill)


def noisy_steps(count, noise, seed=0, model=TRUE):
    source = random.Random(seed)
    works = [random_work(source) for _ in range(count)]
    return works, [model.seconds(w) * source.gauss(1.0, noise) for w in works]


def test_fit_recovers_the_coefficients():
    works, seconds = noisy_steps(2000, 0.005)
    fitted = fit(works, seconds)
    assert fitted.knee == pytest.approx(TRUE.knee, rel=0.2)
    assert fitted.coefficients == pytest.approx(TRUE.coefficients, rel=0.05)
    quality = report(fitted, *noisy_steps(500, 0.02, seed=1))
    assert quality.r2 > 0.95
    assert quality.median_error < 0.03
    assert quality.median_error <= quality.p90_error <= quality.p99_error


def test_one_regime_stays_one():
    straight = StepCostModel((0.01, 1e-4, 0.0, 2e-5, 1e-7, 2e-9))
    fitted = fit(*noisy_steps(1000, 0.01, model=straight))
    assert math.isinf(fitted.knee)
    assert fitted.coefficients == pytest.approx(straight.coefficients, rel=0.05)


def test_fit_sees_the_tile():
    tiled = StepCostModel((0.01, 1e-4, 0.0, 2e-5, 1e-7, 2e-9), tile=128)
    fitted = fit(*noisy_steps(1000, 0.01, model=tiled), tile=128)
    assert fitted.coefficients == pytest.approx(tiled.coefficients, rel=0.05)
    assert fitted.seconds(StepWork(129)) == fitted.seconds(StepWork(256))


def test_time_never_falls_when_work_is_added():
    fitted = fit(*noisy_steps(300, 0.3))
    assert min(fitted.coefficients) >= 0
    source = random.Random(2)
    for _ in range(200):
        work = random_work(source)
        more = StepWork(
            work.rows + source.randrange(50),
            work.requests + source.randrange(3),
            work.decode_context + source.randrange(1000),
            work.prefill_work + source.randrange(1000),
        )
        assert fitted.seconds(more) >= fitted.seconds(work)


@pytest.mark.parametrize(
    ("works", "seconds", "message"),
    [
        ([StepWork(1)] * 3, [0.1] * 3, "at least 6 steps, got 3"),
        ([StepWork(1)] * 8, [0.1] * 7 + [0.0], "must be positive"),
    ],
)
def test_what_cannot_be_fitted(works, seconds, message):
    with pytest.raises(ValueError, match=message):
        fit(works, seconds)


@pytest.mark.parametrize(("slower", "expected"), [(2.0, 2.0), (0.7, 0.7), (5.0, 2.0), (0.1, 0.5)])
def test_correction_converges_within_its_bounds(slower, expected):
    correction = Correction()
    source = random.Random(0)
    for _ in range(200):
        predicted = TRUE.seconds(random_work(source))
        correction.learn(predicted, slower * predicted * source.gauss(1, 0.02))
    assert correction.g == pytest.approx(expected, rel=0.03)


def test_one_held_up_step_hardly_moves_the_correction():
    correction = Correction()
    correction.learn(0.02, 20.0)
    assert correction.g <= 1.05


def learn(online, steps, seed=0, decode_only=False, slower=1.0, model=TRUE):
    source = random.Random(seed)
    for _ in range(steps):
        work = random_work(source, decode_only)
        online.learn(work, slower * model.seconds(work) * source.gauss(1.0, 0.03))


def errors(model, slower=1.0, true=TRUE):
    works, seconds = noisy_steps(300, 0.0, seed=9, model=true)
    return np.array(
        [abs(model.seconds(w) / (slower * s) - 1) for w, s in zip(works, seconds, strict=True)]
    )


STRAIGHT = StepCostModel((0.012, 1.2e-4, 0.0, 4e-5, 1.2e-7, 3e-9))


def test_online_fit_converges():
    online = OnlineFit()
    learn(online, 300, model=STRAIGHT)
    assert np.median(errors(online.model, true=STRAIGHT)) < 0.05
    assert np.quantile(errors(online.model, true=STRAIGHT), 0.9) < 0.1


def test_online_fit_follows_a_machine_that_slows_down():
    online = OnlineFit()
    learn(online, 1000, model=STRAIGHT)
    learn(online, 3000, seed=1, slower=1.6, model=STRAIGHT)
    assert np.median(errors(online.model, 1.6, STRAIGHT)) < 0.1


def test_a_night_of_decodes_does_not_forget_what_prefills_cost():
    online = OnlineFit()
    learn(online, 500, model=STRAIGHT)
    learn(online, 20_000, seed=1, decode_only=True, model=STRAIGHT)
    assert np.quantile(errors(online.model, true=STRAIGHT), 0.9) < 0.15


def test_nothing_is_predicted_from_too_little():
    online = OnlineFit()
    learn(online, OnlineFit.MIN_STEPS - 1)
    assert online.model is None
    learn(online, 1)
    assert online.model is not None


def test_a_step_that_was_held_up_counts_for_little():
    online = OnlineFit()
    learn(online, 300, model=STRAIGHT)
    for _ in range(3):
        online.learn(StepWork(64, 64, 64_000), 60.0)
    assert np.median(errors(online.model, true=STRAIGHT)) < 0.1
