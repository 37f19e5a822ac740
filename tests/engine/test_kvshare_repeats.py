"""Prompts that repeat a blended one, or go on from it, find its blocks in vLLM's own cache."""

import pytest

from tests.engine.kvshare_engine import (
    BLOCK,
    DOCS,
    EXACT,
    LOGPROBS,
    NEUTRAL,
    PROMPTS,
    after_a_blend,
    assert_stock,
    logprob_error,
    prompt,
    served,
    stock_outputs,
    tokens_of,
    whole,
)
from tests.models import plugin_samples

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def neutral(stock):
    with served(NEUTRAL) as engine:
        yield engine


@pytest.fixture
def blended(neutral):
    with after_a_blend(neutral) as found:
        yield found


def counted():
    """Tokens that were found on a chain that is not exact."""
    name = "vllm_plugins:kvshare_repeated_tokens_total"
    return sum(one.value for one in plugin_samples() if one.name == name)


def test_a_repeated_prompt_is_not_blended_again(blended, stock):
    engine, put_together = blended
    before = counted()
    outputs = engine.greedy([PROMPTS[1]], logprobs=LOGPROBS)
    assert not put_together
    assert outputs[0].num_cached_tokens == whole(len(PROMPTS[1]))
    assert_stock(outputs, stock[1:2])
    assert logprob_error(outputs, stock_outputs()[1:2]) < 1e-3
    # The first token is another one than that of the earlier prompt.
    assert counted() - before == whole(len(PROMPTS[1]))


def test_who_comes_while_it_is_blended_waits_for_that(blended, stock):
    """As the answers of one request do that asks for several."""
    engine, put_together = blended
    outputs = engine.greedy([PROMPTS[2], PROMPTS[4], PROMPTS[4], PROMPTS[2], PROMPTS[4]])
    assert len(put_together) == 2
    assert_stock(outputs, [stock[i] for i in (2, 4, 4, 2, 4)])
    assert not engine.side._chains._blending


def test_who_comes_while_its_exact_head_is_loaded_waits_too(blended, stock):
    """Where nobody's head is in the prefix cache, as for the answers of one request."""
    from vllm import SamplingParams

    engine, put_together = blended
    assert engine.llm.reset_prefix_cache()
    text = prompt(0, 2, 1, question=33)
    several = SamplingParams(n=3, temperature=1, top_k=1, max_tokens=6, ignore_eos=True)
    [output] = engine.llm.generate([{"prompt_token_ids": text}], several, use_tqdm=False)
    assert len(put_together) == 1
    [alone] = engine.greedy([text], extra=EXACT)
    assert 0 < alone.num_cached_tokens <= len(DOCS[0])
    assert [answer.token_ids for answer in output.outputs] == tokens_of([alone]) * 3


def test_who_waits_for_one_that_is_aborted_is_blended(blended, stock):
    engine, put_together = blended
    first, _ = (engine.add(PROMPTS[4]) for _ in range(2))
    while not put_together:
        engine.engine.step()
    engine.engine.abort_request([first], internal=True)
    while engine.engine.has_unfinished_requests():
        outputs = engine.engine.step()
    assert [output.request_id for output in outputs] == ["r2"]
    assert_stock(outputs, [stock[4]])
    assert len(put_together) == 2


def test_several_at_once_share_the_blocks(blended, stock):
    engine, put_together = blended
    outputs = engine.greedy([PROMPTS[1]] * 3 + [PROMPTS[5]], tokens=40)
    assert not put_together
    assert_stock(outputs, [stock[1]] * 3 + [stock[5]], 40)


def test_the_next_turn_goes_on_from_prompt_and_answer(blended, stock):
    engine, put_together = blended
    [answer] = engine.greedy([PROMPTS[1]], tokens=70)
    turn = PROMPTS[1] + list(answer.outputs[0].token_ids) + [3, 4, 5]
    [output] = engine.greedy([turn])
    # Of the last token that was generated no KV is computed.
    assert output.num_cached_tokens == whole(len(turn) - 3)
    assert not put_together
    [exact] = engine.greedy([turn], extra=EXACT)
    assert tokens_of([output]) == tokens_of([exact])
    # With another document the turn is blended behind what was blended before.
    more = turn + prompt(0)
    [output] = engine.greedy([more])
    assert put_together
    [exact] = engine.greedy([more], extra=EXACT)
    assert tokens_of([output]) == tokens_of([exact])
    put_together.clear()
    [again] = engine.greedy([more])
    assert not put_together
    assert again.num_cached_tokens == whole(len(more))
    assert tokens_of([again]) == tokens_of([exact])


def test_exact_kv_is_never_taken_from_there_and_goes_before_it(blended):
    engine, put_together = blended
    assert engine.greedy([PROMPTS[1]], extra=EXACT)[0].num_cached_tokens < BLOCK
    # Both are in the prefix cache now; who may have either gets what is exact.
    repeated = counted()
    [output] = engine.greedy([PROMPTS[1]])
    assert counted() == repeated
    assert not put_together
    assert output.num_cached_tokens == whole(len(PROMPTS[1]))


def test_who_is_too_short_to_be_blended_is_computed(blended):
    """Less than `min_reuse` behind the hit, which is nothing here."""
    engine, put_together = blended
    [output] = engine.greedy([PROMPTS[1][: BLOCK + 20]])
    assert output.num_cached_tokens == 0 and not put_together


def test_another_salt_finds_none_of_it(blended):
    engine, _ = blended
    [output] = engine.greedy([PROMPTS[1]], salt="bob")
    assert output.num_cached_tokens == 0


def test_it_is_blended_anew_once_the_blocks_are_gone(blended, stock):
    engine, put_together = blended
    assert engine.llm.reset_prefix_cache()
    assert_stock(engine.greedy([PROMPTS[1]]), stock[1:2])
    assert put_together
    put_together.clear()
    assert_stock(engine.greedy([PROMPTS[1]]), stock[1:2])
    assert not put_together


def test_what_was_computed_behind_it_is_stored_as_approximate(blended):
    """Else a later prompt would take it for what a full prefill gives."""
    engine, _ = blended
    before = set(engine.side.index)
    turn = PROMPTS[1] + list(range(100, 300))
    engine.greedy([turn])
    new = [engine.side.index.get(key) for key in set(engine.side.index) - before]
    assert {segment.generation for segment in new} == {1}
    # The first turn's last tokens fill no block, and are in nobody's.
    assert min(segment.position for segment in new) >= whole(len(PROMPTS[1]))
    assert sum(map(len, new)) == len(turn) - min(segment.position for segment in new)
