"""Blocks of dropped image tokens given back while their requests go on."""

import pytest
from vision import tiny_llava

from tests.engine.dynamic_llava_engine import (
    BLOCK,
    PIXELS,
    TOKENS,
    Ask,
    answers,
    assert_equal,
    assert_idle,
    plain_model,
    pruned,
)
from tests.models import plugin_samples, preemptions, scheduler_of

pytestmark = pytest.mark.engine

ASKS = [
    Ask(7, (0,), 9),
    Ask(40, (), 3),
    Ask(20, (2, 3), 5),
    Ask(3, (4, 0, 1), 12),
    Ask(90, (), 40),
    Ask(60, (6,), 33),
    # The prompt ends with a block, and its last image with both.
    Ask(16, (1,), 0, ends=True),
]
CROWD = ASKS + [Ask(before, (before % 5,), 30, start=before) for before in range(8)]
FREED = {"free_hole_blocks": True}
# A request of 450 tokens and 60 more has 16 blocks in each group of layers.
TIGHT = {"max_num_batched_tokens": 512, "max_model_len": 600}


def managers_of(llm):
    """The managers of the upper layers' blocks, one for each of their groups."""
    return scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers[1:]


def holes(llm, ask):
    """Blocks of a request that are holes, in each group."""
    plan = scheduler_of(llm).plugin_policies[0]._plan_span
    position, total = ask.before, 0
    for _ in ask.images:
        total += plan((position, position + TOKENS)).blocks
        position += TOKENS + 1
    return total


def freed_gauge(llm):
    """What the metric says of this engine."""
    model = str(llm.llm_engine.vllm_config.model_config.served_model_name)
    [value] = [
        sample.value
        for sample in plugin_samples()
        if sample.name == "vllm_plugins:dynamic_llava_freed_blocks"
        and sample.labels.get("model_name") == model
    ]
    return value


def assert_forgotten(llm):
    """Fail if requests that are gone are remembered; the scheduler tells of the last ones later."""
    scheduler_of(llm).schedule()
    assert not any(manager.holes for manager in managers_of(llm))


def assert_frees(llm, ask):
    """Count while a request decodes, against the blocks that its length takes in all groups."""
    from vllm import SamplingParams

    engine, pool = llm.llm_engine, scheduler_of(llm).kv_cache_manager.block_pool
    upper = len(managers_of(llm))
    engine.add_request("only", ask.prompt, SamplingParams(max_tokens=4, ignore_eos=True))
    before = pool.get_num_free_blocks()
    engine.step()
    [request] = scheduler_of(llm).running
    prompt = request.num_prompt_tokens
    assert before - pool.get_num_free_blocks() == (1 + upper) * -(-prompt // BLOCK)
    engine.step()
    taken, hidden = (1 + upper) * -(-(prompt + 1) // BLOCK), upper * holes(llm, ask)
    assert before - pool.get_num_free_blocks() == taken - hidden
    assert freed_gauge(llm) == hidden
    assert (hidden > 0) == bool(ask.images)
    engine.abort_request(["only"])
    while engine.has_unfinished_requests():
        engine.step()
    assert_idle(llm)


def answers_under_pressure(llm):
    """Answer a crowd, with preemptions, and blocks that were holes being written by others."""
    written = set()

    def watch(manager):
        remove = manager._remove_blocks_in_range

        def watched(request_id, first, last):
            blocks = manager.req_to_blocks.get(request_id, [])[first:last]
            written.update(b.block_id for b in blocks if not b.is_null)
            return remove(request_id, first, last)

        manager._remove_blocks_in_range = watched

    for manager in managers_of(llm):
        watch(manager)
    with preemptions(llm) as seen:
        outputs = answers(llm, CROWD, tokens=60)
    assert any(tokens > 0 for _, tokens in seen), seen
    # A good part of the pool were holes once, and are other requests' later.
    assert len(written) > 10 * (1 + len(managers_of(llm)))
    return outputs


@pytest.fixture(scope="module")
def llm():
    with pruned(FREED) as engine:
        yield engine


def test_the_upper_layers_have_tables_of_their_own(llm):
    groups = scheduler_of(llm).kv_cache_config.kv_cache_groups
    assert [type(g.kv_cache_spec).__name__ for g in groups] == ["FullAttentionSpec", "HoleSpec"]
    assert [len(g.layer_names) for g in groups] == [2, 2]


def test_answers_are_those_of_the_reference(llm):
    assert_equal(ASKS, answers(llm, ASKS, tokens=12))
    assert_idle(llm)
    for ask in ASKS:
        assert_equal([ask], answers(llm, [ask], tokens=12))
    assert_idle(llm)
    assert_forgotten(llm)


def test_what_is_freed_is_what_is_dropped(llm):
    for ask in ASKS:
        assert_frees(llm, ask)


def test_freed_blocks_serve_others_and_nobody_reads_theirs():
    """The pool is so small that freed blocks are written by other requests, and some preempted."""
    with pruned(FREED, num_gpu_blocks_override=44, **TIGHT) as llm:
        assert_equal(CROWD, answers_under_pressure(llm))
        assert_idle(llm)
        assert_forgotten(llm)


def test_freed_blocks_of_several_groups():
    """Groups are as large as the two layers below; five above make three, of which one has one."""
    model = tiny_llava(layers=7, pixels=PIXELS)
    with pruned(FREED, model, num_gpu_blocks_override=80, **TIGHT) as llm:
        groups = scheduler_of(llm).kv_cache_config.kv_cache_groups
        kinds = [type(group.kv_cache_spec).__name__ for group in groups]
        assert kinds == ["FullAttentionSpec", *["HoleSpec"] * 3]
        assert sorted(len(group.layer_names) for group in groups) == [1, 2, 2, 2]
        for ask in ASKS:
            assert_frees(llm, ask)
        outputs = answers_under_pressure(llm)
        assert_equal(CROWD, outputs, model=plain_model(model))
        assert_idle(llm)
        assert_forgotten(llm)
