"""Image tokens dropped in the middle of a LLaVA on the real engine, against plain torch."""

from dataclasses import replace

import pytest
import torch
from vision import tiny_llava

from tests.engine.dynamic_llava_engine import (
    BLOCK,
    ENGINE,
    LAYER,
    PIXELS,
    RATE,
    TOKENS,
    TOLERANCE,
    Ask,
    answers,
    assert_equal,
    assert_idle,
    folder,
    pixels,
    plain_model,
    predictors_of,
    pruned,
    reference,
    sampling,
    with_predictors,
    worst,
    worst_of_allowed,
)
from tests.engine.grammars import KINDS, assert_follows, constrained, json_words
from tests.models import make_engine, plugin_samples, preemptions, scheduler_of, worker_of

pytestmark = pytest.mark.engine

MIXED = [
    Ask(7, (0,), 9),
    Ask(40, (), 3),
    Ask(1, (1,), 30),
    Ask(20, (2, 3), 5),
    Ask(3, (4, 0, 1), 12),
    Ask(90, (), 40),
]


def tally(llm):
    return worker_of(llm).model_runner.get_model().tally


@pytest.fixture(scope="module")
def stock():
    """Stock vLLM's answers, with log-probabilities."""
    with make_engine(folder(), **ENGINE) as llm:
        return answers(llm, MIXED, tokens=8)


@pytest.fixture(scope="module")
def llm(stock):
    with pruned(tokenizer=str(json_words())) as engine:
        yield engine


def test_a_rate_of_one_is_stock(stock):
    with pruned({"image_keep_rate": 1.0}) as llm:
        ours = answers(llm, MIXED, tokens=8)
        assert_idle(llm)
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
        for a, b in zip(mine.outputs[0].logprobs, theirs.outputs[0].logprobs, strict=True):
            assert {k: v.logprob for k, v in a.items()} == pytest.approx(
                {k: v.logprob for k, v in b.items()}, abs=1e-5
            )


def test_dropping_changes_what_stock_says(llm, stock):
    """Else the other tests would show nothing."""
    outputs = answers(llm, MIXED, tokens=8)
    for ask, output, theirs in zip(MIXED, outputs, stock, strict=True):
        first, other = output.outputs[0].logprobs[0], theirs.outputs[0].logprobs[0]
        shared = first.keys() & other.keys()
        moved = max(abs(first[k].logprob - other[k].logprob) for k in shared)
        assert (moved > 0.01) == bool(ask.images)
    llm.reset_prefix_cache()


def test_every_position_of_an_image_in_its_blocks(llm):
    """Start and end of an image run through all residues of the block size."""
    asks = [Ask(before, (before % 3,), 5 + before % 7, start=before) for before in range(BLOCK)]
    starts = {(1 + ask.before) % BLOCK for ask in asks}
    assert len(starts) == BLOCK and {(s + TOKENS) % BLOCK for s in starts} == starts
    assert_equal(asks, answers(llm, asks))
    assert_idle(llm)


def test_a_batch_of_several_images_and_of_none(llm):
    before = vars(tally(llm)).copy()
    outputs = answers(llm, MIXED, tokens=8)
    assert_equal(MIXED, outputs)
    after = vars(tally(llm))
    # Seven images; the first steps of all requests are one.
    assert after["kept"] + after["dropped"] - before["kept"] - before["dropped"] == 7 * TOKENS
    assert after["dropped"] - before["dropped"] == BLOCK * (after["hidden"] - before["hidden"])
    assert_idle(llm)
    alone = [answers(llm, [ask], tokens=8)[0] for ask in MIXED]
    assert_equal(MIXED, alone)
    assert_idle(llm)


