"""Answer tokens that the upper layers forget: equation 6 replayed step by step in plain torch."""

import pytest

from tests.engine.dynamic_llava_engine import (
    ENGINE,
    Ask,
    answers,
    assert_equal,
    assert_idle,
    folder,
    predictors_of,
    pruned,
    reference,
    sampling,
    with_predictors,
    worst,
)
from tests.models import make_engine, preemptions, scheduler_of, worker_of

pytestmark = pytest.mark.engine

SPARSE = {
    "sparse_layer": 2,
    "d_model": 32,
    "nhead": 4,
    "dim_feedforward": 64,
    "num_layers": 1,
    "image_keep_rate": 0.3,
    "text_keep_rate": 0.5,
}
ASKS = [
    Ask(7, (0,), 9),
    Ask(40, (), 3),
    Ask(20, (2, 3), 5),
    Ask(1, (), 0, start=9),
    Ask(3, (4, 0, 1), 12),
    Ask(90, (), 40),
    Ask(61, (6,), 33),
]
TOKENS = 75
"""Of an answer: more than two blocks."""
TEXT = {"image_scorer": None, "image_keep_rate": None, "text_keep": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_predictors(tmp_path_factory.mktemp("text"), SPARSE)


@pytest.fixture(scope="module")
def llm(model):
    with pruned(TEXT, model) as engine:
        yield engine


def replayed(where, ask, output, **options):
    return reference(
        ask,
        output,
        scorer="predictor",
        predictors=predictors_of(where),
        text_keep=True,
        prompt_tokens=len(output.prompt_token_ids),
        **{"rate": 0.3} | options,
    )


def assert_replays(where, asks, outputs, **options):
    """Fail unless logits follow the reference; return how many tokens it kept and forgot."""
    kept = forgotten = 0
    for ask, output in zip(asks, outputs, strict=True):
        expected = replayed(where, ask, output, **options)
        assert worst(output, expected) < 1e-4, ask
        kept += int(expected.decisions.sum())
        forgotten += int((~expected.decisions).sum())
    return kept, forgotten


def test_answers_follow_equation_6(llm, model):
    outputs = answers(llm, ASKS, tokens=TOKENS, temperature=1)
    kept, forgotten = assert_replays(model, ASKS, outputs)
    assert min(kept, forgotten) > 0.2 * (kept + forgotten)
    assert_idle(llm)


def test_one_by_one_they_are_the_same(llm, model):
    for ask in ASKS[:4]:
        assert_replays(model, [ask], answers(llm, [ask], tokens=TOKENS, temperature=1))
    assert_idle(llm)


def test_the_counter_is_what_was_forgotten(llm, model):
    ask, engine = ASKS[0], llm.llm_engine
    engine.add_request("only", ask.prompt, sampling(40, temperature=1))
    view, outputs = worker_of(llm).model_runner.get_model().hole_view, []
    counted = []
    while engine.has_unfinished_requests():
        outputs = engine.step() or outputs
        if scheduler_of(llm).running:
            [running] = scheduler_of(llm).running
            [blocks] = scheduler_of(llm).kv_cache_manager.get_block_ids(running.request_id)
            counted.append(int(view.forgotten[blocks[0]]))
    decisions = replayed(model, ask, outputs[0]).decisions
    # The first step has no answer token in it yet.
    assert counted == [int((~decisions[:n]).sum()) for n in range(len(counted))]
    assert counted[-1] > 3
    assert_idle(llm)


def test_preemption_forgets_the_same_tokens_again(model):
    tight = {"max_num_batched_tokens": 176, "num_gpu_blocks_override": 20, "max_model_len": 600}
    with pruned(TEXT, model, **tight) as llm:
        with preemptions(llm) as seen:
            outputs = answers(llm, ASKS, tokens=TOKENS, temperature=1)
        # Enough of an answer to have forgotten some of it.
        assert any(tokens > 10 for _, tokens in seen), seen
        assert_replays(model, ASKS, outputs)
        assert_idle(llm)


def test_a_predictor_that_keeps_all_is_stock(tmp_path):
    sparse = SPARSE | {"image_keep_rate": 1.0}
    model = with_predictors(tmp_path, sparse, keeps_all=True)
    with pruned(TEXT, model) as llm:
        ours = answers(llm, ASKS, tokens=40)
        assert_idle(llm)
    with make_engine(folder(), **ENGINE) as llm:
        theirs = answers(llm, ASKS, tokens=40)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.outputs[0].token_ids == other.outputs[0].token_ids
        for a, b in zip(mine.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
            assert {k: v.logprob for k, v in a.items()} == pytest.approx(
                {k: v.logprob for k, v in b.items()}, abs=1e-5
            )


def test_without_text_keep_the_same_checkpoint_forgets_nothing(model):
    with pruned(TEXT | {"text_keep": False}, model) as llm:
        outputs = answers(llm, ASKS[:2], tokens=TOKENS, temperature=1)
    predictors = predictors_of(model)
    assert_equal(ASKS[:2], outputs, scorer="predictor", predictors=predictors, rate=0.3)
