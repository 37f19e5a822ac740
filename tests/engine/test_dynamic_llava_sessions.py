"""Streaming sessions: a turn is put behind the answer to the turn before it."""

from types import SimpleNamespace

import pytest
import torch
from msgspec.structs import replace

from tests.engine.dynamic_llava_engine import (
    TOLERANCE,
    Ask,
    assert_idle,
    predictors_of,
    pruned,
    reference,
    sampling,
    with_predictors,
    worst,
)
from tests.engine.test_dynamic_llava_memory import FREED, assert_forgotten, managers_of
from tests.engine.test_dynamic_llava_text import SPARSE, TEXT
from tests.models import scheduler_of

pytestmark = pytest.mark.engine

TURNS = [Ask(7, (0,), 9), Ask(5, (2,), 33, start=20), Ask(1, (3, 4), 4, start=11)]
# Only answers are forgotten, so that a turn of text is all that is behind one.
SPOKEN = [Ask(7, (0,), 9), Ask(40, (), 3, start=20), Ask(2, (), 1, start=5)]
TOKENS = 40


def session(llm, asks, temperature=0.0, stops=()):
    """Ask one turn after another of one request.

    Args:
        llm: The engine.
        asks: The turns.
        temperature: Of all answers.
        stops: Tokens that end an answer, but for its first half.

    Returns:
        Of each turn what a request has that is asked all of it at once, vLLM's prompt ids, and how
        many blocks it had given back in a table of the upper layers.
    """
    engine, name, turns, had = llm.llm_engine, None, [], 0
    for ask in [*asks, None]:
        params = sampling(TOKENS, temperature)
        params.min_tokens, params.stop_token_ids = TOKENS // 2, list(stops)
        request = engine.input_processor.process_inputs(
            name or "session",
            ask.prompt if ask else {"prompt_token_ids": [0]},
            params,
            supported_tasks=engine.get_supported_tasks(),
            resumable=ask is not None,
        )
        if name is None:
            engine.input_processor.assign_request_id(request)
            name = request.request_id
        request.external_req_id = "session"
        # Both sides put what is added behind their own list, which here would be the same one.
        shown = replace(request, prompt_token_ids=list(request.prompt_token_ids))
        engine.output_processor.add_request(shown, None, None, 0)
        engine.engine_core.add_request(request)
        if ask is not None:
            held = scheduler_of(llm).requests[name]
            answer = answered(engine, held)
            ids, logprobs = list(answer.token_ids)[had:], answer.logprobs[had:]
            assert len(ids) == TOKENS or ids[-1] in stops
            had += len(ids)
            turns.append(
                SimpleNamespace(
                    prompt_token_ids=list(held.prompt_token_ids),
                    outputs=[SimpleNamespace(token_ids=ids, logprobs=logprobs)],
                    given_back=[
                        sum(block.is_null for block in manager.req_to_blocks[name])
                        for manager in managers_of(llm)
                    ],
                )
            )
    while engine.has_unfinished_requests():
        engine.step()
    return turns


def answered(engine, held):
    """Let a session's turn be answered; return all that it has answered so far."""
    answer = None
    while held.status.name != "WAITING_FOR_STREAMING_REQ":
        for output in engine.step():
            [answer] = output.outputs
    return answer


class OnlyAnswers(torch.nn.Module):
    """A text predictor that keeps what is no answer, of tokens that it is asked for in turn."""

    def __init__(self, predictor, answers):
        super().__init__()
        self.predictor, self.answers, self.asked = predictor, answers, 0

    def forward(self, hidden):
        asked, self.asked = self.asked, self.asked + 1
        logits = self.predictor(hidden)
        return logits if self.answers[asked] else torch.tensor([[1.0, 0.0]])


def assert_follows(model, asks, turns):
    """Fail unless a session's answers are the reference's; return how many tokens it forgot."""
    first, spoken, forgotten = len(turns[0].prompt_token_ids), [], 0
    for number, turn in enumerate(turns):
        answer = [True] * len(turn.outputs[0].token_ids)
        predictors = predictors_of(model)
        predictors.text_predictor = OnlyAnswers(predictors.text_predictor, spoken + answer)
        expected = reference(
            asks[0],
            turn,
            scorer="predictor",
            predictors=predictors,
            text_keep=True,
            prompt_tokens=first,
            rate=0.3,
        )
        assert worst(turn, expected) < TOLERANCE, number
        forgotten = int((~expected.decisions).sum())
        for following in turns[number + 1 : number + 2]:
            spoken += answer[:-1]
            spoken += [False] * (len(following.prompt_token_ids) - first - len(spoken))
    return forgotten


def test_images_of_later_turns_give_their_own_blocks_back():
    with pruned(FREED, limit_mm_per_prompt={"image": 4}) as llm:
        turns, images = session(llm, TURNS), ()
        for ask, turn in zip(TURNS, turns, strict=True):
            images += ask.images
            assert worst(turn, reference(SimpleNamespace(images=images), turn)) < TOLERANCE
        for first, second, third in zip(*(turn.given_back for turn in turns), strict=True):
            # Some more with each image.
            assert 0 < first < second < third - 1
        assert_idle(llm)
        assert_forgotten(llm)


@pytest.mark.parametrize("frees", [False, True])
def test_what_was_forgotten_stays_so_and_what_comes_is_kept(tmp_path, frees):
    model = with_predictors(tmp_path, SPARSE)
    with pruned(TEXT | {"free_hole_blocks": frees}, model) as llm:
        assert assert_follows(model, SPOKEN, session(llm, SPOKEN, temperature=1)) > TOKENS / 2
        assert_idle(llm)
