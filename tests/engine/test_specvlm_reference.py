"""The served drafter against plain torch in float64: the same logits, in every step of a chain."""

from functools import cache

import pytest
import torch

from tests.engine.specvlm_engine import (
    IMAGE_TOKEN,
    PATCHES,
    drafter,
    drafter_of,
    engine,
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
# An image at the start, or not; one or several; nothing, little or much behind it.
SHAPES = (
    ["d", 3],
    [9, "a", 40],
    [30, "e", 8],
    [31, "e"],
    [3, "b", 5, "c", 17],
    [2, "g", 4, "h", 9],
)


@pytest.fixture(scope="module")
def drafting():
    with engine({}) as llm:
        yield llm


@cache
def plain():
    return FrozenTarget(plain_target().double()), load_drafter(drafter(), torch.float64)


def reference(made, contents, settings, pick=None):
    """Return the logits of a chain after a prompt, shape (steps, vocabulary)."""
    from transformers import AutoProcessor

    model, own = plain()
    own.settings = own.compressor.settings = settings
    with torch.no_grad():
        own.gate.fc2.bias.copy_(gate_bias(pick))
    pixels = AutoProcessor.from_pretrained(target()).image_processor(
        made["multi_modal_data"]["image"], return_tensors="pt"
    )
    ids = [x for x in made["prompt_token_ids"] for _ in range(PATCHES if x == IMAGE_TOKEN else 1)]
    values = {"pixel_values": pixels["pixel_values"].double()}
    return reference_draft(own, model, torch.tensor(ids), values, STEPS, contents=contents)


@cache
def trained_bias():
    return load_drafter(drafter()).gate.fc2.bias.detach().clone()


def gate_bias(pick):
    """Return a bias with which the gate picks an operator, or its own."""
    return trained_bias() + (0 if pick is None else 1e4 * torch.eye(5)[OPERATORS.index(pick)])


def served(llm, made, pick=None):
    """Return the logits of the first chain after a prompt, and what identifies its images."""
    model = drafter_of(llm)
    with torch.no_grad():
        model.model.gate.fc2.bias.copy_(gate_bias(pick))
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


def assert_agrees(llm, made, settings, pick=None):
    got, contents = served(llm, made, pick)
    wanted = reference(made, contents, settings, pick)
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
    settings = use(drafting, mode=mode)
    for parts in SHAPES:
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
