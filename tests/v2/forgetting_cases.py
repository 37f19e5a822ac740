"""Forgotten tokens that take no blocks, where the scheduler hears of them a step late."""

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from tests.engine.dynamic_llava_engine import (
    Ask,
    assert_idle,
    pruned,
    sampling,
    with_predictors,
)
from tests.engine.test_dynamic_llava_forgetting import (
    FREED,
    counted,
    known,
    tokens_of,
    under_pressure,
)
from tests.engine.test_dynamic_llava_sessions import SPOKEN, assert_follows, session
from tests.engine.test_dynamic_llava_sessions import TOKENS as TOKENS_OF_A_TURN
from tests.engine.test_dynamic_llava_text import SPARSE, TEXT, TOKENS, assert_replays
from tests.models import scheduler_of, worker_of
from tests.v2.async_cases import asynchronous  # noqa: F401  # a fixture

ASKS = [Ask(7, (0,), 9), Ask(40, (), 3), Ask(1, (), 0, start=9), Ask(61, (6,), 33)] * 2
# Prompts come in chunks. The longest request fits, and two of them do not.
TIGHT = {"max_num_batched_tokens": 176, "max_model_len": 352, "num_gpu_blocks_override": 26}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_predictors(tmp_path_factory.mktemp("text"), SPARSE)


def watched(llm):
    """Record what each step reports, what was known before, and what is known then.

    What is known of a request is never more than its device has counted since it holds its blocks.
    """
    policy, news = scheduler_of(llm).plugin_policies[0], []
    completed = policy.completed

    def complete(step):
        before = {name: known(llm).of(name) for name in step.reports.get("dynamic_llava", {})}
        completed(step)
        after = {name: known(llm).of(name) for name in before}
        told = step.reports.get("dynamic_llava", {})
        news.extend((told[name], before[name], after[name]) for name in before)
        for request in scheduler_of(llm).running:
            assert known(llm).of(request.request_id) <= counted(llm, request)

    policy.completed = complete
    return news


def test_steps_ahead(model):
    with pruned(FREED, model, async_scheduling=True, **TIGHT) as llm:
        assert isinstance(scheduler_of(llm), AsyncScheduler)
        assert worker_of(llm).model_runner.vllm_config.max_concurrent_batches == 2
        news = watched(llm)
        outputs = under_pressure(llm, ASKS, temperature=1)
        assert_replays(model, ASKS, outputs)
        # Some were told of after their request was preempted or gone.
        assert any(told > after == 0 for told, _, after in news)
        assert max(after for _, _, after in news) > TOKENS // 4
        # A token that ends an answer is known when the next step has been scheduled.
        whole = tokens_of(llm.generate([a.prompt for a in ASKS], sampling(TOKENS), use_tqdm=False))
        params = [sampling(TOKENS) for _ in ASKS]
        for answer, one in zip(whole, params, strict=True):
            one.stop_token_ids = [answer[TOKENS // 2]]
        stopped = tokens_of(llm.generate([a.prompt for a in ASKS], params, use_tqdm=False))
        assert stopped == [x[: x.index(x[TOKENS // 2]) + 1] for x in whole]
        llm.generate([ASKS[2].prompt], sampling(1), use_tqdm=False)
        assert_idle(llm)
        scheduler_of(llm).schedule()
        assert len(known(llm)) == 0


@pytest.mark.parametrize("frees", [False, True])
def test_a_session_takes_back_what_a_step_ahead_has_forgotten(model, frees):
    with pruned(TEXT | {"free_hole_blocks": frees}, model, async_scheduling=True) as llm:
        assert isinstance(scheduler_of(llm), AsyncScheduler)
        for _ in range(4):
            turns = session(llm, SPOKEN, temperature=1, stops=range(10, 40))
            assert_follows(model, SPOKEN, turns)
            ended = [turn for turn in turns if len(turn.outputs[0].token_ids) < TOKENS_OF_A_TURN]
            # That a token ends a turn is known when the next step has been scheduled.
            assert len(ended) > 1
            assert_idle(llm)
