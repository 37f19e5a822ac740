"""With a temperature, what is generated has the target's own distribution."""

import itertools
import math

import numpy as np
import pytest

from tests.engine.specvlm_engine import engine, prompt
from tests.models import scheduler_of

pytestmark = pytest.mark.engine

MADE = prompt([9, "a", 30])
SAMPLES = 2000
TEMPERATURE = 1.0
# Tokens of the answer that are compared: the first needs no draft, the others are drafted.
TOKENS = 2
# A right sampler fails once in ten thousand runs; its seeds are fixed, so it does not.
Z = 3.72


def distributions(llm, made):
    """Return the target's distribution of the next token after each prompt, (prompts, words)."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=TEMPERATURE, max_tokens=1, logprobs=64)
    rows = []
    for result in llm.generate(made, params, use_tqdm=False):
        [seen] = result.outputs[0].logprobs
        rows.append([math.exp(seen[word].logprob) for word in range(64)])
    return np.array(rows)


@pytest.fixture(scope="module")
def exact():
    """The distribution of the first token, and that of the second over all first ones."""
    with engine(max_logprobs=64) as llm:
        [first] = distributions(llm, [MADE])
        words = range(64)
        ids = MADE["prompt_token_ids"]
        second = distributions(llm, [{**MADE, "prompt_token_ids": [*ids, w]} for w in words])
    return first, first @ second


def chi_square_z(counts, probabilities):
    """Return how many standard deviations a chi-square is above its mean (Wilson-Hilferty)."""
    expected = probabilities * counts.sum()
    frequent = expected >= 5
    seen = np.append(counts[frequent], counts[~frequent].sum())
    wanted = np.append(expected[frequent], expected[~frequent].sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    degrees = len(seen) - 1
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    spread = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def test_the_measure_tells_distributions_apart():
    random, even = np.random.default_rng(0), np.full(64, 1 / 64)
    other = even * np.linspace(0.8, 1.2, 64)
    assert chi_square_z(random.multinomial(SAMPLES, even), even) < Z
    assert chi_square_z(random.multinomial(SAMPLES, other), even) > Z


@pytest.mark.parametrize("sampling", ["greedy", "probabilistic"])
def test_samples_have_the_targets_distribution(exact, sampling):
    from vllm import SamplingParams

    options = {"draft_sampling": sampling, "draft_until_batch": None, "num_speculative_tokens": 2}
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
    for place, probabilities in zip(itertools.count(), exact, strict=False):
        counts = np.bincount(tokens[:, place], minlength=64)
        assert chi_square_z(counts, probabilities) < Z
