"""HiP attention on the real engine, with the compiled kernels."""

import pytest
import torch

from tests.models import make_engine, preemptions, scheduler_of, tiny_llama, worker_of
from vllm_plugins import engine_args

pytestmark = pytest.mark.engine

# Sparse from the first token on, so that short prompts exercise everything.
SMALL = {
    "dense_layers": [0],
    "sink_tokens": 8,
    "window_tokens": 64,
    "overlap_tokens": 16,
    "stages": [{"chunk": 32, "keep": 128}, {"chunk": 8}],
    "top_k": 32,
    "refresh": [8, 4],
    "dense_threshold": 0,
}
NEUTRAL = {**SMALL, "dense_threshold": 2048}
BOTH = {**SMALL, "phases": "both", "dense_tail_queries": 0}
LENGTHS = (1, 5, 63, 64, 65, 200, 511, 900)
PROMPTS = [[(7 * i + j * j) % 500 for j in range(n)] for i, n in enumerate(LENGTHS)]
TOKENS = 100


def engine(options=None, **arguments):
    plugin = engine_args("hip", **options) if options else {}
    return make_engine(tiny_llama(layers=4), seed=0, **plugin, **arguments)


def greedy(llm, prompts, tokens=TOKENS, **sampling):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **sampling)
    requests = [{"prompt_token_ids": p} for p in prompts]
    return [x.outputs[0].token_ids for x in llm.generate(requests, params, use_tqdm=False)]


def prompt_logprobs(llm, prompt):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return torch.tensor([next(iter(x.values())).logprob for x in output.prompt_logprobs[1:]])


def assert_idle(llm):
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    # One block is vLLM's own, for padding.
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    llm.reset_prefix_cache()


def abort_all(llm):
    """Start every prompt and hang up in its second or third step."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    for i, prompt in enumerate(PROMPTS):
        params = SamplingParams(max_tokens=50, ignore_eos=True)
        name = engine.add_request(f"{1000 + i}", {"prompt_token_ids": prompt}, params)
        for _ in range(2 + i % 2):
            engine.step()
        engine.abort_request([name], internal=True)
    while engine.has_unfinished_requests():
        engine.step()


@pytest.fixture(scope="module")
def stock():
    with engine() as llm:
        return greedy(llm, PROMPTS), prompt_logprobs(llm, PROMPTS[-1])


@pytest.fixture(scope="module")
def neutral(stock):
    with engine(NEUTRAL, num_gpu_blocks_override=18) as llm:
        yield llm


def test_dense_below_the_threshold_equals_stock(neutral, stock):
    answers, logprobs = stock
    assert greedy(neutral, PROMPTS) == answers
    torch.testing.assert_close(prompt_logprobs(neutral, PROMPTS[-1]), logprobs, rtol=0, atol=2e-4)
    assert_idle(neutral)


def test_preemption_aborts_and_prefix_hits_keep_it_equal(neutral, stock):
    """The pool of 17 blocks does not hold all prompts with their answers at once."""
    with preemptions(neutral) as preempted:
        assert greedy(neutral, [*PROMPTS, *PROMPTS]) == stock[0] * 2
    assert preempted
    abort_all(neutral)
    assert greedy(neutral, PROMPTS) == stock[0]
    assert_idle(neutral)


@pytest.fixture(scope="module")
def sparse(stock):
    with engine(SMALL) as llm:
        yield llm


def test_sparse_layers_change_answers_in_a_batch_as_they_do_alone(sparse, stock):
    alone = [greedy(sparse, [p])[0] for p in PROMPTS]
    # What fits into sink and window is attended to as a whole.
    assert [x[:60] for x in alone[:2]] == [x[:60] for x in stock[0][:2]]
    assert alone[-3:] != stock[0][-3:], "long answers are as without the plug-in"
    # In a batch, kept selections must stay with their requests while these come and go.
    assert greedy(sparse, PROMPTS) == alone
    assert greedy(sparse, PROMPTS[::-1]) == alone[::-1]
    assert_idle(sparse)


def test_preemption_loses_nothing(sparse):
    """A resumed answer may differ: what it had decoded sparsely is computed again as a prompt."""
    pool = scheduler_of(sparse).kv_cache_manager.block_pool
    held = pool.get_new_blocks(pool.get_num_free_blocks() - 17)
    with preemptions(sparse) as preempted:
        answers = greedy(sparse, [*PROMPTS, *PROMPTS])
    pool.free_blocks(held)
    assert preempted
    assert [len(x) for x in answers] == [TOKENS] * 16
    assert_idle(sparse)


def test_metrics_count_decodes_and_refreshes(sparse):
    from vllm_plugins.metrics import metrics_directory

    builder = _builder(sparse)
    before = dict(_values(builder))
    greedy(sparse, [PROMPTS[5]], tokens=17)
    gained = {k: v - before.get(k, 0) for k, v in _values(builder).items()}
    assert gained["hip_decode_queries_total", "sparse"] == 16
    assert gained["hip_prefill_queries_total", "dense"] == 200
    # Positions 200 to 215: a newcomer at 200; 208 is due in both stages, 204 and 212 in the last.
    assert gained["hip_refreshes_total", "0"] == 2
    assert gained["hip_refreshes_total", "1"] == 2
    assert gained["hip_reused_selections_total", ""] == 12
    assert gained["hip_context_tokens_total", ""] == sum(range(201, 217))
    assert metrics_directory().exists()


def _builder(llm):
    [[group]] = worker_of(llm).model_runner.attn_groups
    return group.get_metadata_builder()


def _values(builder):
    return {key: slot.value for key, slot in builder._meter._metrics._slots.items()}


def test_layers_have_their_plans(sparse):
    layers = worker_of(sparse).plugin_view().config.compilation_config.static_forward_context
    plans = [layer.impl.plan for layer in layers.values()]
    assert plans[0] is None
    assert [plan.top_k for plan in plans[1:]] == [32, 32, 32]


def attention_layer(config, name, cls, **arguments):
    """Make a real layer beside those of a running engine's model."""
    from vllm.config import set_current_vllm_config

    from vllm_plugins.engine.attention_host import plugin_attention
    from vllm_plugins.settings import enabled_plugins

    with plugin_attention(enabled_plugins(config)), set_current_vllm_config(config):
        return cls(4, 64, 0.125, num_kv_heads=2, cache_config=config.cache_config,
                   prefix=name, **arguments)  # fmt: skip


