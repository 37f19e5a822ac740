"""Blocks of dropped image tokens given back while their requests go on."""

import pytest

from tests.engine.dynamic_llava_engine import (
    BLOCK,
    Ask,
    answers,
    assert_equal,
    assert_idle,
    pruned,
)
from tests.models import scheduler_of

pytestmark = pytest.mark.engine

ASKS = [
    Ask(7, (0,), 9),
    Ask(40, (), 3),
    Ask(20, (2, 3), 5),
    Ask(3, (4, 0, 1), 12),
    Ask(90, (), 40),
    Ask(60, (6,), 33),
]
FREED = {"free_hole_blocks": True}


def manager_of(llm):
    """The manager of the upper layers' blocks."""
    return scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers[1]


def holes(llm, ask):
    """Blocks of a request that are holes."""
    plan = scheduler_of(llm).plugin_policies[0]._plan_span
    position, total = ask.before, 0
    for _ in ask.images:
        total += plan((position, position + 144)).blocks
        position += 145
    return total


def assert_forgotten(llm):
    """Fail if requests that are gone are remembered; the scheduler tells of the last ones later."""
    scheduler_of(llm).schedule()
    assert not manager_of(llm).holes


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
    """Counted while a request decodes, against the blocks that its length takes in both groups."""
    from vllm import SamplingParams

    engine, pool = llm.llm_engine, scheduler_of(llm).kv_cache_manager.block_pool
    for ask in ASKS:
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        engine.add_request("only", ask.prompt, params)
        before = pool.get_num_free_blocks()
        engine.step()
        [request] = scheduler_of(llm).running
        taken = 2 * -(-request.num_prompt_tokens // BLOCK)
        assert before - pool.get_num_free_blocks() == taken
        engine.step()
        taken = 2 * -(-(request.num_prompt_tokens + 1) // BLOCK)
        assert before - pool.get_num_free_blocks() == taken - holes(llm, ask)
        assert (holes(llm, ask) > 0) == bool(ask.images)
        engine.abort_request(["only"])
        while engine.has_unfinished_requests():
            engine.step()
        assert_idle(llm)


def test_freed_blocks_serve_others_and_nobody_reads_theirs():
    """The pool is so small that freed blocks are written by other requests, and some preempted."""
    # A request of 450 tokens and 60 more has 32 blocks in both groups.
    tight = {"num_gpu_blocks_override": 44, "max_num_batched_tokens": 512, "max_model_len": 600}
    with pruned(FREED, **tight) as llm:
        scheduler, preempted, written = scheduler_of(llm), [], set()
        original = scheduler._preempt_request

        def preempt(request, *args, **kwargs):
            preempted.append(request.num_output_tokens)
            return original(request, *args, **kwargs)

        manager = manager_of(llm)
        remove = manager._remove_blocks_in_range

        def watched(request_id, first, last):
            blocks = manager.req_to_blocks.get(request_id, [])[first:last]
            written.update(b.block_id for b in blocks if not b.is_null)
            return remove(request_id, first, last)

        scheduler._preempt_request, manager._remove_blocks_in_range = preempt, watched
        asks = ASKS + [Ask(before, (before % 5,), 30, start=before) for before in range(8)]
        outputs = answers(llm, asks, tokens=60)
        assert any(tokens > 0 for tokens in preempted), preempted
        # More blocks were freed as holes than there are: each was used again.
        assert len(written) > 20
        assert_equal(asks, outputs)
        assert_idle(llm)
        assert_forgotten(llm)
