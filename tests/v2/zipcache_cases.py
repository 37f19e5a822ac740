"""ZipCache on model runner V2: with compiled CPU kernels, and CUDA's backend, interpreted.

Which request a row is, V2 tells nobody; nothing here asks: the worker follows the scheduler's
output, and kernels find a row's part by the block that it writes.
"""

import pytest
import torch

from tests.engine.test_zipcache import assert_idle, counted, engine, greedy, life
from tests.models import worker_of
from tests.unit import zipcache_triton_backend as cuda
from tests.v2.resumed import resumed_answer, resumptions
from vllm_plugins.attention_backends.zipcache.cuda_backend import ZipCacheCudaImpl
from vllm_plugins.attention_backends.zipcache.plugin import ZipCachePlugin

TOKENS = 12
PROMPTS = [[(7 * i + j * j) % 500 for j in range(n)] for i, n in enumerate((1, 60, 64, 200, 300))]


@pytest.fixture(scope="module")
def stock():
    with engine() as llm:
        return [greedy(llm, [prompt], TOKENS)[0] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def packed(stock):
    with engine({}, max_num_seqs=8) as llm:
        yield llm


def mixed_warm_up(llm):
    """Run steps of requests that no scheduler knows, as the worker's start does on CUDA."""
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

    worker = worker_of(llm)
    runner = worker.model_runner
    assert run_mixed_prefill_decode_warmup(runner, worker.execute_model, worker.sample_tokens, 200)


def test_it_is_v2(packed):
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    assert isinstance(worker_of(packed).model_runner, GPUModelRunner)


def test_what_stays_within_a_block_and_a_prompts_first_token_equal_stock(packed, stock):
    assert greedy(packed, [PROMPTS[0]], TOKENS)[0] == stock[0]
    for prompt, wanted in zip(PROMPTS, stock, strict=True):
        assert greedy(packed, [prompt], 1)[0] == wanted[:1]
    assert_idle(packed)


def test_a_batch_answers_as_each_request_alone_also_after_a_warm_up(packed):
    alone = []
    for prompt in PROMPTS:
        alone += greedy(packed, [prompt], TOKENS)
        packed.reset_prefix_cache()
    # Before any request in a server; so nothing may depend on what it leaves, nor is it counted.
    sealed = counted(packed, "sealed_blocks_total"), life(packed).sealed["ended"]
    mixed_warm_up(packed)
    # Where ranks share experts, those without work run steps of no requests.
    worker_of(packed).execute_dummy_batch()
    assert counted(packed, "sealed_blocks_total") == sealed[0]
    assert life(packed).sealed["ended"] > sealed[1]
    assert greedy(packed, PROMPTS, TOKENS) == alone
    assert life(packed).sealed["prompt"] > 0 < life(packed).sealed["decode"]
    assert_idle(packed)
    # Their states have other rows now.
    assert greedy(packed, PROMPTS[::-1], TOKENS) == alone[::-1]
    assert_idle(packed)


def test_preempted_requests_go_on_as_new_ones(stock):
    """V2 hears of them anew, with what they had generated as part of the prompt."""
    few = {"num_gpu_blocks_override": 9, "max_model_len": 400, "max_num_seqs": 8}
    few["enable_prefix_caching"] = False
    with engine({"decode_score": "accumulate"}, **few) as llm:
        with resumptions(llm) as seen:
            together = greedy(llm, PROMPTS, TOKENS)
        assert seen
        for prompt, found in zip(PROMPTS, together, strict=True):
            alone = resumed_answer(prompt, seen, TOKENS, lambda x: greedy(llm, [x], TOKENS)[0])
            assert found == alone
        assert_idle(llm)


def test_cudas_backend_answers_as_the_cpus(packed):
    """Tables on the device, states and Triton kernels, from V2's block tables and slots."""
    from vllm.distributed import cleanup_dist_env_and_memory

    packed.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    with cuda.engine() as llm:
        tokens, logprobs = cuda.greedy(llm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ZipCachePlugin.backends, "cpu", f"{cuda.__name__}.Backend")
        patch.setattr(ZipCacheCudaImpl, "backend", staticmethod(lambda *_: cuda.Packed))
        with cuda.engine() as llm:
            found = cuda.greedy(llm)
            [listener] = worker_of(llm).plugin_listeners
            assert torch.equal(listener._tables.state, listener._life.state)
            assert listener._life.sealed["prompt"] > 0
            cuda.greedy(llm, 1)
    assert found[0] == tokens
    assert torch.allclose(found[1], logprobs, atol=1e-4)
