"""ZipCache's CUDA backend in the real engine, interpreted on CPU; `test_zipcache_triton` runs it.

All layers are packed, so FlashAttention, which needs CUDA, serves none.
"""

from contextlib import contextmanager

import pytest
import torch
from vllm import SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.core.sched.output import SchedulerOutput

from tests.models import make_engine, scheduler_of, tiny_llama, worker_of
from tests.unit import hip_kernels  # Makes the interpreter right and fast.
from vllm_plugins import engine_args
from vllm_plugins.attention_backends.zipcache import key_transform
from vllm_plugins.attention_backends.zipcache.batch import RAW
from vllm_plugins.attention_backends.zipcache.cuda_backend import (
    PackedCudaBackend,
    ZipCacheCudaBackend,
    ZipCacheCudaImpl,
    ZipCacheCudaMetadataBuilder,
    _tiles,
)
from vllm_plugins.attention_backends.zipcache.page import PageFormat
from vllm_plugins.attention_backends.zipcache.plugin import ZipCacheOptions, ZipCachePlugin

assert hip_kernels
BLOCK = 32
PROMPTS = [[(7 * i + j * j) % 500 for j in range(n)] for i, n in enumerate((3, 31, 75))]


class Backend(ZipCacheCudaBackend):
    """Stands in for the CPU's."""

    @staticmethod
    def get_name():
        return "CPU_ATTN"


class Packed(PackedCudaBackend):
    """Its layers, packed."""

    bits, salient_ratio, key_salient_ratio = ZipCacheOptions().shares

    @staticmethod
    def get_name():
        return "CPU_ATTN"


@contextmanager
def engine(options=None, **more):
    arguments = {"seed": 0, "max_num_batched_tokens": 64, "block_size": BLOCK, "max_num_seqs": 4}
    arguments |= engine_args("zipcache", **options or {}) | more
    with make_engine(tiny_llama(layers=1), **arguments) as llm:
        yield llm


def greedy(llm, tokens=5):
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1)
    requests = [{"prompt_token_ids": x} for x in PROMPTS]
    answers = [x.outputs[0] for x in llm.generate(requests, params, use_tqdm=False)]
    logprobs = [
        [p[t].logprob for p, t in zip(x.logprobs, x.token_ids, strict=True)] for x in answers
    ]
    return [x.token_ids for x in answers], torch.tensor(logprobs)


def write_bases(path):
    """Write a file of bases for the model, of no particular kind."""
    matrix = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(1))
    fitted = {"model.layers.0.self_attn.attn": (matrix, torch.ones(2, 32))}
    key_transform.write(path, fitted, "tiny")
    return {"key_transform": str(path)}


def blocks_of(llm):
    return worker_of(llm).model_runner.kv_cache_config.num_blocks


@pytest.fixture(scope="module")
def on_cpu():
    with engine() as llm:
        return *greedy(llm), blocks_of(llm)


@pytest.fixture(scope="module")
def llm(on_cpu):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ZipCachePlugin.backends, "cpu", f"{__name__}.Backend")
        patch.setattr(ZipCacheCudaImpl, "backend", staticmethod(lambda *_: Packed))
        with engine() as llm:
            yield llm


def test_it_answers_as_the_cpu_backend_does(llm, on_cpu):
    """Chunked prompts, decodes beside them, blocks that fill and are sealed."""
    tokens, logprobs = greedy(llm)
    [[group]] = worker_of(llm).model_runner.attn_groups
    assert type(group.get_metadata_builder()) is ZipCacheCudaMetadataBuilder
    assert tokens == on_cpu[0]
    assert torch.allclose(logprobs, on_cpu[1], atol=1e-4)


def test_the_cache_holds_as_many_blocks_as_pages_fit(llm, on_cpu):
    page = PageFormat.of(BLOCK, 32, *ZipCacheOptions().shares)
    assert worker_of(llm).model_runner.kv_caches[0].shape[-1] == page.token_bytes
    assert blocks_of(llm) == pytest.approx(on_cpu[2], rel=0.01)


def test_tables_on_the_device_are_those_of_the_host(llm):
    [listener] = worker_of(llm).plugin_listeners
    greedy(llm, 1)
    assert torch.equal(listener._tables.state, listener._life.state)
    assert (listener._life.state <= RAW).any()


def test_a_step_of_no_requests_seals_those_that_have_ended(llm):
    """Servers run one when their last request has ended."""
    [listener] = worker_of(llm).plugin_listeners
    greedy(llm, 1)
    output = SchedulerOutput.make_empty()
    output.finished_req_ids = set(listener._life._requests)
    assert output.finished_req_ids
    scheduler_of(llm).finished_req_ids = set()
    worker_of(llm).execute_model(output)
    assert not listener._life._requests
    assert torch.equal(listener._tables.state, listener._life.state)


def test_keys_in_other_bases_answer_as_on_the_cpu(llm, tmp_path):
    """They are asked for last: two engines at a time there may not be."""
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    bases = write_bases(tmp_path / "keys.safetensors")
    with engine(bases) as other:
        tokens, logprobs = greedy(other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ZipCachePlugin.backends, "cpu", f"{__name__}.Backend")
        patch.setattr(ZipCacheCudaImpl, "backend", staticmethod(lambda *_: Packed))
        with engine(bases) as other:
            [listener] = worker_of(other).plugin_listeners
            assert all(x.memory.transform is not None for x in listener._packed.values())
            found = greedy(other)
    assert found[0] == tokens
    assert torch.allclose(found[1], logprobs, atol=1e-4)


def test_decode_steps_are_captured():
    builder = ZipCacheCudaMetadataBuilder
    assert builder._cudagraph_support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def test_tiles_of_prompts_begin_with_the_last():
    found = _tiles(torch.tensor([1, 3]), torch.tensor([1, 65, 1, 130]), 64)
    assert found.tolist() == [[3, 128], [1, 64], [3, 64], [1, 0], [3, 0]]
