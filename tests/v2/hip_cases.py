"""HiP on model runner V2: with compiled CPU kernels, and CUDA's backend, interpreted."""

import pytest
import torch

from tests.engine.test_hip import (
    BOTH,
    NEUTRAL,
    SMALL,
    _builder,
    _values,
    assert_idle,
    engine,
    preemptions,
)
from tests.models import worker_of
from tests.unit import hip_triton_backend as cuda
from vllm_plugins.attention_backends.hip.cuda_batch import DevicePlanner
from vllm_plugins.attention_backends.hip.plugin import HipPlugin

TOKENS = 18
PROMPTS = [[(7 * i + j * j) % 500 for j in range(n)] for i, n in enumerate((5, 60, 190, 310))]


def logprobs(llm, prompts):
    """Greedy answers: each request's tokens, and their log-probabilities."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = [x.outputs[0] for x in llm.generate(inputs, params, use_tqdm=False)]
    return [(list(x.token_ids), x.cumulative_logprob) for x in found]


def warm_up(llm, tokens=200):
    """Run steps of requests that no scheduler knows, as the worker's start does on CUDA."""
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

    worker = worker_of(llm)
    runner = worker.model_runner
    run = worker.execute_model, worker.sample_tokens
    assert run_mixed_prefill_decode_warmup(runner, *run, tokens)


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
        sparse, builder = ("hip_decode_queries_total", "sparse"), _builder(llm)
        before = _values(builder)[sparse]
        alone = [logprobs(llm, [prompt])[0] for prompt in PROMPTS]
        counted = _values(builder)
        assert counted[sparse] - before == len(PROMPTS) * (TOKENS - 1)
        # Before any request in a server; nothing is counted of it, nor does anything depend on it.
        warm_up(llm)
        worker_of(llm).execute_dummy_batch()
        assert _values(builder) == counted
        # Sparse attention was at work.
        assert alone[3][1] != pytest.approx(stock[3][1], abs=1e-2)
        assert_same(logprobs(llm, PROMPTS), alone)
        # Their states have other rows now, and requests end before others of the same batch.
        assert_same(logprobs(llm, [*PROMPTS[::-1], *PROMPTS]), [*alone[::-1], *alone])
        assert_idle(llm)


def test_cudas_backend_answers_as_the_cpus():
    """Query blocks and kept rows are found on the device, from V2's block tables and slots."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    with cuda.engine() as llm:
        tokens, wanted = cuda.greedy(llm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(HipPlugin.backends, "cpu", f"{cuda.__name__}.Backend")
        # All rows are sparse, so that there is nothing for the stock kernel, which needs CUDA.
        patch.setattr(FlashAttentionImpl, "forward", lambda *_: None)
        with cuda.engine() as llm:
            planner = cuda.builder_of(llm)._planner
            assert type(planner) is DevicePlanner
            for graphs in (False, True):
                if graphs:
                    # As steps of single tokens are described where they are replayed.
                    planner._blocks = torch.full((8, 6), -7, dtype=torch.int32)
                    planner._lengths = torch.full((8,), -7, dtype=torch.int32)
                found, logprobs = cuda.greedy(llm)
                assert found == tokens
                assert torch.allclose(logprobs, wanted, atol=1e-4)
            assert (planner._blocks[: len(tokens)] != -7).all()
            counted = counts(cuda.builder_of(llm))
            warm_up(llm, 100)
            worker_of(llm).execute_dummy_batch()
            assert counts(cuda.builder_of(llm)) == counted


def counts(builder):
    """Metrics of CUDA's backend, once all that is on its way from the device is here."""
    meter = builder._planner._meter
    assert not meter._waiting
    return {key: slot.value for key, slot in meter._meter._metrics._slots.items()}
