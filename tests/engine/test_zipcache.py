"""ZipCache on the real engine."""

import random

import pytest

from tests.models import (
    make_engine,
    plugin_samples,
    preemptions,
    scheduler_of,
    tiny_llama,
    worker_of,
)
from vllm_plugins import engine_args
from vllm_plugins.attention_backends.zipcache.metrics import BlockMeter
from vllm_plugins.attention_backends.zipcache.page import PageFormat
from vllm_plugins.attention_backends.zipcache.plugin import ZipCacheOptions

pytestmark = pytest.mark.engine

BLOCK = 64
LENGTHS = (1, 5, 63, 64, 65, 200, 511, 900)
PROMPTS = [[(7 * i + j * j) % 500 for j in range(n)] for i, n in enumerate(LENGTHS)]
# Bytes of a token and head in float32.
STOCK_TOKEN = 2 * 32 * 4
TOKENS = 70


def engine(options=None, **arguments):
    plugin = {} if options is None else engine_args("zipcache", **options)
    return make_engine(
        tiny_llama(layers=4), seed=0, block_size=BLOCK, **plugin, **{"max_num_seqs": 16} | arguments
    )


def greedy(llm, prompts, tokens=TOKENS, **sampling):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **sampling)
    requests = [{"prompt_token_ids": p} for p in prompts]
    return [x.outputs[0].token_ids for x in llm.generate(requests, params, use_tqdm=False)]


def life(llm):
    [listener] = worker_of(llm).plugin_listeners
    return listener._life


def counted(llm, name):
    """Return a metric of this engine; others of this process have other models' names."""
    model = str(llm.llm_engine.vllm_config.model_config.served_model_name)
    return sum(
        s.value
        for s in plugin_samples()
        if s.name == f"vllm_plugins:zipcache_{name}" and s.labels["model_name"] == model
    )


def step_idle(llm):
    """Let the worker hear that the last requests have ended."""
    from vllm.v1.core.sched.output import SchedulerOutput

    output = SchedulerOutput.make_empty()
    output.finished_req_ids = set(scheduler_of(llm).finished_req_ids)
    life(llm).begin_step(output)


def assert_idle(llm):
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    # One block is vLLM's own, for padding.
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    step_idle(llm)
    blocks = life(llm)
    assert not blocks._requests and not blocks._staged and not blocks._prompts
    assert len(blocks._free_rows) == blocks.options.rows
    assert len(blocks._free_staging) == blocks.options.staged
    llm.reset_prefix_cache()


@pytest.fixture(scope="module")
def stock():
    """Stock vLLM's answers to all prompts, and the number of its cache blocks."""
    with engine() as llm:
        return {
            "answers": [greedy(llm, [p])[0] for p in PROMPTS],
            "blocks": worker_of(llm).model_runner.kv_cache_config.num_blocks,
        }


@pytest.fixture(scope="module")
def packed(stock):
    with engine({}) as llm:
        yield llm


def test_the_cache_holds_as_many_blocks_as_pages_fit(packed, stock):
    page = PageFormat.of(BLOCK, 32, *ZipCacheOptions().shares)
    runner = worker_of(packed).model_runner
    assert runner.kv_caches[0].shape[-1] == page.token_bytes
    assert runner.kv_cache_config.num_blocks == stock["blocks"] * STOCK_TOKEN // page.token_bytes
    assert sum(x.nbytes for x in runner.kv_caches) <= 2**30


def test_what_stays_within_a_block_equals_stock(packed, stock):
    """Keys and values of an unfilled block are read as they came."""
    for prompt, wanted in zip(PROMPTS, stock["answers"], strict=True):
        # The token that fills a block is still seen exactly by itself.
        count = BLOCK - len(prompt)
        if count > 0:
            assert greedy(packed, [prompt], count)[0] == wanted[:count]
    assert life(packed).sealed["prompt"] == 0
    assert_idle(packed)


def test_a_prompts_first_token_equals_stock(packed, stock):
    """A prompt in one chunk is attended to as it came."""
    for prompt, wanted in zip(PROMPTS, stock["answers"], strict=True):
        assert greedy(packed, [prompt], 1)[0] == wanted[:1]
    assert_idle(packed)


