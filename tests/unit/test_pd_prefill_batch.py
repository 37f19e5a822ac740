"""DistServe's batches of whole prompts, and the length ``L_m`` up to which they go."""

import itertools
import json
import math
import random
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm_plugins.engine.cost_model import SATURATED, StepCostModel, saturating_prefill
from vllm_plugins.kv_connectors.pd.prefill_batch import whole_prompts

PROFILES = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "profile"


def batch_by_definition(lengths, most):
    """The longest beginning of the queue that stays within L_m; a longer first prompt alone."""
    fitting = [n for n in range(1, len(lengths) + 1) if sum(lengths[:n]) <= most]
    return lengths[: max(fitting, default=min(1, len(lengths)))]


def test_batches_of_all_short_queues_are_those_of_the_definition():
    for count in range(5):
        for lengths in itertools.product(range(1, 6), repeat=count):
            for most in range(1, 9):
                found = list(whole_prompts(lengths, most))
                assert found == list(batch_by_definition(lengths, most))


@pytest.mark.parametrize("seed", range(20))
def test_random_queues_are_batched_whole_and_in_order(seed):
    draw = random.Random(seed)
    most, left = draw.randrange(64, 2048), [draw.randrange(1, 3000) for _ in range(100)]
    while left:
        batch = list(whole_prompts(iter(left), most))
        assert batch == list(batch_by_definition(left, most))
        assert sum(batch) <= most or len(batch) == 1
        left = left[len(batch) :]


def test_a_batch_looks_no_further_than_the_prompt_that_ends_it():
    queue = iter([3, 4, 5, 6])
    assert list(whole_prompts(queue, 8)) == [3, 4]
    assert list(queue) == [6]


def closed_form(model):
    """The smaller root of ``n / t(n) = SATURATED * max``, for a model without a knee.

    With ``t(n) = A + b n + d n^2 / 2`` tokens per second are most at ``n = sqrt(2 A / d)``, where
    they are ``1 / (b + sqrt(2 A d))``.
    """
    constant, rows, _, requests, _, work = model.coefficients
    base = constant + requests
    slope = (rows + math.sqrt(2 * base * work)) / SATURATED - rows
    return (slope - math.sqrt(slope**2 - 2 * base * work)) / work


def profile(path):
    made = json.loads(path.read_text())
    knee = math.inf if made["knee"] is None else made["knee"]
    return StepCostModel(tuple(made["coefficients"]), knee, made["tile"])


@pytest.mark.parametrize("longest", [2048, 32768])
@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.json")), ids=lambda path: path.stem)
def test_the_saturating_length_of_measured_profiles_is_the_closed_forms(path, longest):
    model = profile(path)
    assert saturating_prefill(model, longest) == math.ceil(closed_form(model))


def test_without_attention_work_the_longest_prompt_is_the_fastest():
    model, longest = StepCostModel((0.01, 1e-4, 0.0, 0.002, 0.0, 0.0)), 4096
    slope = (0.012 / longest + 1e-4) / SATURATED - 1e-4
    assert saturating_prefill(model, longest) == math.ceil(0.012 / slope)


@pytest.mark.parametrize(("knee", "tile"), list(itertools.product([100, 300, 700], [1, 128])))
def test_with_a_knee_and_tiles_no_shorter_prompt_is_as_fast(knee, tile):
    """A step that is bound by memory first: what a GPU's profile looks like."""
    model, longest = StepCostModel((0.012, 4e-6, 9e-5, 2e-5, 1e-8, 1e-9), knee, tile), 8192

    def speed(n):
        rows = -(-n // tile) * tile
        above = 9e-5 * max(0, rows - knee)
        return n / (0.012 + 4e-6 * rows + above + 2e-5 + 1e-9 * n * n / 2)

    found, most = saturating_prefill(model, longest), max(map(speed, range(1, longest + 1)))
    assert speed(found) >= SATURATED * most
    assert max(map(speed, range(1, found))) < SATURATED * most


def test_the_only_length_there_is_saturates():
    assert saturating_prefill(StepCostModel((0.01, 1e-4, 0.0, 0.0, 0.0, 1e-7)), 1) == 1
