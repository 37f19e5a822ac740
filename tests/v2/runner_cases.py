"""Stock vLLM on model runner V2, and V2's warm-up with plug-ins on."""

import pytest

from tests.models import make_engine, scheduler_of, tiny_llama, worker_of
from vllm_plugins import engine_args

PROMPTS = [[(7 * i + j * j) % 500 for j in range(n)] for i, n in enumerate((3, 163, 70))]
WORKER = "vllm_plugins.engine.worker_host.PluginWorker"
# Each computes what stock does, and has a part in the worker.
EXACT = {
    "host": {"worker_cls": WORKER},
    "kvshare": engine_args("kvshare", recompute_min=1, recompute_max=1),
    "hip": engine_args("hip", dense_threshold=512, dense_layers=[]),
}


def engine(**arguments):
    return make_engine(
        tiny_llama(layers=4), max_num_batched_tokens=128, max_num_seqs=4, block_size=32, **arguments
    )


def greedy(llm):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    inputs = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return [list(x.outputs[0].token_ids) for x in llm.generate(inputs, params, use_tqdm=False)]


def warm_up(llm, tokens=40):
    """Run the steps of requests that no scheduler knows, as the worker's start does on CUDA.

    Greedy and without a grammar: kernels for the rest are some that the interpreter cannot run.

    Args:
        llm: The engine.
        tokens: Of the last step, nearly all of one prompt; of 16 on CUDA, which fill no block.
    """
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup, warmup_kernels

    worker = worker_of(llm)
    does = worker.model_runner, worker.execute_model, lambda _: worker.sample_tokens(None)
    with pytest.MonkeyPatch.context() as patch:
        plain = SamplingParams(temperature=0, max_tokens=8)
        patch.setattr(SamplingParams, "for_sampler_warmup", staticmethod(lambda: plain))
        warmup_kernels(*does)
    assert run_mixed_prefill_decode_warmup(*does, tokens)


@pytest.fixture(scope="module")
def stock():
    """V2's answers, which are V1's."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    answers = []
    for wanted in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(wanted)))
            with engine() as llm:
                assert isinstance(worker_of(llm).model_runner, GPUModelRunner) is wanted
                answers.append(greedy(llm))
    assert answers[0] == answers[1]
    return answers[1]


@pytest.mark.parametrize("arguments", EXACT.values(), ids=EXACT)
def test_warm_up_leaves_nothing(stock, arguments):
    with engine(**arguments) as llm:
        warm_up(llm)
        # A second time: the first one's requests are the same ones again.
        warm_up(llm)
        assert greedy(llm) == stock
        pool = scheduler_of(llm).kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