def one_by_one(llm):
    """Return the answers to all prompts, none of which finds another's blocks."""
    answers = []
    for prompt in PROMPTS:
        answers += greedy(llm, [prompt])
        llm.reset_prefix_cache()
    return answers


def test_a_batch_answers_as_each_request_alone(packed):
    alone = one_by_one(packed)
    assert greedy(packed, PROMPTS) == alone
    assert_idle(packed)
    assert greedy(packed, PROMPTS[::-1]) == alone[::-1]
    assert_idle(packed)


def test_a_hit_of_the_prefix_cache_reads_sealed_blocks_and_leaves_them(packed):
    prompt = [*PROMPTS[-1][: 12 * BLOCK], 5]
    greedy(packed, [prompt])
    cache = worker_of(packed).model_runner.kv_caches[0]
    before = cache.clone()
    [output] = packed.generate([{"prompt_token_ids": prompt}], _greedy(TOKENS), use_tqdm=False)
    assert output.num_cached_tokens == 12 * BLOCK
    # The tail's own blocks are written, and one of them is full.
    assert (cache != before).flatten(1).any(1).sum() <= 2
    # Hits do not move what they read: the next one gives the same answer.
    assert greedy(packed, [prompt])[0] == output.outputs[0].token_ids
    assert_idle(packed)


def _greedy(tokens):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def test_aborts_leave_nothing(packed):
    from vllm import SamplingParams

    engine = packed.llm_engine
    for i, prompt in enumerate(PROMPTS):
        params = SamplingParams(max_tokens=50, ignore_eos=True)
        engine.add_request(f"gone-{i}", {"prompt_token_ids": prompt}, params)
    for i in range(len(PROMPTS)):
        engine.step()
        engine.abort_request([f"gone-{i}"])
    while engine.has_unfinished_requests():
        engine.step()
    assert_idle(packed)


def converse(llm, turns, tokens, beside=()):
    """Stream the turns of a session, other requests beside it; return its answer to each."""
    from vllm.sampling_params import RequestOutputKind

    engine, core, said = llm.llm_engine, llm.llm_engine.engine_core, []

    def add(name, prompt, resumable, count):
        params = _greedy(count)
        params.output_kind = RequestOutputKind.DELTA
        request = engine.input_processor.process_inputs(
            name, {"prompt_token_ids": [*prompt]}, params, ("generate",), resumable=resumable
        )
        core.add_request(request)

    for i, prompt in enumerate(beside):
        add(f"beside-{i}", prompt, False, TOKENS)
    for turn in turns:
        add("session", turn, True, tokens)
        wanted = len(said) + tokens
        while len(said) < wanted:
            outputs = [x for x in core.get_output().outputs if x.request_id == "session"]
            said += [token for x in outputs for token in x.new_token_ids]
    add("session", [0], False, tokens)
    while scheduler_of(llm).requests:
        core.get_output()
    core.get_output()
    llm.reset_prefix_cache()
    return [said[i : i + tokens] for i in range(0, len(said), tokens)]


def test_a_session_whose_input_is_streamed_answers_within_a_block_as_whole_prompts_are(packed):
    """Its next turn comes as a new request of a name that the worker knows already."""
    turns, prompt = [PROMPTS[1], PROMPTS[5][:14], PROMPTS[6][:9]], []
    for turn, answer in zip(turns, converse(packed, turns, 9), strict=True):
        prompt += turn
        assert len(prompt) + 9 <= BLOCK
        assert answer == greedy(packed, [prompt], 9)[0]
        # What a turn ends with has not been computed, and is dropped.
        prompt += answer[:-1]
    assert_idle(packed)


def test_a_long_session_answers_beside_others_as_it_does_alone(packed):
    turns = [PROMPTS[5], PROMPTS[5][:40], PROMPTS[4], PROMPTS[1]]
    alone = converse(packed, turns, 30)
    assert alone[0] == greedy(packed, [PROMPTS[5]], 30)[0]
    packed.reset_prefix_cache()
    # Others of the same prompt would be read from the prefix cache, packed.
    assert converse(packed, turns, 30, [*PROMPTS[:5], *PROMPTS[6:]]) == alone
    assert_idle(packed)


