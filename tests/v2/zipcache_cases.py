"""ZipCache on model runner V2: with compiled CPU kernels, and CUDA's backend, interpreted.

Which request a row is, V2 tells nobody; nothing here asks: the worker follows the scheduler's
output, and kernels find a row's part by the block that it writes.
"""

from contextlib import contextmanager

import pytest
import torch

from tests.engine.test_zipcache import assert_idle, counted, engine, greedy, life
from tests.models import worker_of
from tests.unit import zipcache_triton_backend as cuda
from tests.v2.resumed import resumed_answer, resumptions
from tests.v2.runner_cases import warm_up
from vllm_plugins.attention_backends.zipcache.batch import RAW, SEALED
from vllm_plugins.attention_backends.zipcache.cuda_backend import ZipCacheCudaImpl
from vllm_plugins.attention_backends.zipcache.plugin import ZipCachePlugin

TOKENS = 12
# Of a block that waits for its quota, the first of them.
STAGED = 0
# Few enough to be compared after each step.
FEW = {"max_num_seqs": 8, "num_gpu_blocks_override": 40}
PROMPTS = [[(7 * i + j * j) % 500 for j in range(n)] for i, n in enumerate((1, 60, 64, 200, 300))]


@pytest.fixture(scope="module")
def stock():
    with engine() as llm:
        return [greedy(llm, [prompt], TOKENS)[0] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def packed(stock):
    with engine({}, **FEW) as llm:
        yield llm


def layers(llm):
    """Return the memory of all layers."""
    [listener] = worker_of(llm).plugin_listeners
    return [impl.memory for impl in listener._packed.values()]


def kept(llm):
    """Return a copy of all that is kept of requests, the blocks' states first."""
    [listener] = worker_of(llm).plugin_listeners
    parts = [listener._life.state]
    if listener._tables is not None:
        parts += [listener._tables.state, listener._tables.parts]
    for x in layers(llm):
        parts += [x.cache, x.residual, x.residual_sums, x.staging, x.staging_sums]
    return [x.clone() for x in parts]


def spoil(llm):
    """Make all that the layers keep NaN, or bytes that mean nothing."""
    for x in layers(llm):
        x.cache.fill_(0xFF)
        x.staging.fill_(0xAA)
        for part in (x.residual, x.residual_sums, x.staging_sums):
            part.fill_(torch.nan)


def run_dummy(llm, tokens, **shape):
    """Run a batch of no requests; what it computes are numbers, by which experts are chosen."""
    # What nobody writes is NaN then.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        hidden, _ = worker_of(llm).model_runner._dummy_run(tokens, **shape)
    finally:
        torch.use_deterministic_algorithms(False)
    assert hidden.isfinite().all()


@contextmanager
def dummy_batches(llm):
    """Run batches of no requests after each step, as ranks do that share experts with others.

    They leave all that is kept of requests as it is. Yields where blocks of requests were then:
    `RAW`, `STAGED` or `SEALED`.
    """
    step, seen = llm.llm_engine.step, set()

    def step_and_dummies():
        outputs, before = step(), kept(llm)
        worker_of(llm).execute_dummy_batch()
        # As many tokens as other ranks have: of requests that decode, and of prompts.
        run_dummy(llm, 4, uniform_decode=True)
        run_dummy(llm, 25)
        for x, y in zip(before, kept(llm), strict=True):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        held = [block for x in life(llm)._requests.values() for block in x.blocks]
        seen.update(before[0][held].clamp(RAW, STAGED).tolist())
        return outputs

    llm.llm_engine.step = step_and_dummies
    yield seen
    del llm.llm_engine.step


def test_it_is_v2(packed):
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    assert isinstance(worker_of(packed).model_runner, GPUModelRunner)


def test_what_stays_within_a_block_and_a_prompts_first_token_equal_stock(packed, stock):
    assert greedy(packed, [PROMPTS[0]], TOKENS)[0] == stock[0]
    for prompt, wanted in zip(PROMPTS, stock, strict=True):
        assert greedy(packed, [prompt], 1)[0] == wanted[:1]
    assert_idle(packed)


def test_a_batch_answers_as_each_request_alone(packed):
    alone = []
    for prompt in PROMPTS:
        alone += greedy(packed, [prompt], TOKENS)
        packed.reset_prefix_cache()
    assert greedy(packed, PROMPTS, TOKENS) == alone
    assert life(packed).sealed["prompt"] > 0 < life(packed).sealed["decode"]
    assert_idle(packed)
    # Their states have other rows now.
    assert greedy(packed, PROMPTS[::-1], TOKENS) == alone[::-1]
    assert_idle(packed)


def test_dummy_batches_amid_requests_change_nothing(packed):
    wanted = greedy(packed, PROMPTS, TOKENS)
    assert_idle(packed)
    sealed = counted(packed, "sealed_blocks_total")
    with dummy_batches(packed) as seen:
        assert greedy(packed, PROMPTS, TOKENS) == wanted
    assert seen == {RAW, STAGED, SEALED}
    assert counted(packed, "sealed_blocks_total") > sealed
    assert_idle(packed)


def test_nothing_that_a_warm_up_leaves_is_read(stock):
    """Neither memory nor the blocks' life, by an engine whose first requests come after it."""
    found = []
    for is_warm in (False, True):
        with engine({}, **FEW) as llm:
            if is_warm:
                counted_before = counted(llm, "sealed_blocks_total")
                warm_up(llm, 200)
                # A second time: its requests are the same ones again, and have other rows.
                warm_up(llm, 200)
                assert life(llm).sealed["ended"] > 0
                assert counted(llm, "sealed_blocks_total") == counted_before
            spoil(llm)
            answers = greedy(llm, PROMPTS, TOKENS)
            assert life(llm).sealed["decode"] > 0
            found.append((answers, [x.cache.clone() for x in layers(llm)]))
            assert_idle(llm)
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))
    # It stays within a block, so it is exact.
    assert found[1][0][0] == stock[0]


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


@pytest.mark.parametrize("has_bases", [False, True])
def test_cudas_backend_answers_as_the_cpus(packed, has_bases, tmp_path):
    """Tables on the device, states and Triton kernels, from V2's block tables and slots."""
    from vllm.distributed import cleanup_dist_env_and_memory

    packed.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    options = cuda.write_bases(tmp_path / "keys.safetensors") if has_bases else {}
    with cuda.engine(options) as llm:
        tokens, logprobs = cuda.greedy(llm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ZipCachePlugin.backends, "cpu", f"{cuda.__name__}.Backend")
        patch.setattr(ZipCacheCudaImpl, "backend", staticmethod(lambda *_: cuda.Packed))
        with cuda.engine(options, num_gpu_blocks_override=72) as llm:
            warm_up(llm, 60)
            assert life(llm).sealed["ended"] > 0
            spoil(llm)
            with dummy_batches(llm) as seen:
                found = cuda.greedy(llm)
            assert seen == {RAW, STAGED, SEALED}
            [listener] = worker_of(llm).plugin_listeners
            assert torch.equal(listener._tables.state, listener._life.state)
            assert listener._life.sealed["prompt"] > 0
            cuda.greedy(llm, 1)
    assert found[0] == tokens
    assert torch.allclose(found[1], logprobs, atol=1e-4)
