"""Model runner V2 with asynchronous scheduling, as on CUDA: a step is scheduled while one runs.

vLLM's CPU platform turns it off. Here it stays as the configuration had it: steps are scheduled
ahead and their results come later, though the device does not work meanwhile.
"""

import pytest

from tests.engine.test_hip import SMALL
from tests.models import make_engine, preemptions, scheduler_of, tiny_llama, worker_of
from tests.v2.resumed import resumed_answer, resumptions
from vllm_plugins import engine_args

TOKENS = 12
DOCS = [[(11 * i + 3 * j * (i + 1)) % 500 for j in range(120 + 7 * i)] for i in range(3)]
PROMPTS = [
    [token for i in order for token in DOCS[i]] + [7 * last, 3]
    for last, order in enumerate([(0, 1), (1, 0), (2,), (0, 2, 1), (1,)])
]
ENGINE = {"max_num_batched_tokens": 128, "max_num_seqs": 4, "block_size": 32, "max_model_len": 448}
PLUGINS = {
    "policies": engine_args("sarathi:token_budget=64", "spf"),
    "kvshare": engine_args("kvshare:recompute_min=1,recompute_max=1,fix_tokens_per_step=100"),
    "hip": engine_args("hip:dense_threshold=448"),
}
# Where answers differ from stock's. Prompts are read whole, as they are when each is alone.
APPROXIMATE = {
    name: {"enable_prefix_caching": False, "max_num_batched_tokens": 2048, **chosen}
    for name, chosen in (
        ("hip", engine_args("hip", **SMALL)),
        ("zipcache", engine_args("zipcache")),
    )
}


@pytest.fixture(scope="module", autouse=True)
def asynchronous():
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def keep(config):
        wanted = config.scheduler_config.async_scheduling
        check(config)
        config.scheduler_config.async_scheduling = wanted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(keep))
        yield


def engine(*, ahead=True, **arguments):
    return make_engine(tiny_llama(layers=4), async_scheduling=ahead, **ENGINE | arguments)


def answers(llm, prompts=PROMPTS, stops=None):
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, stop_token_ids=stop)
        for stop in stops or [None] * len(prompts)
    ]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, params, use_tqdm=False)


def greedy(llm, prompts=PROMPTS, stops=None):
    return [list(x.outputs[0].token_ids) for x in answers(llm, prompts, stops)]


@pytest.fixture(scope="module")
def stock():
    with engine(ahead=False) as llm:
        return greedy(llm)


@pytest.mark.parametrize("name", PLUGINS)
def test_answers_are_stocks_also_when_preempted(stock, name):
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    # One block is padding, and the first two answers end with nine each.
    with engine(num_gpu_blocks_override=18, **PLUGINS[name]) as llm:
        assert isinstance(scheduler_of(llm), AsyncScheduler)
        assert worker_of(llm).model_runner.vllm_config.max_concurrent_batches == 2
        [first], [second] = answers(llm, PROMPTS[:1]), answers(llm, PROMPTS[1:2])
        assert [list(x.outputs[0].token_ids) for x in (first, second)] == stock[:2]
        # Made of the first one's texts, in another order.
        assert (second.num_cached_tokens > 200) == (name == "kvshare")
        with preemptions(llm) as seen:
            assert greedy(llm) == stock
        assert seen
        pool = scheduler_of(llm).kv_cache_manager.block_pool
        greedy(llm, [[1, 2, 3]])
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


@pytest.mark.parametrize("name", APPROXIMATE)
def test_answers_are_those_of_each_request_alone_also_when_preempted(name):
    with engine(num_gpu_blocks_override=18, **APPROXIMATE[name]) as llm:
        assert worker_of(llm).model_runner.vllm_config.max_concurrent_batches == 2
        with resumptions(llm) as seen:
            together = greedy(llm)
        assert seen
        for prompt, found in zip(PROMPTS, together, strict=True):
            assert found == resumed_answer(prompt, seen, TOKENS, lambda x: greedy(llm, [x])[0])
        # A token that ends an answer is known when the next step has been scheduled.
        few = [PROMPTS[0][:60], PROMPTS[2], PROMPTS[4]]
        alone = [greedy(llm, [prompt])[0] for prompt in few]
        stops = [[answer[at]] for answer, at in zip(alone, (2, 5, 8), strict=True)]
        short = [x[: x.index(stop) + 1] for x, [stop] in zip(alone, stops, strict=True)]
        assert greedy(llm, few, stops) == short
        pool = scheduler_of(llm).kv_cache_manager.block_pool
        greedy(llm, [[1, 2, 3]])
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
