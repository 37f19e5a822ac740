"""With a temperature, what is generated has the target's own distribution.

`SPECVLM_DISTRIBUTION_DRAWS` sets how many answers are drawn, and `SPECVLM_DISTRIBUTION_RESULT`
names a file for what was found: benchmarks/results/specvlm_distribution.json has 20,000 draws.
"""

import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from tests.engine.specvlm_engine import engine, prompt
from tests.models import scheduler_of
from vllm_plugins.bench.machine import describe_machine

pytestmark = pytest.mark.engine

MADE = prompt([9, "a", 30])
SAMPLES = int(os.environ.get("SPECVLM_DISTRIBUTION_DRAWS", "2000"))
RESULT = os.environ.get("SPECVLM_DISTRIBUTION_RESULT")
TEMPERATURE = 1.0
VOCABULARY = 64
# The target alone takes the first token of an answer; the two others are drafted in one round.
DRAFTS = 2
TOKENS = 1 + DRAFTS
# A right sampler fails once in ten thousand runs; its seeds are fixed, so it does not.
Z = 3.72


def distributions(llm, behind):
    """Return the target's distribution of the next token behind words after the prompt.

    Args:
        llm: Engine of the target alone.
        behind: Words of each prompt.

    Returns:
        float64, shape (prompts, vocabulary).
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=TEMPERATURE, max_tokens=1, logprobs=VOCABULARY)
    ids = MADE["prompt_token_ids"]
    made = [{**MADE, "prompt_token_ids": [*ids, *words]} for words in behind]
    rows = []
    for result in llm.generate(made, params, use_tqdm=False):
        [seen] = result.outputs[0].logprobs
        rows.append([math.exp(seen[word].logprob) for word in range(VOCABULARY)])
    return np.array(rows)


@pytest.fixture(scope="module")
def exact():
    """The distribution of each token of an answer, over all that may stand before it."""
    found, probable = [], np.ones(1)
    with engine(max_logprobs=VOCABULARY, max_num_seqs=VOCABULARY) as llm:
        for place in range(TOKENS):
            # Every beginning of an answer, in the order of its probability's entry.
            behind = list(itertools.product(range(VOCABULARY), repeat=place))
            following = distributions(llm, behind)
            found.append(probable @ following)
            probable = (probable[:, None] * following).ravel()
    return found


def chi_square(counts, probabilities):
    """Return a chi-square of counts, and its degrees of freedom; rare words are one class."""
    expected = probabilities * counts.sum()
    frequent = expected >= 5
    seen = np.append(counts[frequent], counts[~frequent].sum())
    wanted = np.append(expected[frequent], expected[~frequent].sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    return float(((seen - wanted) ** 2 / wanted).sum()), len(seen) - 1


def chi_square_z(counts, probabilities):
    """Return how many standard deviations a chi-square is above its mean (Wilson-Hilferty)."""
    statistic, degrees = chi_square(counts, probabilities)
    spread = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def test_the_measure_tells_distributions_apart():
    random, even = np.random.default_rng(0), np.full(VOCABULARY, 1 / VOCABULARY)
    other = even * np.linspace(0.8, 1.2, VOCABULARY)
    assert chi_square_z(random.multinomial(SAMPLES, even), even) < Z
    assert chi_square_z(random.multinomial(SAMPLES, other), even) > Z


@pytest.fixture(scope="module")
def report():
    """What is found of each way to sample; written where a file is named."""
    found = {}
    yield found
    if RESULT is not None:
        facts = {
            "command": f"SPECVLM_DISTRIBUTION_DRAWS={SAMPLES} pytest {Path(__file__).name}",
            "machine": describe_machine(),
            "draws": SAMPLES,
            "temperature": TEMPERATURE,
            "z_limit": Z,
            "sampling": found,
        }
        Path(RESULT).write_text(json.dumps(facts, indent=1) + "\n")


def measured(tokens, exact):
    """Return what the tokens at each place of the answers, (answers, places), are compared by."""
    found = []
    for place, probabilities in enumerate(exact):
        counts = np.bincount(tokens[:, place], minlength=VOCABULARY)
        statistic, degrees = chi_square(counts, probabilities)
        distance = float(abs(counts / counts.sum() - probabilities).sum() / 2)
        found.append(
            {
                "chi_square": statistic,
                "degrees": degrees,
                "z": chi_square_z(counts, probabilities),
                "total_variation": distance,
            }
        )
    return found


@pytest.mark.parametrize("sampling", ["greedy", "probabilistic"])
def test_samples_have_the_targets_distribution(exact, sampling, report):
    from vllm import SamplingParams

    options = {
        "draft_sampling": sampling,
        "draft_until_batch": None,
        "num_speculative_tokens": DRAFTS,
    }
    with engine(options, max_num_seqs=64) as llm:
        scheduler, drafted = scheduler_of(llm), []
        original = scheduler.schedule

        def schedule(*args, **kwargs):
            output = original(*args, **kwargs)
            drafted.append(sum(map(len, output.scheduled_spec_decode_tokens.values())))
            return output

        scheduler.schedule = schedule
        params = [
            SamplingParams(temperature=TEMPERATURE, max_tokens=TOKENS + 1, seed=i, ignore_eos=True)
            for i in range(SAMPLES)
        ]
        results = llm.generate([MADE] * SAMPLES, params, use_tqdm=False)
    assert sum(drafted) > SAMPLES
    tokens = np.array([result.outputs[0].token_ids[:TOKENS] for result in results])
    places = measured(tokens, exact)
    report[sampling] = {"drafted": sum(drafted), "places": places}
    assert max(place["z"] for place in places) < Z
