"""Masked attention and the reference of Dynamic-LLaVA: both equal removal of the dropped rows.

The oracle is transformers' own forward pass of the whole model, in which hooks hide the dropped
tokens' columns from layer l on. It shares no code with what is tested.
"""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from transformers import GPT2Config, LlavaForConditionalGeneration, MistralConfig, Qwen2Config
from vision import IMAGE_TOKEN, PATCHES, WIDTH, tiny_llava

from vllm_plugins.errors import PluginError
from vllm_plugins.training.batches import Batch
from vllm_plugins.visual_tokens.dynamic_llava.decoder import Decoder, check_model
from vllm_plugins.visual_tokens.dynamic_llava.evaluation import Dropping, answer, summary
from vllm_plugins.visual_tokens.dynamic_llava.masked_attention import (
    attention_forward,
    masked_softmax,
    register,
)
from vllm_plugins.visual_tokens.dynamic_llava.predictors import Predictors
from vllm_plugins.visual_tokens.dynamic_llava.reference import reference_logits
from vllm_plugins.visual_tokens.dynamic_llava.sparse_config import SparseConfig
from vllm_plugins.visual_tokens.dynamic_llava.student import training_mask

LAYERS, LAYER = 4, 2
CONFIG = SparseConfig(d_model=32, nhead=4, dim_feedforward=64)
# transformers normalises in float32 whatever the model's precision is.
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    folder = tiny_llava(layers=LAYERS)
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def predictors():
    torch.manual_seed(1)
    made = Predictors(WIDTH, CONFIG).double()
    with torch.no_grad():
        # Logits of either sign, so that the text predictor drops about half.
        rows = made.text_predictor(torch.randn(1000, WIDTH, dtype=torch.float64))
        made.text_predictor.head[4].bias.sub_(rows.median(0).values)
    return made


def make_request(images, before, answer=12, seed=0):
    """Token ids with so many words before each image, and pixels."""
    draw = torch.Generator().manual_seed(seed)
    ids = [1]
    for _ in range(images):
        ids += torch.randint(4, 64, (before,), generator=draw).tolist() + [IMAGE_TOKEN] * PATCHES
    ids += torch.randint(4, 64, (5 + answer,), generator=draw).tolist()
    pixels = torch.randn(images, 3, 56, 56, generator=draw, dtype=torch.float64)
    return torch.tensor(ids), pixels


@contextmanager
def hidden_columns(model, seen):
    """Let layers from l on hide columns from all rows but their own; `seen` is bool, (n,)."""

    def hide(module, args, kwargs):
        n = len(seen)
        visible = torch.ones(n, n).tril().bool() & (seen | torch.eye(n).bool())
        mask = torch.zeros(n, n, dtype=torch.float64).masked_fill(~visible, -math.inf)
        return args, kwargs | {"attention_mask": mask[None, None]}

    layers = model.model.language_model.layers[LAYER:]
    hooks = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def whole(model, ids, pixels, seen=None):
    """Logits of transformers' own pass, and the input of layer l."""
    seen = torch.ones(len(ids), dtype=torch.bool) if seen is None else seen
    with hidden_columns(model, seen):
        out = model(input_ids=ids[None], pixel_values=pixels, output_hidden_states=True)
    return out.logits[0], out.hidden_states[LAYER][0]


def expected_kept(scores, start, end, wanted, size):
    """The note's formula of the hole, by itself; its tail holds the image's last row always."""
    tail = end % size or size
    first = math.ceil((start + max(0, wanted - tail)) / size)
    if (end - tail) // size - first <= 0:
        return list(range(start, end))
    chosen = scores[: end - start - tail].topk(first * size - start).indices
    return sorted(start + i for i in chosen.tolist()) + list(range(end - tail, end))


