"""The predictors of Dynamic-LLaVA, against a float64 account of the paper's section 3.2."""

import math

import pytest
import torch

from vllm_plugins.errors import PluginError
from vllm_plugins.visual_tokens.dynamic_llava.predictors import (
    ImagePredictor,
    Predictors,
    TextPredictor,
    choose,
    keep_scores,
    keeps,
    wanted_tokens,
)
from vllm_plugins.visual_tokens.dynamic_llava.sparse_config import SparseConfig

HIDDEN, TOKENS = 24, 10
SMALL = SparseConfig(d_model=16, nhead=4, dim_feedforward=40, num_layers=2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def norm(x, weights, name):
    mean, spread = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / (spread + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def head(x, weights):
    return linear(
        gelu(linear(gelu(linear(x, weights, "head.0")), weights, "head.2")), weights, "head.4"
    )


def block(x, weights, name, heads):
    """One image's tokens, head by head and query by query."""
    joined = linear(norm(x, weights, f"{name}.attention_norm"), weights, f"{name}.query_key_value")
    query, key, value = joined.split(x.shape[-1], dim=-1)
    size, parts = x.shape[-1] // heads, []
    for h in range(heads):
        q, k, v = (t[:, h * size : (h + 1) * size] for t in (query, key, value))
        e = torch.exp(q @ k.T / math.sqrt(size))
        parts.append(e @ v / e.sum(-1, keepdim=True))
    x = x + linear(torch.cat(parts, -1), weights, f"{name}.out")
    inner = gelu(linear(norm(x, weights, f"{name}.feed_forward_norm"), weights, f"{name}.up"))
    return x + linear(inner, weights, f"{name}.down")


def randomised(module):
    """Biases and norms too, so that none can be left out unnoticed."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module.double(), dict(module.named_parameters())


def test_image_predictor_is_the_papers():
    predictor, weights = randomised(ImagePredictor(HIDDEN, SMALL))
    images = torch.randn(3, TOKENS, HIDDEN, dtype=torch.float64)
    logits = predictor(images)
    assert logits.shape == (3, TOKENS, 2)
    for image, found in zip(images, logits, strict=True):
        x = gelu(linear(norm(image, weights, "norm"), weights, "project"))
        for i in range(SMALL.num_layers):
            x = block(x, weights, f"blocks.{i}", SMALL.nhead)
        own, shared = x[:, :8], x[:, 8:].mean(0).expand(TOKENS, 8)
        torch.testing.assert_close(found, head(torch.cat((own, shared), -1), weights))


def test_text_predictor_is_the_papers():
    predictor, weights = randomised(TextPredictor(HIDDEN, SMALL))
    rows = torch.randn(7, HIDDEN, dtype=torch.float64)
    expected = head(gelu(linear(norm(rows, weights, "norm"), weights, "project")), weights)
    torch.testing.assert_close(predictor(rows), expected)


def test_text_decisions_do_not_depend_on_other_tokens():
    predictor = TextPredictor(HIDDEN, SMALL)
    rows = torch.randn(9, HIDDEN)
    together = predictor(rows)
    torch.testing.assert_close(together, torch.stack([predictor(row) for row in rows]))


def test_image_scores_see_the_whole_image_and_no_other():
    predictor = ImagePredictor(HIDDEN, SMALL).double()
    images = torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64)
    before = predictor(images)
    images[1, 4] = torch.randn(HIDDEN)
    after = predictor(images)
    assert torch.equal(before[0], after[0])
    assert ((before[1] - after[1]).abs().amax(-1) > 1e-9).all()


def test_keep_is_the_first_class():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    assert keeps(logits).tolist() == [True, False, False]
    expected = [-math.log1p(math.exp(-2)), -2 - math.log1p(math.exp(-2)), -math.log(2)]
    torch.testing.assert_close(keep_scores(logits), torch.tensor(expected))
    assert keep_scores(logits.bfloat16()).dtype == torch.float32


def test_counts_are_rounded_down_as_published():
    assert wanted_tokens(576, 0.2) == 115
    assert wanted_tokens(576, 1.0) == 576
    assert wanted_tokens(16, 0.05) == 0


def test_chosen_tokens_keep_their_order_and_early_ones_win_ties():
    scores = torch.tensor([[0.0, 3, 1, 3, 2, 1], [5, 4, 3, 2, 1, 0]])
    assert choose(scores, 4).tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]
    assert choose(torch.zeros(1, 300), 100).tolist() == [list(range(100))]
    assert choose(scores, 0).shape == (2, 0)


@pytest.mark.parametrize("seed", range(5))
def test_chosen_tokens_are_those_with_the_highest_scores(seed):
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed))
    for count in (1, 17, 50):
        expected = scores.topk(count).indices.sort(-1).values
        assert torch.equal(choose(scores, count), expected)


def test_a_rate_of_one_has_no_predictor():
    both = Predictors(HIDDEN, SMALL)
    names = {name.partition(".")[0] for name in both.state_dict()}
    assert names == {"image_predictor", "text_predictor"}
    image = Predictors(HIDDEN, SMALL.model_copy(update={"text_keep_rate": 1.0}))
    assert {name.partition(".")[0] for name in image.state_dict()} == {"image_predictor"}


def test_parameter_names_are_those_that_serving_loads():
    names = {n.replace(".1.", ".N.").replace(".0.", ".N.") for n in Predictors(
        HIDDEN, SMALL).state_dict() if "blocks" in n}  # fmt: skip
    parts = ("attention_norm", "query_key_value", "out", "feed_forward_norm", "up", "down")
    expected = {f"image_predictor.blocks.N.{p}.{k}" for p in parts for k in ("weight", "bias")}
    assert names == expected - {"image_predictor.blocks.N.query_key_value.bias"}


def test_paper_sizes_are_the_defaults():
    predictors = Predictors(4096, SparseConfig())
    assert predictors.image_predictor.blocks[1].up.weight.shape == (2048, 512)
    assert predictors.text_predictor.head[0].weight.shape == (256, 512)
    assert predictors.image_predictor.head[4].weight.shape == (2, 128)
    assert SparseConfig().sparse_layer == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_keep_rate": 0}, "image_keep_rate: Input should be greater than 0"),
        ({"image_keep_rate": 1.5}, "image_keep_rate: Input should be less than or equal to 1"),
        ({"sparse_layer": 0}, "sparse_layer: Input should be greater than or equal to 1"),
        ({"d_model": 20, "nhead": 8}, "d_model 20 is not a multiple of nhead 8"),
        ({"image_keep_rate": 1, "text_keep_rate": 1}, "both 1: nothing is dropped"),
        ({"use_vision_predictor": True}, "use_vision_predictor: Extra inputs are not permitted"),
        ({"version": 2}, "version: Input should be 1"),
    ],
)
def test_bad_configurations_are_refused_in_one_line(values, message):
    with pytest.raises(PluginError) as refused:
        SparseConfig.of(values, "config.json: sparse_config")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("config.json: sparse_config: ")


def test_configurations_are_read_from_a_model_folder(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(PluginError, match="cannot be read"):
        SparseConfig.read(tmp_path)
    path.write_text("{}")
    assert SparseConfig.read(tmp_path) is None
    path.write_text('{"sparse_config": {"image_keep_rate": 0.3}}')
    assert SparseConfig.read(tmp_path) == SparseConfig(image_keep_rate=0.3)
    path.write_text("[]")
    with pytest.raises(PluginError, match="name a model folder"):
        SparseConfig.read(tmp_path)
