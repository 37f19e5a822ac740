"""The more is recomputed, the nearer an answer's distribution is to a full prefill's."""

from pathlib import Path
from random import Random

import numpy as np
import pytest
from reader_data import VOCABULARY, later_prompt, make_prompt

import vllm_plugins
from tests.models import make_engine

pytestmark = pytest.mark.engine

READER = Path(__file__).resolve().parents[1] / "fixtures" / "reader"
BASE = "kvshare:min_run=16,min_reuse=32,decode_interval=0,recompute_min=0,"


@pytest.fixture(scope="module")
def cases():
    """Pairs of an earlier prompt and one with changed facts, each asked four questions."""
    rng, found = Random(5), []
    for _ in range(5):
        earlier = make_prompt(rng)
        later = later_prompt(rng, earlier)
        asked = rng.sample([q for q in later.questions if q.hops == 2], 4)
        found.append((earlier.ids, [[*later.ids, *question.tokens] for question in asked]))
    return found


def distributions(cases, spec=None):
    """Return log-probabilities of every answer, float64, shape (answers, vocabulary)."""
    from vllm import SamplingParams

    extra = vllm_plugins.engine_args(spec) if spec else {}
    kept = {"kv_transfer_params": {"kvshare": {"store": False}}}
    params = SamplingParams(max_tokens=1, logprobs=len(VOCABULARY), extra_args=kept)
    one = SamplingParams(max_tokens=1)
    rows = []
    with make_engine(READER, block_size=32, max_logprobs=len(VOCABULARY), **extra) as llm:
        for stored, asked in cases:
            if spec:
                llm.generate([{"prompt_token_ids": stored}], one, use_tqdm=False)
            inputs = [{"prompt_token_ids": prompt} for prompt in asked]
            for output in llm.generate(inputs, params, use_tqdm=False):
                [found] = output.outputs[0].logprobs
                rows.append([found[token].logprob for token in range(len(VOCABULARY))])
            llm.reset_prefix_cache(reset_connector=bool(spec))
    return np.array(rows)


def test_divergence_falls_with_what_is_recomputed_and_dhd_chooses_better_than_chance(cases):
    full = distributions(cases)

    def mean_divergence(rule, most):
        blended = distributions(cases, f"{BASE}selector={rule},recompute_max={most}")
        return (np.exp(full) * (full - blended)).sum(1).mean()

    dhd = [mean_divergence("dhd", most) for most in (0, 0.02, 0.1)]
    assert dhd[0] > dhd[1] > dhd[2]
    # What is left are a few tokens' worth of other context.
    assert dhd[2] < 0.01 < 1 < dhd[0]
    assert mean_divergence("random", 0.1) > 10 * dhd[2]