@pytest.mark.parametrize("shared", [2, 5, 40, TOKENS + 10, TOKENS + 60])
def test_prefix_hits_before_inside_and_behind_the_image(llm, shared):
    """A first request leaves blocks that a second one begins with, and reads with their holes."""
    first = Ask(40, (0,), 80)
    ids = first.prompt["prompt_token_ids"]
    # The second departs in the text before the image, or in that behind it.
    if shared <= 40:
        second = Ask(40, (0,), 60, start=7 if shared == 40 else 9)
    else:
        second = Ask(40, (0,), shared - TOKENS)
    assert len(ids) > 80
    answers(llm, [first])
    [output] = answers(llm, [second])
    assert_equal([second], [output])
    if shared >= 40:
        assert output.num_cached_tokens >= BLOCK
    assert_idle(llm)


def leave_blocks(llm, ask, blocks):
    """Compute a prompt and leave only its first blocks in the prefix cache."""
    from vllm import SamplingParams

    engine, manager = llm.llm_engine, scheduler_of(llm).kv_cache_manager
    engine.add_request("first", ask.prompt, SamplingParams(max_tokens=3, ignore_eos=True))
    engine.step()
    [running] = scheduler_of(llm).running
    [held] = manager.get_block_ids(running.request_id)
    engine.abort_request(["first"])
    while engine.has_unfinished_requests():
        engine.step()
    manager.block_pool.evict_blocks(set(held[blocks:]))


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_hits_that_end_inside_the_hole_drop_the_rest_of_it(llm, blocks):
    """The image begins in block 0 and its hole is blocks 1 to 3: nothing is chosen anew."""
    ask = Ask(7, (5,), 40)
    leave_blocks(llm, ask, blocks)
    before = tally(llm).partial
    [output] = answers(llm, [ask])
    assert output.num_cached_tokens == blocks * BLOCK
    assert_equal([ask], [output])
    assert tally(llm).partial == before
    assert_idle(llm)


def test_a_hit_that_ends_among_the_chosen_chooses_from_the_rest(llm):
    """Of an image over 20 to 164, tokens 0 to 43 are chosen, of which 12 are in the cache."""
    ask = Ask(20, (5,), 40)
    leave_blocks(llm, ask, 1)
    before = vars(tally(llm)).copy()
    [output] = answers(llm, [ask])
    assert output.num_cached_tokens == BLOCK
    after = tally(llm)
    assert after.partial == before["partial"] + 1
    # Slots 32 to 63 are filled anew, 64 to 159 are the hole and 160 to 163 the tail.
    assert (after.kept - before["kept"], after.dropped - before["dropped"]) == (32 + 4, 96)
    [again] = answers(llm, [ask])
    assert again.outputs[0].token_ids == output.outputs[0].token_ids
    assert_idle(llm)


def test_an_image_that_ends_the_prompt(llm):
    """Where a block ends with it too, the last row would lie in the hole; the answer needs it.

    So do requests that go on from there and find its blocks.
    """
    asks = [Ask(before, (before % 3,), 0, start=before, ends=True) for before in (15, 16, 17, 48)]
    lengths = [before + TOKENS for before in (15, 16, 17, 48)]
    assert [length % BLOCK for length in lengths] == [31, 0, 1, 0]
    for _ in range(2):
        outputs = answers(llm, asks)
        assert_equal(asks, outputs)
    # The second time all but the last block is found.
    assert outputs[1].num_cached_tokens == lengths[1] - BLOCK
    asks = [replace(ask, after=40, ends=False) for ask in asks]
    outputs = answers(llm, asks)
    assert_equal(asks, outputs)
    assert outputs[1].num_cached_tokens == lengths[1]
    assert_idle(llm)