def test_weights_are_the_formula():
    torch.manual_seed(0)
    scores = torch.randn(2, 5, 5, dtype=torch.float64) * 3
    keep = torch.tensor([[1.0, 0, 1, 0, 1], [0, 0.25, 1, 1, 1]], dtype=torch.float64)
    visible = torch.ones(5, 5).tril().bool()
    for epsilon in (0.0, 1e-6, 0.1):
        found = masked_softmax(scores, keep, visible, epsilon)
        for b, i in ((b, i) for b in range(2) for i in range(5)):
            shift = max(scores[b, i, j].item() for j in range(i + 1))
            e = [
                math.exp(scores[b, i, j] - shift) * (1 if i == j else keep[b, j].item())
                for j in range(i + 1)
            ]
            row = [(x + epsilon / (i + 1)) / (sum(e) + epsilon) for x in e] + [0.0] * (4 - i)
            torch.testing.assert_close(found[b, i], torch.tensor(row, dtype=torch.float64))


def test_smoothing_shows_nothing_of_the_future():
    visible = torch.ones(6, 6).tril().bool()
    found = masked_softmax(torch.randn(6, 6), torch.rand(6), visible, epsilon=0.5)
    assert (found[~visible] == 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(6))


def test_gradient_reaches_dropped_tokens_and_is_right():
    torch.manual_seed(0)
    scores = torch.randn(1, 6, 6, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([[1.0, 0, 1, 0, 1, 0]], dtype=torch.float64, requires_grad=True)
    visible = torch.ones(6, 6).tril().bool()
    assert torch.autograd.gradcheck(lambda s, m: masked_softmax(s, m, visible), (scores, keep))
    weights = torch.randn(1, 6, 6, dtype=torch.float64)
    (masked_softmax(scores, keep, visible) * weights).sum().backward()
    # Nobody sees the last token but itself; every other decision matters, dropped ones too.
    assert (keep.grad[0, :5] != 0).all() and keep.grad[0, 5] == 0


def test_heads_that_share_keys_attend_alike_with_and_without_a_mask():
    torch.manual_seed(0)
    query = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 7, 8, dtype=torch.float64)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    own, _ = attention_forward(
        module, query, key, value, None, keep=torch.ones(2, 7), epsilon=0.0, scaling=0.3
    )
    theirs, _ = attention_forward(module, query, key, value, None, scaling=0.3)
    torch.testing.assert_close(own, theirs)
    assert own.shape == (2, 7, 4, 8)


