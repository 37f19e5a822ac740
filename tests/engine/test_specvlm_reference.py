"""The served drafter against plain torch in float64: the same logits, in every step of a chain."""

from functools import cache

import pytest
import torch

from tests.engine.specvlm_engine import (
    IMAGE_TOKEN,
    PATCHES,
    PROMPTS,
    drafter,
    drafter_of,
    engine,
    force_pick,
    greedy,
    plain_target,
    prompt,
    target,
    use,
)
from vllm_plugins.spec_decode.specvlm.checkpoint import load_drafter
from vllm_plugins.spec_decode.specvlm.reference import reference_draft
from vllm_plugins.spec_decode.specvlm.settings import OPERATORS
from vllm_plugins.spec_decode.specvlm.target import FrozenTarget

pytestmark = pytest.mark.engine

STEPS = 5
# An image at the start, or not; one, several or two side by side; nothing, little or much behind.
SHAPES = (
    ["d", 3],
    [9, "a", 40],
    [30, "e", 8],
    [31, "e"],
    [3, "b", 5, "c", 17],
    [2, "g", 4, "h", 9],
    [2, "g", "h", 9],
)


@pytest.fixture(scope="module")
def drafting():
    with engine({}) as llm:
        yield llm


@cache
def plain(decoder):
    own = load_drafter(drafter(decoder), torch.float64)
    return FrozenTarget(plain_target(decoder).double()), own


def reference(made, contents, settings, pick=None, decoder="llama"):
    """Return the logits of a chain after a prompt, shape (steps, vocabulary)."""
    from transformers import AutoProcessor

    model, own = plain(decoder)
    own.settings = own.compressor.settings = settings
    force_pick(own.gate, pick)
    pixels = AutoProcessor.from_pretrained(target(decoder)).image_processor(
        made["multi_modal_data"]["image"], return_tensors="pt"
    )
    ids = [x for x in made["prompt_token_ids"] for _ in range(PATCHES if x == IMAGE_TOKEN else 1)]
    values = {"pixel_values": pixels["pixel_values"].double()}
    return reference_draft(own, model, torch.tensor(ids), values, STEPS, contents=contents)


def served(llm, made, pick=None):
    """Return the logits of the first chain after a prompt, and what identifies its images."""
    model = drafter_of(llm)
    force_pick(model.model.gate, pick)
    logits, original = [], model.compute_logits
    model.model.image_rows.images.requests = []

    def keep(hidden):
        logits.append(original(hidden).clone())
        return logits[-1]

    model.compute_logits = keep
    try:
        greedy(llm, [made], 2)
    finally:
        del model.compute_logits
    images = model.model.image_rows.images.requests
    contents = images[0].contents if images else ()
    return torch.stack([x[0] for x in logits[:STEPS]]), contents


def assert_agrees(llm, made, settings, pick=None, decoder="llama"):
    got, contents = served(llm, made, pick)
    wanted = reference(made, contents, settings, pick, decoder)
    assert wanted.abs().max() > 1
    torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=0)
    return wanted


@pytest.mark.parametrize("parts", SHAPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_each_operator(drafting, operator, parts):
    settings = use(drafting, mode="static", default_operator=operator)
    assert_agrees(drafting, prompt(parts), settings)


@pytest.mark.parametrize("mode", ["off", "weighted", "concat"])
def test_combinations_and_none(drafting, mode):
    for parts in SHAPES:
        # Anew for each: cached blocks keep what the question before them asked for.
        settings = use(drafting, mode=mode)
        assert_agrees(drafting, prompt(parts), settings)


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_the_gate_picks(drafting, operator):
    settings = use(drafting, mode="select")
    for parts in SHAPES[:3]:
        assert_agrees(drafting, prompt(parts), settings, operator)
    tally = drafter_of(drafting).model.tally
    before = tally.images()
    served(drafting, prompt([11, "z", 12]), operator)
    assert tally.images() - before == {operator: 1}


def test_operators_differ_and_pruning_follows_the_seed(drafting):
    made, results = prompt([9, "a", 40]), []
    for operator in OPERATORS:
        use(drafting, mode="static", default_operator=operator)
        results.append(served(drafting, made)[0])
    use(drafting, mode="static", default_operator="prune", seed=1)
    results.append(served(drafting, made)[0])
    for i, one in enumerate(results):
        assert all((one[0] - other[0]).abs().max() > 1e-2 for other in results[:i])


@pytest.mark.parametrize("ratio", [1.0, 2.0, 30.0])
def test_ratios(drafting, ratio):
    settings = use(drafting, mode="static", default_operator="pool", pool_ratio=ratio)
    rows = drafter_of(drafting).model.tally.rows
    before = rows["dropped"]
    logits = assert_agrees(drafting, prompt([9, "a", 40]), settings)
    if ratio == 1:
        assert rows["dropped"] == before
        whole = use(drafting, mode="off")
        torch.testing.assert_close(logits, assert_agrees(drafting, prompt([9, "a", 40]), whole))


def test_a_qwen2_target():
    """Qwen2 has biases before attention and none behind it."""
    with engine(decoder="qwen2") as llm:
        stock = greedy(llm, PROMPTS)
    with engine({}, decoder="qwen2") as llm:
        attention = drafter_of(llm).model.layers[0].self_attn
        assert attention.qkv_proj.bias is not None and attention.o_proj.bias is None
        for operator in OPERATORS:
            settings = use(llm, mode="static", default_operator=operator)
            for parts in SHAPES[:3]:
                assert_agrees(llm, prompt(parts), settings, decoder="qwen2")
            assert greedy(llm, PROMPTS) == stock
