"""Images that come whole beside a scheduler that wants steps smaller than an image."""

import pytest

from tests.engine.dynamic_llava_engine import (
    BLOCK,
    ENGINE,
    RATE,
    TOKENS,
    Ask,
    assert_equal,
    assert_idle,
    folder,
    sampling,
)
from tests.engine.test_dynamic_llava_sessions import Session
from tests.models import make_engine, scheduler_of
from vllm_plugins import engine_args

pytestmark = pytest.mark.engine

PRUNED = f"dynamic_llava:image_keep_rate={RATE},image_scorer=norm"
SMALL = TOKENS - BLOCK
"""Rows of a step, into which no image fits."""
LONG = 200
"""Tokens of an answer that is under way all along."""
BUDGETS = [f"sarathi:token_budget={SMALL}", "sarathi:tbt_slo_ms=0.01"]


@pytest.fixture(params=BUDGETS)
def llm(request):
    arguments = engine_args(PRUNED, request.param)
    with make_engine(folder(), **arguments, **ENGINE) as engine:
        yield engine


def step_until(llm, name):
    """Let requests be answered until one is, which has to be while a long answer is under way."""
    engine = llm.llm_engine
    while True:
        for output in engine.step():
            if output.finished:
                assert output.request_id == name
                return output


def test_images_larger_than_the_budget_are_answered(llm):
    engine = llm.llm_engine
    engine.add_request("long", Ask(20, (), 3).prompt, sampling(LONG))
    engine.step()
    # Twice, so that the second time begins with the image: the prefix cache holds what is before.
    asks = [Ask(BLOCK, (1,), 3), Ask(BLOCK, (2, 3), 3), Ask(0, (4,), 3)]
    outputs = []
    for number, ask in enumerate(asks):
        engine.add_request(str(number), ask.prompt, sampling(4))
        outputs.append(step_until(llm, str(number)))
    assert_equal(asks, outputs)
    engine.abort_request(["long"])
    while engine.has_unfinished_requests():
        engine.step()
    assert_idle(llm)


def test_a_session_goes_on_with_an_image_larger_than_the_budget(llm):
    one = Session(llm)
    for ask in (Ask(5, (), 3), Ask(0, (1,), 1)):
        one.send(ask)
        turn = one.turn()
    assert len(turn.prompt_token_ids) > TOKENS
    one.close()
    assert_idle(llm)


def test_a_step_without_images_keeps_its_budget(llm):
    engine, rows = llm.llm_engine, []
    engine.add_request("long", Ask(20, (), 3).prompt, sampling(LONG))
    engine.step()
    engine.add_request("text", Ask(LONG, (), LONG).prompt, sampling(1))
    schedule = scheduler_of(llm).schedule

    def noted(*args, **kwargs):
        output = schedule(*args, **kwargs)
        rows.append(output.total_num_scheduled_tokens)
        return output

    scheduler_of(llm).schedule = noted
    step_until(llm, "text")
    assert max(rows) <= SMALL


def test_a_pause_between_two_turns_is_no_late_token():
    arguments, now, missed = engine_args(PRUNED, "sarathi:tbt_slo_ms=1000"), [0.0], []
    with make_engine(folder(), **arguments, **ENGINE) as llm:
        scheduler = scheduler_of(llm)
        scheduler.plugin_clock = lambda: now[0]
        for policy in scheduler.plugin_policies:
            policy.metric.inc = lambda name, *rest: missed.append(name)
        one = Session(llm)
        for ask in (Ask(5, (), 3), Ask(2, (1,), 1)):
            one.send(ask)
            one.turn()
            now[0] += 100
        one.close()
        assert "sarathi_tbt_slo_misses_total" not in missed
