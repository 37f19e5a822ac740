"""Behind an image, a blended prompt's blocks are found by the same image, and by no other."""

import pytest
from vision import tiny_qwen_vl

from tests.engine.kvshare_engine import (
    BLOCK,
    EXACT,
    LOGPROBS,
    NEUTRAL,
    assert_stock,
    logprob_error,
    plans,
    served,
    tokens_of,
    whole,
)
from tests.engine.kvshare_images import TEXTS, with_images

pytestmark = pytest.mark.engine

TOKENS = 12
# All images are of one size; these texts are blended, the others computed.
BEFORE = [TEXTS[1], TEXTS[0]]
TEXT = whole(sum(map(len, BEFORE)) + 1)


def seen(*images):
    """A prompt with these images, text between them and a question."""
    parts = [part for image in images for part in (image, TEXTS[2][:50])]
    return with_images(*BEFORE, *parts, [9, 10])


PROMPTS = {images: seen(*images) for images in ("a", "b", "ab", "aa", "ba")}


def ask(engine, *prompts, extra=None):
    """Greedy answers to prompts that come at once."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=LOGPROBS, extra_args=extra
    )
    return engine.llm.generate(list(prompts), params, use_tqdm=False)


@pytest.fixture(scope="module")
def engine():
    model = tiny_qwen_vl("qwen2_vl", layers=4, vocab=512)
    with served(NEUTRAL, model=model, max_model_len=1024) as engine:
        yield engine


@pytest.fixture(scope="module")
def exact(engine):
    """What is answered with nothing reused, by the prompt's images."""
    found = {images: ask(engine, one, extra=EXACT)[0] for images, one in PROMPTS.items()}
    assert len({tuple(tokens) for tokens in tokens_of(found.values())}) == len(found)
    return found


@pytest.fixture
def blended(engine, exact):
    """The engine, which has blended the text before an image; and who is blended next."""
    engine.forget()
    engine.greedy([TEXTS[0] + TEXTS[1] + [7, 8]])
    [output] = ask(engine, PROMPTS["a"])
    assert output.num_cached_tokens == TEXT
    assert_right([output], [exact["a"]])
    with plans(engine) as put_together:
        yield engine, put_together
    engine.assert_idle()


def assert_right(outputs, expected):
    assert_stock(outputs, tokens_of(expected), TOKENS)
    assert logprob_error(outputs, expected) < 1e-3


def test_the_same_image_finds_what_is_behind_it(blended, exact):
    engine, put_together = blended
    [output] = ask(engine, PROMPTS["a"])
    assert output.num_cached_tokens == whole(len(output.prompt_token_ids)) > TEXT + BLOCK
    assert not put_together
    assert_right([output], [exact["a"]])


def test_another_image_of_the_same_shape_finds_what_is_before_it(blended, exact):
    engine, put_together = blended
    for again in (False, True):
        [output] = ask(engine, PROMPTS["b"])
        assert len(output.prompt_token_ids) == len(exact["a"].prompt_token_ids)
        assert output.num_cached_tokens == (whole(len(output.prompt_token_ids)) if again else TEXT)
        assert_right([output], [exact["b"]])
    assert not put_together
    assert_right(ask(engine, PROMPTS["a"]), [exact["a"]])


def test_of_two_images_both_are_told_apart(blended, exact):
    engine, put_together = blended
    [both] = ask(engine, PROMPTS["ab"])
    # The second image comes where the first prompt ends with its question.
    second = len(exact["a"].prompt_token_ids) - 2
    assert both.num_cached_tokens == whole(second + 1)
    others = [ask(engine, PROMPTS[images])[0] for images in ("aa", "ba")]
    assert [output.num_cached_tokens for output in others] == [whole(second + 1), TEXT]
    assert_right([both, *others], [exact[images] for images in ("ab", "aa", "ba")])
    assert not put_together


def test_who_comes_at_once_shares_the_text_and_not_the_image(blended, exact):
    engine, put_together = blended
    assert engine.llm.reset_prefix_cache()
    outputs = ask(engine, *(PROMPTS[images] for images in ("a", "b", "a", "ba")))
    assert len(put_together) == 1
    assert_right(outputs, [exact[images] for images in ("a", "b", "a", "ba")])


def test_the_next_turn_goes_on_behind_the_image(blended, exact):
    engine, put_together = blended
    answer = [token for token in exact["a"].outputs[0].token_ids if token > 8]
    turns = []
    for image in "ab":
        one = PROMPTS[image]
        turns.append(one | {"prompt_token_ids": [*one["prompt_token_ids"], *answer, *TEXTS[3]]})
    [same, other] = [ask(engine, turn)[0] for turn in turns]
    assert same.num_cached_tokens >= whole(len(exact["a"].prompt_token_ids))
    assert other.num_cached_tokens == TEXT
    assert not put_together
    assert_right([same, other], [ask(engine, turn, extra=EXACT)[0] for turn in turns])
