"""SpecVLM on the real engine: answers are the target's own, whatever the drafter sees."""

import random

import pytest
import torch

from tests.engine.specvlm_engine import (
    PROMPTS,
    assert_idle,
    drafter_of,
    engine,
    greedy,
    number_of_images,
    plain_answers,
    prompt,
    use,
)
from tests.models import preemptions, scheduler_of
from vllm_plugins.spec_decode.specvlm.settings import OPERATORS

pytestmark = pytest.mark.engine

MODES = [
    {"mode": "off"},
    {"mode": "select"},
    {"mode": "select", "select_from": ("text_only", "prune")},
    {"mode": "weighted"},
    {"mode": "concat"},
    *(
        {"mode": "static", "default_operator": operator}
        for operator in ("prune", "pool", "conv", "resample", "text_only")
    ),
]


PICKS = [{"mode": "select", "select_from": OPERATORS, "pick": name} for name in OPERATORS]


def name_of(settings):
    return "-".join(map(str, settings.values())).replace(str(OPERATORS), "all")


@pytest.fixture(scope="module")
def stock():
    return plain_answers()


@pytest.fixture(scope="module")
def drafting(stock):
    with engine({}) as llm:
        yield llm


@pytest.mark.parametrize("settings", MODES + PICKS, ids=name_of)
def test_answers_are_the_targets_in_every_mode(drafting, stock, settings):
    use(drafting, **settings)
    before = drafter_of(drafting).model.tally.images()
    assert greedy(drafting, PROMPTS) == stock
    if pick := settings.get("pick"):
        assert (drafter_of(drafting).model.tally.images() - before)[pick] > 5
    # Again, from cached prompts whose holes are those of the first time.
    assert greedy(drafting, PROMPTS[::-1]) == stock[::-1]
    assert_idle(drafting)


@pytest.mark.parametrize("before", [9, 31, 70])
@pytest.mark.parametrize("after", [0, 30, 60, 100])
def test_hits_before_inside_and_behind_an_image(drafting, before, after):
    """Two prompts agree up to the image or some way behind it; blocks of 32 cut where they do."""
    use(drafting, mode="static", default_operator="pool")
    assert_hits_change_nothing(drafting, before, after)


@pytest.mark.parametrize("settings", MODES + PICKS, ids=name_of)
def test_hits_in_every_mode(drafting, settings):
    use(drafting, **settings)
    assert_hits_change_nothing(drafting, 31, 60)


def assert_hits_change_nothing(llm, before, after):
    pair = [prompt([before, "a", after]), prompt([before, "a" if after else "b", after])]
    for number, made in enumerate(pair):
        made["prompt_token_ids"] += [5 + number] * 9
    alone = []
    for made in pair:
        assert llm.reset_prefix_cache()
        alone += greedy(llm, [made])
    for order in (pair, pair[::-1]):
        assert llm.reset_prefix_cache()
        answers = [greedy(llm, [made])[0] for made in order]
        assert answers == (alone if order is pair else alone[::-1])


def test_an_abort_in_the_middle_loses_nothing(drafting, stock):
    from vllm import SamplingParams

    use(drafting, mode="select")
    engine_ = drafting.llm_engine
    for round_ in range(4):
        for i, made in enumerate(PROMPTS):
            engine_.add_request(
                f"{round_}-{i}", made, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
            )
        for _ in range(round_ + 1):
            engine_.step()
        engine_.abort_request([f"{round_}-{i}" for i in range(0, len(PROMPTS), 2)])
        while engine_.has_unfinished_requests():
            engine_.step()
    assert_idle(drafting)
    assert greedy(drafting, PROMPTS) == stock