def test_padding_is_not_seen_and_no_row_is_blind():
    mask = training_mask(torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))
    assert mask.shape == (2, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert not training_mask(torch.tensor([[1, 0, 0]]))[0, 0, 2, 1]


@pytest.mark.parametrize("images", [1, 2])
def test_masked_layers_equal_removal_for_kept_rows(model, images):
    """Training's view of a batch, with epsilon 0, against rows that are really gone."""
    ids, pixels = make_request(images, 3)
    torch.manual_seed(3)
    dropped = (torch.rand(len(ids)) < 0.5) & (ids == IMAGE_TOKEN)
    decoder, positions = Decoder(model), torch.arange(len(ids))[None]
    mask = training_mask(torch.ones_like(ids)[None])
    before = model.model.language_model.config._attn_implementation
    model.model.language_model.set_attn_implementation(register())
    try:
        with torch.no_grad():
            hidden = decoder.embed(ids[None], decoder.image_features(pixels))
            hidden = decoder.run(hidden, range(LAYER), positions, mask)
            keep = (~dropped)[None].double()
            masked = {
                epsilon: decoder.logits(
                    decoder.run(
                        hidden, range(LAYER, LAYERS), positions, mask, keep=keep, epsilon=epsilon
                    )
                )[0]
                for epsilon in (0.0, 1e-6)
            }
            rows = (~dropped).nonzero().flatten()
            removed = decoder.run(
                hidden[:, rows], range(LAYER, LAYERS), rows[None], mask[:, :, rows][..., rows]
            )
            removed = decoder.logits(removed)[0]
    finally:
        model.model.language_model.set_attn_implementation(before)
    torch.testing.assert_close(masked[0.0][rows], removed, **CLOSE)
    torch.testing.assert_close(masked[1e-6][rows], removed, rtol=0, atol=1e-3)
    torch.testing.assert_close(masked[0.0], whole(model, ids, pixels, ~dropped)[0], **CLOSE)


def test_reference_without_dropping_is_the_model(model, predictors):
    ids, pixels = make_request(2, 3)
    found = reference_logits(
        model, predictors, ids, sparse_layer=LAYER, keep_rate=1.0, pixel_values=pixels
    )
    torch.testing.assert_close(found.logits, whole(model, ids, pixels)[0], **CLOSE)
    assert found.kept.tolist() == list(range(len(ids)))
    assert len(found.decisions) == 0


@pytest.mark.parametrize("rate", [0.2, 0.5])
@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize(("images", "block_size"), [(1, None), (1, 4), (3, 4), (2, 32)])
def test_reference_removes_what_the_predictor_ranks_low(
    model, predictors, images, before, block_size, rate
):
    ids, pixels = make_request(images, before, seed=before)
    _, inputs = whole(model, ids, pixels)
    spans = (ids == IMAGE_TOKEN).nonzero().view(images, PATCHES)
    wanted = int(PATCHES * rate)
    seen = ids != IMAGE_TOKEN
    for span, logits in zip(spans, predictors.image_predictor(inputs[spans]), strict=True):
        scores = logits.log_softmax(-1)[:, 0]
        if block_size is None:
            seen[span[scores.topk(wanted).indices]] = True
        else:
            start, end = span[0].item(), span[-1].item() + 1
            seen[expected_kept(scores, start, end, wanted, block_size)] = True
    found = reference_logits(
        model,
        predictors,
        ids,
        sparse_layer=LAYER,
        keep_rate=rate,
        pixel_values=pixels,
        block_size=block_size,
    )
    assert found.kept.tolist() == seen.nonzero().flatten().tolist()
    torch.testing.assert_close(found.logits, whole(model, ids, pixels, seen)[0][seen], **CLOSE)


def test_scorers_of_ones_own_and_given_features_are_used(model):
    ids, pixels = make_request(1, 4)
    features = Decoder(model).image_features(pixels)
    found = reference_logits(
        model,
        None,
        ids,
        sparse_layer=LAYER,
        keep_rate=0.25,
        image_features=features,
        scorer=lambda hidden: -torch.arange(PATCHES).expand(hidden.shape[:2]),
    )
    dropped = range(5 + 4, 5 + PATCHES)
    assert found.kept.tolist() == [i for i in range(len(ids)) if i not in dropped]


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_equation_six_is_replayed_token_by_token(model, predictors, rate):
    """Forgotten tokens are seen by none but themselves, and decisions come from layer l's input."""
    ids, pixels = make_request(1, 3, answer=20)
    prompt = len(ids) - 20
    found = reference_logits(
        model,
        predictors,
        ids,
        sparse_layer=LAYER,
        keep_rate=rate,
        pixel_values=pixels,
        text_keep=True,
        prompt_tokens=prompt,
    )
    logits = predictors.text_predictor(whole(model, ids, pixels)[1][prompt:])
    decisions = logits[:, 0] > logits[:, 1]
    assert 0 < decisions.sum() < 20
    assert found.decisions.tolist() == decisions.tolist()
    seen = torch.zeros(len(ids), dtype=torch.bool)
    seen[found.kept] = True
    assert seen[prompt:].all()
    rows = seen.clone()
    seen[prompt:] = decisions
    torch.testing.assert_close(found.logits, whole(model, ids, pixels, seen)[0][rows], **CLOSE)


def test_every_second_token_is_forgotten(model, predictors):
    """A fixed pattern, in which no hidden state plays a part."""
    calls = []

    class Pattern(torch.nn.Module):
        def forward(self, hidden):
            calls.append(len(hidden))
            return torch.tensor([[float(len(calls) % 2), 0.5]])

    pattern = Predictors(WIDTH, CONFIG)
    pattern.text_predictor = Pattern()
    ids, pixels = make_request(1, 3, answer=6)
    prompt = len(ids) - 6
    options = {"sparse_layer": LAYER, "keep_rate": 1.0, "pixel_values": pixels}
    found = reference_logits(model, pattern, ids, **options, text_keep=True, prompt_tokens=prompt)
    assert calls == [1] * 6
    assert found.decisions.tolist() == [True, False] * 3
    seen = torch.ones(len(ids), dtype=torch.bool)
    seen[prompt + 1 :: 2] = False
    torch.testing.assert_close(found.logits, whole(model, ids, pixels, seen)[0], **CLOSE)


def test_reference_says_what_it_lacks(model, predictors):
    ids, pixels = make_request(1, 3)
    options = {"sparse_layer": LAYER, "pixel_values": pixels, "keep_rate": 0.5}
    with pytest.raises(ValueError, match="prompt_tokens"):
        reference_logits(model, predictors, ids, **options, text_keep=True)
    with pytest.raises(ValueError, match="no image predictor"):
        reference_logits(model, None, ids, **options)
    options["keep_rate"] = 1.0
    with pytest.raises(ValueError, match="no text predictor"):
        reference_logits(model, None, ids, **options, text_keep=True, prompt_tokens=20)
    with pytest.raises(ValueError, match="16 image tokens, but features for 32"):
        two = {**options, "pixel_values": pixels.repeat(2, 1, 1, 1)}
        reference_logits(model, None, ids, **two)


def conversation(ids, pixels, answers):
    """A batch of one conversation whose answers are at these positions."""
    mask = torch.zeros(len(ids), dtype=torch.bool)
    for span in answers:
        mask[span] = True
    return Batch(
        ids[None],
        torch.ones_like(ids)[None],
        mask[None],
        (ids == IMAGE_TOKEN)[None],
        torch.tensor([mask.int().argmax()]),
        torch.zeros(1, dtype=torch.int64),
        {"pixel_values": pixels},
    )


@pytest.mark.parametrize("rate", [1.0, 0.4])
@pytest.mark.parametrize("text_keep", [False, True])
def test_evaluation_computes_at_once_what_the_reference_does_step_by_step(
    model, predictors, rate, text_keep
):
    ids, pixels = make_request(1, 3, answer=20)
    prompt = len(ids) - 20
    dropping = Dropping(rate, text_keep=text_keep, long_answer=20)
    batch = conversation(ids, pixels, [slice(prompt, None)])
    found = answer(model, predictors, LAYER, batch, dropping)
    reference = reference_logits(
        model,
        predictors,
        ids,
        sparse_layer=LAYER,
        keep_rate=rate,
        pixel_values=pixels,
        text_keep=text_keep,
        prompt_tokens=prompt,
    )
    logits = reference.logits[-21:-1]
    losses = torch.nn.functional.cross_entropy(logits, ids[prompt:], reduction="none")
    torch.testing.assert_close(found.losses, losses, **CLOSE)
    if text_keep:
        assert 0 < found.decided.sum() < 20
    assert found.decided.tolist() == reference.decisions.tolist()


def test_answers_count_as_right_only_whole_and_each_turn_by_itself(model):
    ids, pixels = make_request(1, 3, answer=14, seed=1)
    n = len(ids)
    turns = [slice(n - 14, n - 10), slice(n - 7, n - 5), slice(n - 3, n)]
    with torch.no_grad():
        for span in turns:
            for i in range(span.start, span.stop):
                logits, _ = whole(model, ids, pixels)
                ids[i] = logits[i - 1].argmax()
        assert (ids[-14:] != IMAGE_TOKEN).all()
        assert answer(model, None, LAYER, conversation(ids, pixels, turns), Dropping()).right.all()
        ids[n - 6] = 4 + (ids[n - 6] + 1) % 50
        found = answer(model, None, LAYER, conversation(ids, pixels, turns[:2]), Dropping())
    assert found.right.tolist() == [True, False]
    assert len(found.losses) == 6 and len(found.decided) == 0
    figures = summary([found, found])
    assert figures["right"] == 0.5 and "text_kept" not in figures
    assert figures["cross_entropy"] == pytest.approx(found.losses.mean().item())


@pytest.mark.parametrize(
    ("change", "layer", "message"),
    [
        ({}, 4, "has 4 layers, so none at sparse_layer 4; choose a layer from 1 to 3"),
        ({"text_config": GPT2Config()}, 2, "use a llava model on one of llama, mistral, qwen2"),
        ({"text_config": MistralConfig(sliding_window=8)}, 2, "has layers with windowed attention"),
        ({"text_config": Qwen2Config(use_sliding_window=True)}, 2, "has layers with windowed"),
    ],
)
def test_models_that_cannot_be_run_by_layers_are_refused(model, change, layer, message):
    config = copy.deepcopy(model.config)
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(PluginError) as refused:
        check_model(config, layer, "MODEL")
    assert message in str(refused.value)
