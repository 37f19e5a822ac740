"""HiP attention with the compiled CPU kernels on model runner V2."""

import pytest

from tests.engine.test_hip import BOTH, NEUTRAL, SMALL, assert_idle, engine, preemptions

TOKENS = 18
PROMPTS = [[(7 * i + j * j) % 500 for j in range(n)] for i, n in enumerate((5, 60, 190, 310))]


def logprobs(llm, prompts):
    """Greedy answers: each request's tokens, and their log-probabilities."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = [x.outputs[0] for x in llm.generate(inputs, params, use_tqdm=False)]
    return [(list(x.token_ids), x.cumulative_logprob) for x in found]


def assert_same(found, wanted):
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
    assert [p for _, p in found] == pytest.approx([p for _, p in wanted], abs=1e-3)


@pytest.fixture(scope="module")
def stock():
    with engine() as llm:
        return logprobs(llm, PROMPTS)


def test_dense_below_the_threshold_equals_stock_also_when_preempted(stock):
    # All prompts twice take 38 blocks, and all but two requests then need another.
    few = {"block_size": 32, "num_gpu_blocks_override": 40, "max_model_len": 512}
    with engine(NEUTRAL, enable_prefix_caching=False, **few) as llm, preemptions(llm) as preempted:
        assert_same(logprobs(llm, [*PROMPTS, *PROMPTS]), stock * 2)
        assert preempted
        assert_idle(llm)


@pytest.mark.parametrize("options", [SMALL, BOTH], ids=["decodes", "both"])
def test_kept_selections_stay_with_their_requests(stock, options):
    with engine(options, enable_prefix_caching=False) as llm:
        alone = [logprobs(llm, [prompt])[0] for prompt in PROMPTS]
        # Sparse attention was at work.
        assert alone[3][1] != pytest.approx(stock[3][1], abs=1e-2)
        assert_same(logprobs(llm, PROMPTS), alone)
        # Their states have other rows now, and requests end before others of the same batch.
        assert_same(logprobs(llm, [*PROMPTS[::-1], *PROMPTS]), [*alone[::-1], *alone])
        assert_idle(llm)
