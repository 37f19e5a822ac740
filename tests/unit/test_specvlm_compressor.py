"""The operators over an image's rows: counts, order, positions, and their neutral settings."""

import numpy as np
import pytest
import torch

from vllm_plugins.spec_decode.specvlm.compact import compact, draft_span
from vllm_plugins.spec_decode.specvlm.compressor import (
    VisualCompressor,
    prune_offsets,
    prune_seed,
)
from vllm_plugins.spec_decode.specvlm.settings import OPERATORS, SpecVLMSettings

HIDDEN = 8
CHOICES = (*OPERATORS, "weighted", "concat")


def make(seed: int = 0, **settings) -> VisualCompressor:
    torch.manual_seed(seed)
    settings = {"grid": (4, 6), "mode": "static"} | settings
    return VisualCompressor(HIDDEN, SpecVLMSettings(**settings), 2).double()


def rows_of(count: int, images: int = 1) -> torch.Tensor:
    random = torch.Generator().manual_seed(count)
    return torch.randn(images, count, HIDDEN, generator=random, dtype=torch.float64)


WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("length", [1, 5, 6, 23, 24])
def test_every_choice_makes_as_many_rows_as_asked(choice, length):
    compressor, rows = make(), rows_of(length)[0]
    for count in range(length + 1):
        made, offsets = compressor(choice, rows, count, 7, WEIGHTS)
        assert made.shape == (count, HIDDEN) and offsets.shape == (count,)
        assert torch.isfinite(made).all()
        assert (offsets.diff() > 0).all() and (offsets >= 0).all() and (offsets < length).all()


@pytest.mark.parametrize("choice", CHOICES)
def test_a_batch_of_images_is_each_image_alone(choice):
    compressor, rows = make(), rows_of(23, 3)
    weights = torch.rand(3, 3, dtype=torch.float64)
    made, offsets = compressor.compress(choice, rows, 9, [4, 5, 6], weights)
    for i in range(3):
        alone, own = compressor(choice, rows[i], 9, 4 + i, weights[i])
        assert torch.allclose(made[i], alone, atol=1e-12) and torch.equal(offsets[i], own)


def test_pruning_keeps_rows_with_their_positions_in_order():
    rows = rows_of(24)[0]
    made, offsets = make()("prune", rows, 5, 3)
    assert torch.equal(made, rows[offsets])
    kept = [tuple(make()("prune", rows, 5, seed)[1].tolist()) for seed in range(20)]
    assert len(set(kept)) > 10
    assert kept[3] == tuple(offsets.tolist())


def test_pruning_is_uniform_over_seeds():
    counts = sum(
        np.bincount(prune_offsets(24, 6, prune_seed(i, 0)), minlength=24) for i in range(2000)
    )
    # 500 expected in each place, with a deviation of about 19.
    assert abs(counts - 500).max() < 100


def test_the_seed_depends_on_content_and_option_alone():
    assert prune_seed("abc", 1) == prune_seed("abc", 1)
    assert len({prune_seed("abc", 1), prune_seed("abd", 1), prune_seed("abc", 2)}) == 3


@pytest.mark.parametrize("choice", ["prune", "pool"])
def test_ratio_one_leaves_rows_as_they_are(choice):
    rows = rows_of(24)[0]
    made, offsets = make()(choice, rows, 24, 3)
    assert torch.equal(made, rows) and offsets.tolist() == list(range(24))