def test_a_step_that_begins_in_a_hole(llm):
    """A hit ends there, and the step where the image does: of it the last block alone goes on."""
    ask, scheduler = Ask(16, (5,), 100), scheduler_of(llm)
    leave_blocks(llm, ask, 2)
    before, budget = vars(tally(llm)).copy(), scheduler.max_num_scheduled_tokens
    scheduler.max_num_scheduled_tokens = 16 + TOKENS - 2 * BLOCK
    try:
        [output] = answers(llm, [ask])
    finally:
        scheduler.max_num_scheduled_tokens = budget
    assert output.num_cached_tokens == 2 * BLOCK
    assert_equal([ask], [output])
    # Hidden, but of no image from which some tokens were chosen.
    assert tally(llm).hidden - before["hidden"] == 2
    assert tally(llm).dropped == before["dropped"]
    assert_idle(llm)


def test_structured_outputs_beside_others(llm):
    """Answers follow their grammars, and what these leave of logits is the reference's."""
    asks = MIXED * 2
    kinds = [KINDS[i % 4] for i in range(len(asks))]
    params = [constrained(sampling(60), kind) for kind in kinds]
    outputs = llm.generate([ask.prompt for ask in asks], params, use_tqdm=False)
    for ask, kind, output in zip(asks, kinds, outputs, strict=True):
        assert_follows(output, kind)
        found = worst if kind is None else worst_of_allowed
        assert found(output, reference(ask, output)) < TOLERANCE
    assert_idle(llm)


def test_prompt_logprobs_are_refused_for_the_one_request(llm):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="prompt_logprobs: image tokens that"):
        llm.generate([Ask(3, (60,), 4).prompt], SamplingParams(prompt_logprobs=1), use_tqdm=False)
    assert_equal(MIXED[:1], answers(llm, MIXED[:1]))
    llm.reset_prefix_cache()


def test_aborts_leave_nothing(llm):
    from vllm import SamplingParams

    engine = llm.llm_engine
    for i, ask in enumerate(MIXED):
        engine.add_request(f"gone-{i}", ask.prompt, SamplingParams(max_tokens=50, ignore_eos=True))
    for i in range(len(MIXED)):
        engine.step()
        engine.abort_request([f"gone-{i}"])
    while engine.has_unfinished_requests():
        engine.step()
    assert_idle(llm)
    assert_equal(MIXED, answers(llm, MIXED))
    assert_idle(llm)


def test_metrics_move(llm):
    model = str(llm.llm_engine.vllm_config.model_config.served_model_name)

    def counted():
        return {
            (s.name.removeprefix("vllm_plugins:dynamic_llava_"), s.labels.get("fate", "")): s.value
            for s in plugin_samples()
            if "dynamic_llava" in s.name and s.labels.get("model_name") == model
        }

    before = counted()
    answers(llm, MIXED)
    gained = {key: value - before.get(key, 0) for key, value in counted().items()}
    dropped = gained["image_tokens_total", "dropped"]
    assert dropped > 0.4 * 7 * TOKENS
    assert gained["image_tokens_total", "kept"] == 7 * TOKENS - dropped
    assert gained["hidden_blocks_total", ""] == dropped / BLOCK
    assert gained["pruned_steps_total", ""] == 1
    assert_idle(llm)


def test_small_steps_and_preemption():
    """Prompts come in chunks between which images are whole, and requests lose their blocks."""
    asks = [*MIXED, Ask(30, (5,), 90), Ask(60, (6,), 33), Ask(2, (7, 8), 50)]
    tight = {"max_num_batched_tokens": 176, "num_gpu_blocks_override": 20, "max_model_len": 600}
    # A resumed request may find its own first blocks, and would choose among the rest of an image.
    tight["enable_prefix_caching"] = False
    with pruned(**tight) as llm:
        with preemptions(llm) as seen:
            outputs = answers(llm, asks, tokens=70)
        assert any(tokens > 0 for _, tokens in seen), seen
        assert_equal(asks, outputs)
        assert_idle(llm)