def test_images_and_rows_are_counted(drafting):
    tally = drafter_of(drafting).model.tally
    use(drafting, mode="static", default_operator="pool")
    before, rows = tally.images(), dict(tally.rows)
    greedy(drafting, [prompt([9, "a", 40])], 2)
    assert tally.images() - before == {"pool": 1}
    # Rows 9 to 264 are the image's, and blocks of 32 leave 23 of them before and 9 behind.
    assert tally.rows["kept"] - rows["kept"] == 9 + 23 + 9 + 41
    assert tally.rows["dropped"] - rows["dropped"] == 256 - 32
    use(drafting, mode="select")
    greedy(drafting, [prompt([9, "a", 40])], 2)
    assert (tally.images() - before).total() == 2


@pytest.mark.parametrize(("budget", "images"), [(288, 1), (512, 3)])
def test_chunked_prompts(stock, budget, images):
    arguments = {"max_num_batched_tokens": budget, "limit_mm_per_prompt": {"image": images}}
    chosen = [i for i, made in enumerate(PROMPTS) if number_of_images(made) <= images]
    with engine({}, **arguments) as llm:
        for settings in MODES + PICKS:
            use(llm, **settings)
            assert greedy(llm, [PROMPTS[i] for i in chosen]) == [stock[i] for i in chosen], settings
        assert greedy(llm, [PROMPTS[i] for i in chosen]) == [stock[i] for i in chosen]
        assert_idle(llm)


@pytest.fixture(scope="module")
def scarce(stock):
    """An engine with so few blocks that requests preempt each other."""
    with engine({"mode": "static"}, num_gpu_blocks_override=36, max_model_len=1024) as llm:
        yield llm


@pytest.mark.parametrize("settings", MODES + PICKS, ids=name_of)
def test_preemption(scarce, stock, settings):
    use(scarce, **settings)
    order = list(range(len(PROMPTS)))
    random.Random(0).shuffle(order)
    with preemptions(scarce) as seen:
        assert greedy(scarce, [PROMPTS[i] for i in order]) == [stock[i] for i in order]
    assert seen
    assert_idle(scarce)


def test_holes_end_with_the_next_regular_write(scarce):
    use(scarce, mode="static", default_operator="text_only")
    flags = drafter_of(scarce).model.view.flags[32]
    flags.zero_()
    greedy(scarce, PROMPTS)
    assert flags.any()
    # Text over all of the cache, three requests of eleven blocks at a time.
    greedy(scarce, [{"prompt_token_ids": [5 + i] * 340} for i in range(9)], 12)
    assert not flags.any()


def test_it_stops_drafting_for_large_batches(stock):
    with engine({"draft_until_batch": 2}) as llm:
        scheduler, drafted = scheduler_of(llm), {}
        original = scheduler.schedule

        def schedule(*args, **kwargs):
            output = original(*args, **kwargs)
            running = len(output.num_scheduled_tokens)
            longest = max(map(len, output.scheduled_spec_decode_tokens.values()), default=0)
            drafted[running] = max(drafted.get(running, 0), longest)
            return output

        scheduler.schedule = schedule
        assert greedy(llm, PROMPTS[:6]) == stock[:6]
        assert drafted.pop(6) == 0
        assert greedy(llm, PROMPTS[:1]) == stock[:1]
        assert drafted[1] == 5


def test_what_is_not_drafted_leaves_the_same_cache(stock):
    """Beside other requests nothing is drafted: only keys and values are computed, and rightly."""
    with engine({"draft_until_batch": 2}) as llm:
        decoder = drafter_of(llm).model.decoder
        cache, write_cache = decoder.layers[0].self_attn.attn.kv_cache, decoder.write_cache
        written = []

        def compare(positions, hidden_states):
            before = cache.clone()
            decoder(positions, hidden_states)
            full = cache.clone()
            cache.copy_(before)
            write_cache(positions, hidden_states)
            torch.testing.assert_close(cache, full, rtol=0, atol=1e-6)
            written.append(not torch.equal(cache, before))

        decoder.write_cache = compare
        assert greedy(llm, PROMPTS[:6]) == stock[:6]
        assert len(written) > 20 and all(written)
        count = len(written)
        assert greedy(llm, PROMPTS[:1]) == stock[:1]
        assert len(written) == count
