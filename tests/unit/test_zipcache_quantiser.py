"""ZipCache's codes, ranges and pages against the letter of the format."""

import itertools

import numpy as np
import pytest
import torch

from vllm_plugins.attention_backends.zipcache import quantiser
from vllm_plugins.attention_backends.zipcache.page import PageFormat

SHAPES = [(32, 16), (32, 80), (64, 64), (128, 128), (256, 256)]


def blocks(n, d, count=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, count, n, d, generator=generator, dtype=dtype)
    # Channels of keys differ widely, as those of models do.
    return x[0] * torch.logspace(-3, 2, d, dtype=dtype) + 5, x[1] * torch.logspace(
        -2, 1, d, dtype=dtype
    )


def test_every_code_survives_packing():
    codes = torch.arange(4, dtype=torch.uint8).repeat(5, 8)
    plane = quantiser.pack_plane(codes)
    assert plane.shape == (5, 8)
    assert torch.equal(quantiser.unpack_plane(plane), codes)
    every = torch.cartesian_prod(*[torch.arange(4, dtype=torch.uint8)] * 4)
    plane = quantiser.pack_plane(every)
    assert len(set(plane.flatten().tolist())) == 256
    assert torch.equal(quantiser.unpack_plane(plane), every)


def test_a_byte_holds_a_channel_of_each_quarter():
    codes = torch.zeros(16, dtype=torch.uint8)
    codes[[1, 5, 9, 13]] = torch.tensor([1, 2, 3, 1], dtype=torch.uint8)
    assert quantiser.pack_plane(codes).tolist() == [0, 1 | 2 << 2 | 3 << 4 | 1 << 6, 0, 0]


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("scaled", [True, False])
def test_errors_are_within_half_a_step_and_two_steps(n, d, scaled):
    keys, values = blocks(n, d)
    codes = quantiser.quantise(keys, values, scaled)
    scale = codes.v_scale.double()[:, None, :]
    assert scaled or bool((scale == 1).all())
    steps, slack = {True: 0.5, False: 2.0}, 1 + 1e-9
    for salient in itertools.product(steps, steps):
        mask = torch.tensor(salient)[:, None].expand(len(keys), 2, n)
        k, v = quantiser.dequantise(codes, mask, torch.float64)
        bound = steps[salient[0]] * slack * codes.k_step.double()[:, None]
        assert bool(((k - keys).abs() <= bound).all())
        bound = steps[salient[1]] * slack * codes.v_step.double()[..., None] * scale
        assert bool(((v - values).abs() <= bound).all())


def test_ranges_are_tight():
    """Rounding ranges to float16 costs a thousandth of them, not a bit."""
    keys, values = blocks(64, 64)
    codes = quantiser.quantise(keys, values)
    width = keys.amax(1) - keys.amin(1)
    offset = keys.abs().amax(1)
    assert bool((codes.k_step.double() * 15 <= width * 1.002 + offset * 0.002).all())