def test_resumed_requests_that_find_their_own_blocks():
    """Images begin early in a block, so that no hit ends among the chosen tokens."""
    starts = (1, 4, 7, 9, 12, 15, 33, 36, 40)
    asks = [Ask(before, (before % 7,), 30 + before, start=before) for before in starts]
    tight = {"max_num_batched_tokens": 176, "num_gpu_blocks_override": 20, "max_model_len": 600}
    with pruned(**tight) as llm:
        manager, found = scheduler_of(llm).kv_cache_manager, []
        original = manager.get_computed_blocks

        def look(request):
            blocks, tokens, *more = original(request)
            if request.num_preemptions:
                found.append(tokens)
            return blocks, tokens, *more

        manager.get_computed_blocks = look
        outputs = answers(llm, asks, tokens=70)
        assert any(found), found
        assert tally(llm).partial == 0
        assert_equal(asks, outputs)
        assert_idle(llm)


def test_an_image_that_is_encoded_already_comes_whole_too():
    """Steps begin with images and would end inside them: each request's question differs."""
    asks = [Ask(1, (5,), 3 + i, start=i) for i in range(12)]
    with pruned(max_num_batched_tokens=400, enable_prefix_caching=False) as llm:
        outputs = answers(llm, asks)
        assert tally(llm).partial == 0 and tally(llm).steps > 3
        assert_equal(asks, outputs)
        assert_idle(llm)


def attention_scores(ask, ids):
    """Mean attention of layer l - 1 from the rows behind the last image, in transformers."""
    model = plain_model()
    inputs = {"input_ids": torch.tensor([ids]), "output_attentions": True}
    inputs["pixel_values"] = torch.cat([pixels(seed) for seed in ask.images])
    attention = model(**inputs).attentions[LAYER - 1][0].mean(0)
    places = (torch.tensor(ids) == model.config.image_token_id).nonzero().flatten()
    question = attention[places[-1] + 1 :][-64:]
    return question.mean(0)[places].view(len(ask.images), -1)


def test_attention_of_the_question():
    asks = [ask for ask in MIXED if ask.images] + [Ask(5, (6,), 100)]
    with pruned({"image_scorer": "attention"}) as llm:
        outputs = answers(llm, asks)
        assert_idle(llm)
    for ask, output in zip(asks, outputs, strict=True):
        scores = attention_scores(ask, output.prompt_token_ids)
        expected = reference(ask, output, scorer=lambda hidden, scores=scores: scores)
        assert worst(output, expected) < 1e-4


def test_the_trained_predictor_and_what_the_checkpoint_says(tmp_path):
    sparse = {
        "sparse_layer": 1,
        "d_model": 32,
        "nhead": 4,
        "dim_feedforward": 64,
        "num_layers": 2,
        "image_keep_rate": 0.3,
        "text_keep_rate": 1.0,
    }
    model = with_predictors(tmp_path, sparse)
    options = {"image_scorer": None, "image_keep_rate": None}
    with pruned(options, model) as llm:
        outputs = answers(llm, MIXED)
        assert_idle(llm)
    assert_equal(
        MIXED, outputs, scorer="predictor", predictors=predictors_of(model), rate=0.3, layer=1
    )


def test_a_qwen2_decoder():
    model = tiny_llava(layers=4, pixels=PIXELS, decoder="qwen2")
    with pruned(model=model) as llm:
        outputs = answers(llm, MIXED)
        assert_idle(llm)
    for ask, output in zip(MIXED, outputs, strict=True):
        assert worst(output, reference(ask, output, model=plain_model(model))) < 1e-4


def test_the_same_tokens_are_chosen_whatever_the_seed():
    """The random order is the same for all images of a size and in every engine."""
    asks = MIXED[:3]
    runs = []
    for seed in (0, 1):
        with pruned({"image_scorer": "random"}, seed=seed) as llm:
            runs.append([o.outputs[0].logprobs[0] for o in answers(llm, asks)])
    for one, other in zip(*runs, strict=True):
        assert {k: v.logprob for k, v in one.items()} == pytest.approx(
            {k: v.logprob for k, v in other.items()}, abs=1e-6
        )
    assert RATE < 1