def test_metrics_move(packed):
    sealed = counted(packed, "sealed_blocks_total")
    greedy(packed, [PROMPTS[-1]])
    # 14 blocks of the prompt, and one that is filled by what follows.
    assert counted(packed, "sealed_blocks_total") >= sealed + 15
    page = PageFormat.of(BLOCK, 32, *ZipCacheOptions().shares)
    assert counted(packed, "token_bytes") == 4 * 2 * page.token_bytes


def test_later_stages_of_a_pipeline_count_nothing(packed, monkeypatch):
    """They do what the first one does, and values of an engine's processes are added up."""
    from vllm.distributed import get_pp_group

    config = packed.llm_engine.vllm_config
    assert BlockMeter(config)._metrics is not None
    monkeypatch.setattr(get_pp_group(), "ranks", [get_pp_group().rank - 1])
    assert BlockMeter(config)._metrics is None


# Values' and keys'.
TWO_QUOTAS = {"salient_ratio": 0.3, "key_salient_ratio": 0.8}
TIGHT = {"num_gpu_blocks_override": 24, "max_num_batched_tokens": 8192, "max_model_len": 1024}


@pytest.fixture(scope="module")
def tight(packed):
    """A pool of few blocks, so that requests are preempted and blocks pass from hand to hand."""
    from vllm.distributed import cleanup_dist_env_and_memory

    packed.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    options = {"skip_layers": [0], "decode_score": "accumulate", **TWO_QUOTAS}
    with engine(options, **TIGHT) as llm:
        yield llm


def test_skipped_layers_keep_their_own_cache(tight):
    caches = worker_of(tight).model_runner.kv_caches
    page = PageFormat.of(BLOCK, 32, "4/2", *TWO_QUOTAS.values())
    assert page.quotas == (51, 19)
    assert [x.shape[-1] for x in caches] == [64, *[page.token_bytes] * 3]


def test_blocks_that_pass_from_hand_to_hand_change_no_answer(tight):
    """Each request alone, then all at once in a pool that is too small for them.

    A request that is preempted reads its prompt anew, on what it has sealed, so it may go on
    differently from there.
    """
    rng = random.Random(1)
    prompts = [[rng.randrange(500) for _ in range(rng.randrange(40, 400))] for _ in range(8)]
    alone = []
    for prompt in prompts:
        alone += greedy(tight, [prompt], 90)
        tight.reset_prefix_cache()
    with preemptions(tight) as seen:
        together = greedy(tight, prompts, 90)
    assert seen
    for prompt, one, other in zip(prompts, alone, together, strict=True):
        lost = [n for request, n in seen if request.prompt_token_ids == prompt]
        kept = min(lost, default=90)
        assert one[:kept] == other[:kept]
    assert_idle(tight)


def test_with_all_layers_skipped_it_is_stock(tight, stock):
    from vllm.distributed import cleanup_dist_env_and_memory

    tight.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    with engine({"skip_layers": [0, 1, 2, 3]}) as llm:
        assert worker_of(llm).model_runner.kv_cache_config.num_blocks == stock["blocks"]
        assert [greedy(llm, [p])[0] for p in PROMPTS[-3:]] == stock["answers"][-3:]


@pytest.fixture(scope="module")
def alone(packed):
    """Answers of one process, its prompts one after the other."""
    from vllm.distributed import cleanup_dist_env_and_memory

    packed.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    with engine({}) as llm:
        return [greedy(llm, [prompt], 20)[0] for prompt in PROMPTS[-3:]]


@pytest.mark.slow
def test_ranks_in_processes_of_their_own_answer_alike(alone):
    """Each packs its own heads, and one of them counts."""
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine({}, served_model_name="ranks", **parallel) as llm:
        assert [greedy(llm, [prompt], 20)[0] for prompt in PROMPTS[-3:]] == alone
        # 3, 7 and 14 blocks of prompts; of the second one the last is filled while decoding.
        assert counted(llm, "sealed_blocks_total") == 3 + 8 + 14