@pytest.mark.parametrize("fill", [0.0, 1.0, -3.25, 1e-7, 1e5, -1e5])
def test_a_block_without_a_range(fill):
    x = torch.full((1, 32, 16), fill)
    codes = quantiser.quantise(x, x)
    k, v = quantiser.dequantise(codes, torch.ones(1, 2, 32, dtype=torch.bool))
    # A range begins at float16's least number at the lowest.
    wanted = max(fill, -65504.0)
    assert bool(torch.isfinite(k).all()) and bool(torch.isfinite(v).all())
    torch.testing.assert_close(k, torch.full_like(x, wanted), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("of_keys", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("of_values", [0.0, 0.3, 1.0])
def test_pages_give_back_what_was_written(n, d, of_keys, of_values):
    page = PageFormat(n, d, round(of_keys * n), round(of_values * n))
    keys, values = blocks(n, d, dtype=torch.float32)
    codes = quantiser.quantise(keys, values)
    pages = torch.full((3, page.bytes), 0xFF, dtype=torch.uint8)
    salient = torch.zeros(3, 2, n, dtype=torch.bool)
    for i in range(3):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(i))
        for quota, kept in zip(page.quotas, salient[i], strict=True):
            kept[order[:quota]] = True
    quantiser.write_page(codes, pages, page)
    low = quantiser.low_planes(codes)
    quantiser.seal(low, salient, pages, page)
    found, which = quantiser.read_page(pages, page)
    assert torch.equal(which, salient)
    assert which.sum(-1).tolist() == 3 * [list(page.quotas)]
    for name in ("k_min", "k_step", "v_scale", "v_min", "v_step"):
        assert torch.equal(getattr(found, name), getattr(codes, name))
    for got, wanted in zip(
        quantiser.dequantise(found, which), quantiser.dequantise(codes, which), strict=True
    ):
        assert torch.equal(got, wanted)
    staged, every = quantiser.read_page(pages, page, low)
    assert bool(every.all())
    assert torch.equal(staged.keys, codes.keys) and torch.equal(staged.values, codes.values)


@pytest.mark.parametrize(
    ("n", "d", "ratio", "size"),
    [(64, 128, 0.6, 7560), (64, 128, 0.7, 8008), (128, 128, 0.6, 14416)],
)
def test_the_size_of_pages(n, d, ratio, size):
    """118, 125 and 112.6 bytes for a token and head instead of 512 in bfloat16."""
    page = PageFormat.of(n, d, "4/2", ratio)
    assert page.size == size
    assert page.bytes == -(-size // n) * n
    assert page.size == n * d // 2 + page.v_salient * d // 2 + 6 * d + 4 * n + n // 8


def test_a_quota_for_both_is_the_papers():
    """Whether the same share is said once or twice."""
    page = PageFormat.of(64, 128, "4/2", 0.6)
    assert page == PageFormat.of(64, 128, "4/2", 0.6, 0.6)
    assert page.quotas == (38, 38)
    assert page.k_bitmap == page.v_bitmap
    assert PageFormat.of(64, 128, "4/4", 0.6).quotas == (64, 64)
    assert PageFormat.of(64, 128, "2/2", 0.6).quotas == (0, 0)


@pytest.mark.parametrize(
    ("of_keys", "of_values", "token_bytes", "bitmaps"),
    [(1.0, 0.6, 126, 1), (1.0, 0.3, 116, 1), (0.0, 1.0, 107, 1), (0.8, 0.3, 110, 2)],
)
def test_the_size_of_pages_with_two_quotas(of_keys, of_values, token_bytes, bitmaps):
    """Keys' low planes, values', and bits for each quota that chooses."""
    n = d = 128
    page = PageFormat.of(n, d, "4/2", of_values, of_keys)
    assert page.quotas == (round(of_keys * n), round(of_values * n))
    low = sum(page.quotas) * d // 4
    assert page.size == n * d // 2 + low + 6 * d + 4 * n + bitmaps * n // 8
    assert page.token_bytes == token_bytes
    assert page.v_low - page.k_low == page.k_salient * d // 4
    assert page.v_bitmap - page.k_bitmap == (bitmaps - 1) * n // 8


def test_all_tokens_salient_is_plain_four_bits():
    """Against a 4-bit quantiser written out in numpy."""
    _, values = blocks(32, 16, count=1, dtype=torch.float32)
    keys = values.roll(3, dims=-1)
    codes = quantiser.quantise(keys, values)
    k, v = quantiser.dequantise(codes, torch.ones(1, 2, 32, dtype=torch.bool))

    def four_bits(x, axis):
        low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
        step = (high - low) / 15
        return np.rint((x - low) / step) * step + low, step

    found, step = four_bits(keys[0].numpy(), 0)
    # Ranges are float16 here, so codes at the edge of a cell may differ by one.
    assert np.mean(np.abs(k[0].numpy() - found) > 0.1 * step) < 0.05
    scale = np.abs(values[0].numpy()).max(0)
    found, step = four_bits(values[0].numpy() / scale, 1)
    assert np.mean(np.abs(v[0].numpy() - found * scale) > 0.1 * step * scale) < 0.05
