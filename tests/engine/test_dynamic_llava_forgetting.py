"""No blocks in the upper layers for answer tokens that they have forgotten."""

import pytest
from vision import tiny_llava

from tests.engine.dynamic_llava_engine import (
    BLOCK,
    PIXELS,
    answers,
    assert_idle,
    plain_model,
    pruned,
    sampling,
    with_predictors,
)
from tests.engine.test_dynamic_llava_memory import CROWD, assert_forgotten, holes, managers_of
from tests.engine.test_dynamic_llava_text import (
    ASKS,
    SPARSE,
    TEXT,
    TOKENS,
    assert_replays,
    replayed,
)
from tests.models import preemptions, scheduler_of, worker_of

pytestmark = pytest.mark.engine

FREED = TEXT | {"free_hole_blocks": True}
LONG = 250
TWICE = ASKS * 2
# Prompts of up to 450 tokens come in chunks, and not all requests fit.
TIGHT = {"max_num_batched_tokens": 176, "max_model_len": 600}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_predictors(tmp_path_factory.mktemp("text"), SPARSE)


@pytest.fixture(scope="module")
def with_all_blocks(model):
    """Answers of an engine that forgets, and takes blocks for what it forgets."""
    with pruned(TEXT, model) as llm:
        return tokens_of(answers(llm, ASKS, TOKENS))


@pytest.fixture(scope="module")
def llm(model, with_all_blocks):
    with pruned(FREED, model) as engine:
        yield engine


def tokens_of(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


def known(llm):
    """What the scheduler knows of forgotten tokens."""
    return scheduler_of(llm).plugin_policies[0]._forgotten


def counted(llm, request):
    """What the device has counted, which is the same under each of a request's tables."""
    view = worker_of(llm).model_runner.get_model().hole_view
    firsts = [m.req_to_blocks[request.request_id][0].block_id for m in managers_of(llm)]
    [count] = {int(view.forgotten[first]) for first in firsts}
    return count


def held_while_answering(llm, asks):
    """Let requests answer, and look after each step at what they hold in the upper layers.

    Returns:
        How many blocks each did without in a table, in its last step but one, and the answers.
    """
    engine, outputs, saved = llm.llm_engine, {}, [0] * len(asks)
    for number, ask in enumerate(asks):
        engine.add_request(str(number), ask.prompt, sampling(LONG, temperature=1))
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    while engine.has_unfinished_requests():
        outputs.update({o.request_id: o for o in engine.step()})
        taken = 0
        for request in scheduler_of(llm).running:
            name, length = request.request_id, request.num_computed_tokens
            number, forgotten = int(name.split("-")[0]), known(llm).of(name)
            assert forgotten == counted(llm, request)
            blocks, needed = -(-length // BLOCK), -(-(length - forgotten) // BLOCK)
            taken += blocks
            for table in (manager.req_to_blocks[name] for manager in managers_of(llm)):
                # The last block may have been taken for a token that is forgotten now.
                assert needed <= len(table) <= needed + 1
                given_back = sum(block.is_null for block in table)
                # They are given back when the next step is scheduled.
                assert request.num_output_tokens < 2 or given_back == holes(llm, asks[number])
                taken += len(table) - given_back
            saved[number] = blocks - len(table)
        assert pool.num_gpu_blocks - 1 - pool.get_num_free_blocks() == taken
    assert_idle(llm)
    assert len(known(llm)) == 0
    return saved, [outputs[str(number)] for number in range(len(asks))]


def under_pressure(llm, asks, temperature):
    """Answer, with some preempted in the middle of their answers."""
    with preemptions(llm) as seen:
        outputs = answers(llm, asks, TOKENS, temperature)
    # Enough of an answer to have forgotten some of it.
    assert any(count > 10 for _, count in seen), seen
    return outputs


def with_aborts(llm):
    """Let the first two requests be aborted in the middle of their answers."""
    engine, outputs = llm.llm_engine, {}
    names = [engine.add_request(str(n), a.prompt, sampling(TOKENS)) for n, a in enumerate(ASKS)]
    while engine.has_unfinished_requests():
        outputs.update({o.request_id: o for o in engine.step()})
        under_way = [r for r in scheduler_of(llm).running if r.num_output_tokens > TOKENS // 2]
        gone = [r.request_id for r in under_way if r.request_id in names[:2]]
        if gone:
            engine.abort_request(gone, internal=True)
    assert not any(outputs[name].finished for name in ("0", "1"))
    return [outputs[str(number)] for number in range(2, len(ASKS))]


def test_answers_are_those_with_all_blocks(llm, model, with_all_blocks):
    outputs = answers(llm, ASKS, TOKENS)
    assert tokens_of(outputs) == with_all_blocks
    assert_replays(model, ASKS, outputs)
    assert_idle(llm)
    assert_forgotten(llm)


def assert_saves(llm, where, asks, **options):
    """Fail unless blocks are saved to the last one that forgotten tokens would fill."""
    saved, outputs = held_while_answering(llm, asks)
    replays = [
        replayed(where, ask, output, **options) for ask, output in zip(asks, outputs, strict=True)
    ]
    forgotten = [int((~expected.decisions).sum()) for expected in replays]
    assert max(forgotten) > LONG // 6
    for blocks, tokens in zip(saved, forgotten, strict=True):
        assert tokens // BLOCK - 1 <= blocks <= -(-tokens // BLOCK)
    assert max(saved) > 1
    assert_replays(where, asks, outputs, **options)


def test_blocks_are_for_what_is_held(llm, model):
    assert_saves(llm, model, ASKS[:4])


def test_preempted_and_in_chunks_they_are_the_same(model, with_all_blocks):
    with pruned(FREED, model, num_gpu_blocks_override=44, **TIGHT) as llm:
        assert tokens_of(under_pressure(llm, TWICE, temperature=0)) == with_all_blocks * 2
        assert_replays(model, TWICE, under_pressure(llm, TWICE, temperature=1))
        assert_idle(llm)
        assert len(known(llm)) == 0
        assert tokens_of(with_aborts(llm)) == with_all_blocks[2:]
        assert_idle(llm)
        assert len(known(llm)) == 0


def test_several_tables(tmp_path):
    """Groups are as large as the two layers below; five above make three, of which one has one."""
    plain = tiny_llava(layers=7, pixels=PIXELS)
    model = with_predictors(tmp_path, SPARSE, plain=plain)
    with pruned(FREED, model) as llm:
        assert len(managers_of(llm)) == 3
        assert_saves(llm, model, ASKS[:3], model=plain_model(plain))
    with pruned(FREED, model, num_gpu_blocks_override=80, **TIGHT) as llm:
        outputs = under_pressure(llm, CROWD, temperature=1)
        assert_replays(model, CROWD, outputs, model=plain_model(plain))
        assert_idle(llm)


def test_images_that_are_kept_whole(model):
    with pruned(FREED | {"image_keep_rate": 1.0}, model) as llm:
        assert_saves(llm, model, ASKS[:3], rate=1.0)