@pytest.fixture
def load(sparse):
    """Tells the listener that a model of one layer is loaded; returns the layer's plan."""
    from vllm_plugins.attention_backends.hip.worker import HipListener, hip_options

    config = worker_of(sparse).plugin_view().config
    layers = config.compilation_config.static_forward_context
    before = dict(layers)

    def load(cls, own=True, **arguments):
        layers.clear()
        layer = attention_layer(config, "model.layers.3.self_attn.attn", cls, **arguments)
        model = torch.nn.ModuleList([layer] if own else [])
        HipListener(hip_options(config), config).on_model_loaded(model)
        return layer.impl.plan

    load.config = config
    yield load
    layers.clear()
    layers.update(before)


def test_layers_of_other_kinds_and_drafters_stay_dense(load):
    from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention

    assert load(Attention) is not None
    assert load(Attention, own=False) is None
    assert load(Attention, per_layer_sliding_window=64) is None
    assert load(ChunkedLocalAttention, attention_chunk_size=64) is None


def test_a_layer_whose_kv_others_read_is_refused(load):
    """On CPU the stock kernel would read plain rows as if they were in its own order."""
    from vllm.model_executor.layers.attention import Attention

    from vllm_plugins.errors import PluginError

    class Shared(Attention):
        """A layer, and another one that reads its KV."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            target, kwargs["prefix"] = kwargs["prefix"], "model.layers.4.self_attn.attn"
            Attention(*args, **kwargs, kv_sharing_target_layer_name=target)

    with pytest.raises(PluginError) as error:
        load(Shared)
    assert str(error.value) == (
        "--plugin hip: model.layers.3.self_attn.attn has KV that model.layers.4.self_attn.attn "
        "reads; add the layer to dense_layers"
    )


@pytest.fixture(scope="module")
def both(stock):
    with engine(BOTH) as llm:
        yield llm


def test_cutting_a_prompt_into_chunks_of_whole_blocks_changes_nothing(both, stock):
    scheduler, found = scheduler_of(both), {}
    whole = scheduler.max_num_scheduled_tokens
    for budget in (64, 256, whole):
        scheduler.max_num_scheduled_tokens = budget
        found[budget] = prompt_logprobs(both, PROMPTS[-1])
        both.reset_prefix_cache()
    scheduler.max_num_scheduled_tokens = whole
    for budget in (64, 256):
        torch.testing.assert_close(found[budget], found[whole], rtol=0, atol=2e-4)
    assert (found[whole] - stock[1]).abs().max() > 1e-3, "prefill is as without the plug-in"


def test_a_later_engine_without_the_plugin_is_stock(both, stock):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    assert not AttentionBackendEnum.CPU_ATTN.is_overridden()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_cache_dtype": "bfloat16"}, "--kv-cache-dtype bfloat16: its kernels read"),
        ({"prefix_match_unit": 16}, "--prefix-match-unit 16: what is known of a request"),
    ],
)
def test_a_kv_cache_that_it_does_not_know_is_refused(settings, message):
    from vllm_plugins.errors import PluginError

    with pytest.raises(PluginError, match=message), engine(SMALL, **settings):
        pass


def test_all_layers_dense_equals_stock(stock):
    with engine({**SMALL, "dense_layers": [0, 1, 2, -1]}) as llm:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        assert {layer.impl.plan for layer in layers.values()} == {None}
        assert greedy(llm, PROMPTS) == stock[0]
    with engine() as llm:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        names = {type(layer.impl).__name__ for layer in layers.values()}
        assert names == {"CPUAttentionBackendImpl"}
        assert greedy(llm, PROMPTS[:2]) == stock[0][:2]