def test_pooling_averages_stretches_of_the_raster():
    rows = rows_of(24)[0]
    made, offsets = make()("pool", rows, 4)
    assert torch.allclose(made, rows.view(4, 6, HIDDEN).mean(1)) and offsets.tolist() == [
        0,
        1,
        2,
        3,
    ]
    # An uneven number: stretch i is [floor(i n / m), ceil((i + 1) n / m)).
    made, _ = make()("pool", rows[:23], 5)
    borders = [(i * 23 // 5, -(-(i + 1) * 23 // 5)) for i in range(5)]
    assert torch.allclose(made, torch.stack([rows[a:b].mean(0) for a, b in borders]))


def test_the_convolution_is_the_sum_over_its_window():
    compressor = make()
    torch.nn.init.normal_(compressor.conv.depthwise.weight)
    torch.nn.init.normal_(compressor.conv.pointwise.weight)
    rows = rows_of(23)[0]
    kernel = compressor.conv.depthwise.weight[:, 0].detach().numpy()
    grid = np.zeros((4, 6, HIDDEN))
    grid.reshape(24, HIDDEN)[:23] = rows.numpy()
    expected = []
    for line, column in [(i, j) for i in range(4) for j in (0, 3)]:
        total = np.zeros(HIDDEN)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                if 0 <= line + dy < 4 and 0 <= column + dx < 6:
                    total += kernel[:, dy + 1, dx + 1] * grid[line + dy, column + dx]
        expected.append(compressor.conv.pointwise.weight.detach().numpy() @ total)
    made = compressor.conv(rows[None])[0].detach().numpy()
    assert np.allclose(made, expected)


def test_the_convolution_begins_as_pooling_of_each_line():
    rows = torch.ones(24, HIDDEN, dtype=torch.float64)
    inner = make(conv_ratio=3)("conv", rows, 8)[0].detach()[1::2]
    assert torch.allclose(inner, rows[:4])


@pytest.mark.parametrize("ratio", [1, 2, 4, 5])
def test_outputs_that_lie_beyond_a_partial_line_are_left_out(ratio):
    conv = make(conv_ratio=ratio).conv
    for length in range(1, 25):
        full, rest = divmod(length, 6)
        expected = full * -(-6 // ratio) + -(-rest // ratio)
        assert conv(rows_of(length)).shape[1] == expected


def test_the_resampler_gives_its_queries_first_and_pools_the_rest():
    compressor, rows = make(queries=3), rows_of(24)
    queries = compressor.resampler(rows)[0]
    assert torch.equal(compressor("resample", rows[0], 2)[0], queries[:2])
    made, _ = compressor("resample", rows[0], 7)
    assert torch.equal(made[:3], queries)
    assert torch.equal(made[3:], compressor("pool", rows[0], 4)[0])


def test_the_resampler_is_attention():
    compressor, rows = make(queries=2), rows_of(24)[0]
    r = compressor.resampler
    heads = [slice(0, 4), slice(4, 8)]
    query, key = r.q_proj(r.queries), r.k_proj(r.norm(rows))
    value = r.v_proj(rows)
    parts = [((query[:, h] @ key[:, h].T) / 2).softmax(-1) @ value[:, h] for h in heads]
    assert torch.allclose(r(rows[None])[0], r.o_proj(torch.cat(parts, -1)))


def test_text_only_leaves_the_first_rows_in_slots_that_must_be_filled():
    rows = rows_of(24)[0]
    made, offsets = make()("text_only", rows, 3)
    assert torch.equal(made, rows[:3]) and offsets.tolist() == [0, 1, 2]


def test_the_weighted_sum_adds_three_operators_up():
    compressor, rows = make(), rows_of(24)[0]
    parts = [compressor(name, rows, 8, 5)[0] for name in ("prune", "pool", "conv")]
    expected = sum(w * part for w, part in zip(WEIGHTS, parts, strict=True))
    made, offsets = compressor("weighted", rows, 8, 5, WEIGHTS)
    assert torch.allclose(made, expected) and offsets.tolist() == list(range(8))


def test_concatenation_gives_each_operator_its_share():
    compressor = make(prune_ratio=6, pool_ratio=6, conv_ratio=2, queries=2)
    assert compressor.settings.wanted("concat", 24) == 4 + 4 + 12 + 2
    assert compressor.shares(24, 22) == [4, 4, 12, 2]
    for count in range(25):
        shares = compressor.shares(24, count)
        assert sum(shares) == count and min(shares) >= 0
    rows = rows_of(24)[0]
    made = compressor("concat", rows, 22, 5)[0]
    parts = [("prune", 4), ("pool", 4), ("conv", 12), ("resample", 2)]
    assert torch.equal(made, torch.cat([compressor(name, rows, n, 5)[0] for name, n in parts]))


@pytest.mark.parametrize("choice", CHOICES)
def test_a_gradient_reaches_rows_and_the_operators_own_weights(choice):
    compressor, rows = make(), rows_of(24)[0].requires_grad_()
    compressor(choice, rows, 8, 1, WEIGHTS)[0].square().sum().backward()
    assert rows.grad.abs().sum() > 0
    touched = {n.split(".")[0] for n, p in compressor.named_parameters() if p.grad is not None}
    own = {"conv": {"conv"}, "resample": {"resampler"}, "weighted": {"conv"}}
    assert touched == own.get(choice, {"conv", "resampler"} if choice == "concat" else set())


def test_the_rows_wanted_follow_the_ratios():
    settings = SpecVLMSettings()
    wanted = {choice: settings.wanted(choice, 576) for choice in CHOICES}
    assert wanted == {
        "prune": 29, "pool": 29, "conv": 192, "resample": 2, "text_only": 0, "weighted": 192,
        "concat": 29 + 29 + 192 + 2,
    }  # fmt: skip
    assert settings.planned("pool", 576) == 192
    few = SpecVLMSettings(select_from=("pool", "text_only"))
    assert few.planned("text_only", 576) == 29
    assert SpecVLMSettings(mode="static").planned("text_only", 576) == 0


def test_the_mode_says_what_is_done_to_an_image():
    def done(mode, picked=None):
        return SpecVLMSettings(mode=mode, default_operator="conv").choice(picked)

    assert done("off", "prune") is None
    assert done("static", "prune") == "conv"
    assert done("select", "prune") == "prune"
    # Where the gate could not see the question.
    assert done("select") == "conv"
    assert [done(mode, "prune") for mode in ("weighted", "concat")] == ["weighted", "concat"]


def numbered(count: int) -> torch.Tensor:
    """Rows that say which draft row they are."""
    return torch.arange(count, dtype=torch.float64)[:, None].expand(-1, HIDDEN)


@pytest.mark.parametrize("block", [1, 4, 16])
def test_compact_rows_are_those_of_whole_blocks(block):
    for start in range(0, 9):
        for length in (1, 3, 24):
            compressor = make(default_operator="prune", prune_ratio=6, block_size=block)
            end, total = start + length, start + length + 7
            span = draft_span(start, end)
            out = compact(numbered(total), [span], "prune", compressor, ["x"])
            dropped = total - len(out.rows)
            assert dropped % block == 0
            left = span[1] - span[0] - dropped
            wanted = -(-(span[1] - span[0]) // 6)
            assert wanted <= left
            assert dropped == 0 or left < wanted + block
            # Pruned rows keep their own positions, and so does everything else.
            assert torch.equal(out.positions.double(), out.rows[:, 0])
            assert (out.positions.diff() > 0).all()
            outside = [t for t in range(total) if not span[0] <= t < span[1]]
            assert set(outside) <= set(out.sources.tolist())
            text = out.sources >= 0
            assert torch.equal(out.sources[text], out.positions[text])


def test_made_rows_take_the_positions_of_the_slots_they_lie_in():
    compressor = make(default_operator="pool", pool_ratio=6, block_size=4)
    out = compact(numbered(40), [(3, 27)], "pool", compressor, ["x"])
    # e mod 4 = 3 rows stay; 4 - 3 = 1 more is wanted, and slots up to block 1's end are 3.
    assert out.positions.tolist()[:8] == [0, 1, 2, 3, 24, 25, 26, 27]
    assert out.sources.tolist()[:5] == [0, 1, 2, -1, 24]
    assert torch.allclose(out.rows[3], numbered(40)[3:24].mean(0))


def test_several_images_are_compressed_left_to_right():
    compressor = make(default_operator="prune", prune_ratio=6, block_size=4)
    spans = [(2, 26), (30, 54), (54, 60)]
    out = compact(numbered(64), spans, "prune", compressor, ["a", "b", "c"])
    assert (out.positions.diff() > 0).all()
    for start, end in spans:
        kept = int(((out.positions >= start) & (out.positions < end)).sum())
        assert -(-(end - start) // 6) <= kept < -(-(end - start) // 6) + 4
    alone = compact(numbered(64), spans[1:2], "prune", compressor, ["b"])
    assert [p for p in out.positions.tolist() if 30 <= p < 54] == [
        p for p in alone.positions.tolist() if 30 <= p < 54
    ]


def test_nothing_is_done_without_a_choice_or_an_image():
    compressor = make()
    for spans, choice in (([(2, 20)], None), ([], "pool")):
        out = compact(numbered(30), spans, choice, compressor, ["x"] * len(spans))
        assert torch.equal(out.rows, numbered(30)) and out.positions.tolist() == list(range(30))
