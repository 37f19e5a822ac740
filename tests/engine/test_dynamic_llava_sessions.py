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
# Of the images behind answers one is at the end of a turn, with less behind it than is forgotten.
SHOWN = [Ask(7, (0,), 9), Ask(5, (2,), 1, start=20), Ask(1, (3, 4), 1, start=11, ends=True)]
TOKENS = 40
RATE = SPARSE["image_keep_rate"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_predictors(tmp_path_factory.mktemp("text"), SPARSE)


class Session:
    """One request that is asked turn after turn.

    Args:
        llm: The engine.
        temperature: Of all answers.
        stops: Tokens that end an answer, but for its first half.
    """

    def __init__(self, llm, temperature=0.0, stops=()):
        self.llm, self.temperature, self.stops = llm, temperature, stops
        self.name, self.had = None, 0

    def send(self, ask):
        """Add a turn, which waits for the answer under way, or say with None that none follows."""
        engine, params = self.llm.llm_engine, sampling(TOKENS, self.temperature)
        params.min_tokens, params.stop_token_ids = TOKENS // 2, list(self.stops)
        request = engine.input_processor.process_inputs(
            self.name or "session",
            ask.prompt if ask else {"prompt_token_ids": [0]},
            params,
            supported_tasks=engine.get_supported_tasks(),
            resumable=ask is not None,
        )
        if self.name is None:
            engine.input_processor.assign_request_id(request)
            self.name = request.request_id
        request.external_req_id = "session"
        # Both sides put what is added behind their own list, which here would be the same one.
        shown = replace(request, prompt_token_ids=list(request.prompt_token_ids))
        engine.output_processor.add_request(shown, None, None, 0)
        engine.engine_core.add_request(request)

    def turn(self, preempted_at=None):
        """Let the turn be answered.

        Args:
            preempted_at: Tokens of the answer with which it is preempted, if it is.

        Returns:
            What a request has that is asked all of it at once: vLLM's prompt ids and the answer;
            and how many blocks it had given back in a table of the upper layers.
        """
        held, answer = scheduler_of(self.llm).requests[self.name], None
        while answer is None or answer.finish_reason is None:
            # With the step that ends the answer, a turn that waits is put behind it.
            prompt = list(held.prompt_token_ids)
            given_back = [
                sum(block.is_null for block in manager.req_to_blocks[self.name])
                for manager in managers_of(self.llm)
            ]
            for output in self.llm.llm_engine.step():
                if output.request_id == "session":
                    [answer] = output.outputs
            if answer is not None and len(answer.token_ids) - self.had == preempted_at:
                self.llm.reset_prefix_cache(reset_running_requests=True)
                assert held.status.name == "PREEMPTED"
        ids, logprobs = list(answer.token_ids)[self.had :], answer.logprobs[self.had :]
        assert len(ids) == TOKENS or ids[-1] in self.stops
        self.had += len(ids)
        outputs = [SimpleNamespace(token_ids=ids, logprobs=logprobs)]
        return SimpleNamespace(prompt_token_ids=prompt, outputs=outputs, given_back=given_back)

    def close(self):
        """Say that nothing follows, and let everything be answered."""
        self.send(None)
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()


def session(llm, asks, temperature=0.0, stops=(), at_once=False):
    """Ask one turn after another of one request, or all of them before the first is answered.

    Returns:
        Of each turn what `Session.turn` does.
    """
    one, turns = Session(llm, temperature, stops), []
    for ask in asks if at_once else ():
        one.send(ask)
    for ask in asks:
        if not at_once:
            one.send(ask)
        turns.append(one.turn())
    one.close()
    return turns


class Foreseen(torch.nn.Module):
    """A text predictor that is asked for tokens in turn, and for some of which it is known.

    Args:
        predictor: Asked for the others.
        known: Of each token, whether it is kept, or None.
    """

    def __init__(self, predictor, known):
        super().__init__()
        self.predictor, self.known, self.asked = predictor, known, 0

    def forward(self, hidden):
        known, self.asked = self.known[self.asked], self.asked + 1
        if known is None:
            return self.predictor(hidden)
        return torch.tensor([[1.0, 0.0] if known else [0.0, 1.0]])


def known_of(model, asks, turns):
    """Yield each turn, the images up to it, and what is known of tokens behind the first prompt.

    To drop a token of an image is to forget it: the lower layers see it all the same.
    """
    first, known, images = len(turns[0].prompt_token_ids), [], ()
    for ask, turn in zip(asks, turns, strict=True):
        images += ask.images
        shown, prompt = SimpleNamespace(images=images), range(len(turn.prompt_token_ids))
        predictors = predictors_of(model)
        pruned_once = reference(shown, turn, scorer="predictor", predictors=predictors, rate=RATE)
        kept = set(pruned_once.kept.tolist())
        # The token that ended the answer before is taken back.
        known = known[:-1]
        known += [position in kept for position in prompt[first + len(known) :]]
        known += [None] * len(turn.outputs[0].token_ids)
        yield turn, shown, known


def replayed(model, turns, turn, shown, known):
    """Return the reference of a session up to a turn, and how many answer tokens it forgot."""
    predictors = predictors_of(model)
    predictors.text_predictor = Foreseen(predictors.text_predictor, known)
    expected = reference(
        shown,
        turn,
        scorer="predictor",
        predictors=predictors,
        text_keep=True,
        prompt_tokens=len(turns[0].prompt_token_ids),
        rate=RATE,
    )
    asked = torch.tensor([token is None for token in known])
    return expected, int((~expected.decisions[asked]).sum())


def assert_follows(model, asks, turns):
    """Fail unless a session's answers are the reference's; return how many tokens it forgot."""
    forgotten = 0
    for number, (turn, *known) in enumerate(known_of(model, asks, turns)):
        expected, forgotten = replayed(model, turns, turn, *known)
        assert worst(turn, expected) < TOLERANCE, number
    return forgotten


@pytest.mark.parametrize("at_once", [False, True])
def test_images_of_later_turns_give_their_own_blocks_back(at_once):
    with pruned(FREED, limit_mm_per_prompt={"image": 4}) as llm:
        turns, images = session(llm, TURNS, at_once=at_once), ()
        for ask, turn in zip(TURNS, turns, strict=True):
            images += ask.images
            assert worst(turn, reference(SimpleNamespace(images=images), turn)) < TOLERANCE
        for first, second, third in zip(*(turn.given_back for turn in turns), strict=True):
            # Some more with each image.
            assert 0 < first < second < third - 1
        assert_idle(llm)
        assert_forgotten(llm)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("frees", [False, True])
def test_what_was_forgotten_stays_so_and_what_comes_is_kept(model, frees, at_once):
    with pruned(TEXT | {"free_hole_blocks": frees}, model) as llm:
        turns = session(llm, SPOKEN, temperature=1, at_once=at_once)
        assert assert_follows(model, SPOKEN, turns) > TOKENS / 2
        assert_idle(llm)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("frees", [False, True])
def test_images_behind_forgotten_tokens(model, frees, at_once):
    options = TEXT | {"free_hole_blocks": frees}
    with pruned(options, model, limit_mm_per_prompt={"image": 5}) as llm:
        turns = session(llm, SHOWN, temperature=1, at_once=at_once)
        assert assert_follows(model, SHOWN, turns) > TOKENS / 2
        assert_idle(llm)


def at_token(turn, number):
    """Return a turn up to a token of its answer, and from there on, the rest being prompt."""
    [answer] = turn.outputs
    ids, logprobs = answer.token_ids, answer.logprobs
    before = SimpleNamespace(token_ids=ids, logprobs=logprobs[:number])
    after = SimpleNamespace(token_ids=ids[number:], logprobs=logprobs[number:])
    shown = [*turn.prompt_token_ids, *ids[:number]]
    return (
        SimpleNamespace(prompt_token_ids=turn.prompt_token_ids, outputs=[before]),
        SimpleNamespace(prompt_token_ids=shown, outputs=[after]),
    )


@pytest.mark.parametrize("frees", [False, True])
def test_a_session_that_is_preempted_forgets_nothing_of_earlier_answers(model, frees):
    options, half = TEXT | {"free_hole_blocks": frees}, TOKENS // 2
    with pruned(options, model, limit_mm_per_prompt={"image": 5}) as llm:
        one, turns = Session(llm, temperature=1), []
        for ask in SHOWN:
            one.send(ask)
            turns.append(one.turn(preempted_at=half if ask is SHOWN[-1] else None))
        one.close()
        *_, (turn, shown, known) = known_of(model, SHOWN, turns)
        before, after = at_token(turn, half)
        expected, _ = replayed(model, turns, turn, shown, known)
        assert worst(before, expected) < TOLERANCE
        assert worst(after, expected) > TOLERANCE
        behind = len(turn.prompt_token_ids) - len(turns[0].prompt_token_ids)
        kept = [token is not False for token in known[:behind]]
        anew, forgotten = replayed(model, turns, turn, shown, kept + known[behind:])
        assert worst(after, anew) < TOLERANCE
        assert forgotten > 3
        assert_idle(llm)
        assert_forgotten(llm)
