"""Quantising a block into its page, bit for bit as `quantiser` does.

So divisions are rounded to nearest, ranges are rounded outwards, codes to nearest even.
A block is read twice, some tokens at a time: for its ranges, and for its codes, the second time
from the level-1 cache.
"""

import triton
import triton.language as tl

from vllm_plugins.attention_backends.zipcache.triton_kernels.pages import part, ranks

LEVELS = tl.constexpr(15.0)
HALF_MAX = tl.constexpr(65504.0)
# Adding and taking away 1.5 * 2^23 rounds to nearest even.
ROUND = tl.constexpr(12582912.0)


@triton.constexpr_function
def chunk_of(head: int) -> int:
    """Return how many tokens are in registers at once; more would spill."""
    return 32 if head <= 128 else 16


@triton.jit
def nearest_half(x: tl.tensor) -> tl.tensor:
    """Return the nearest finite float16."""
    return tl.minimum(tl.maximum(x, -HALF_MAX), HALF_MAX).to(tl.float16)


@triton.jit
def round_down(x: tl.tensor) -> tl.tensor:
    """Return the largest float16 that is not above ``x``, or the least finite one."""
    x = tl.maximum(x, -HALF_MAX)
    near = nearest_half(x)
    bits = near.to(tl.int16, bitcast=True).to(tl.int32)
    # Next below: a positive number's bits count up with it, a negative one's count down.
    below = tl.where(bits > 0, bits - 1, bits + 1)
    # -32767 is the least subnormal below zero.
    below = tl.where((bits & 0x7FFF) == 0, -32767, below).to(tl.int16)
    return tl.where(near.to(tl.float32) <= x, near, below.to(tl.float16, bitcast=True))


@triton.jit
def least_and_step(low: tl.tensor, high: tl.tensor) -> tuple[tl.tensor, ...]:
    """Return a range's least value and its step, float16, such that nothing is clipped."""
    least = round_down(low)
    width = high - least.to(tl.float32)
    return least, -round_down(tl.div_rn(-width, tl.full(width.shape, LEVELS, tl.float32)))


@triton.jit
def divisor(step: tl.tensor) -> tl.tensor:
    """Return what codes are divided by: of a range without width every code is 0."""
    return tl.where(step > 0.0, step, 1.0).to(tl.float32)


@triton.jit
def code_of(x: tl.tensor, least: tl.tensor, by: tl.tensor) -> tl.tensor:
    """Return codes of four bits, int32."""
    code = (tl.div_rn(x - least, by) + ROUND) - ROUND
    return tl.minimum(tl.maximum(code, 0.0), 15.0).to(tl.int32)


@triton.jit
def load_quarter(
    raw: tl.tensor, new: tl.tensor, new_token: tl.tensor, offset: tl.tensor, t: tl.tensor,
    j: tl.tensor, quarter: tl.constexpr, head: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load a quarter of the channels of a block's keys or values, float32, shape (tokens, bytes).

    Args:
        raw: The residual row, contiguous.
        new: First of the step's keys or values that are of this block.
        new_token: Elements from one of these to the next.
        offset: Tokens of the block that are in the residual row; the step's follow.
        t: Tokens within the block.
        j: Channels of a quarter, padded.
        quarter: Which quarter.
        head: Head size.
    """
    at, here = quarter * (head // 4) + j[None, :], (j < head // 4)[None, :]
    before = (t < offset)[:, None]
    old = tl.load(raw + t[:, None] * head + at, mask=before & here, other=0.0)
    at = (t - offset).to(tl.int64)[:, None] * new_token + at
    fresh = tl.load(new + at, mask=(before == 0) & here, other=0.0)
    return tl.where(before, old, fresh).to(tl.float32)


@triton.jit
def _key_range(
    raw: tl.tensor, new: tl.tensor, new_token: tl.tensor, offset: tl.tensor, halves: tl.tensor,
    j: tl.tensor, quarter: tl.constexpr, block_size: tl.constexpr, head: tl.constexpr,
    n_k: tl.constexpr, n_v: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Find and write the ranges of a quarter of the channels; return least and divisor."""
    low = tl.full(j.shape, float("inf"), tl.float32)
    high = -low
    for begin in range(0, block_size, chunk_of(head)):
        t = begin + tl.arange(0, chunk_of(head))
        x = load_quarter(raw, new, new_token, offset, t, j, quarter, head)
        low, high = tl.minimum(low, tl.min(x, axis=0)), tl.maximum(high, tl.max(x, axis=0))
    least, step = least_and_step(low, high)
    at, mask = quarter * (head // 4) + j, j < head // 4
    tl.store(halves + part("k_min", block_size, head, n_k, n_v, 2) + at, least, mask=mask)
    tl.store(halves + part("k_step", block_size, head, n_k, n_v, 2) + at, step, mask=mask)
    return least.to(tl.float32), divisor(step)


@triton.jit
def _value_scale(
    raw: tl.tensor, new: tl.tensor, new_token: tl.tensor, offset: tl.tensor, halves: tl.tensor,
    j: tl.tensor, scaled: tl.constexpr, quarter: tl.constexpr, block_size: tl.constexpr,
    head: tl.constexpr, n_k: tl.constexpr, n_v: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Find and write what a quarter of the channels is divided by; return it."""
    most = tl.zeros(j.shape, tl.float32)
    if scaled:
        for begin in range(0, block_size, chunk_of(head)):
            t = begin + tl.arange(0, chunk_of(head))
            x = load_quarter(raw, new, new_token, offset, t, j, quarter, head)
            most = tl.maximum(most, tl.max(tl.abs(x), axis=0))
    scale = nearest_half(most).to(tl.float32)
    scale = tl.where(scale > 0.0, scale, 1.0)
    at = part("v_scale", block_size, head, n_k, n_v, 2) + quarter * (head // 4) + j
    tl.store(halves + at, scale.to(tl.float16), mask=j < head // 4)
    return scale


@triton.jit
def _store_planes(
    c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, high: tl.tensor, low: tl.tensor,
    t: tl.tensor, rank: tl.tensor, has_low: tl.tensor, j: tl.tensor, row: tl.constexpr,
) -> None:  # fmt: skip
    """Write both planes of some tokens from the codes of the four quarters."""
    here, at = (j < row)[None, :], j[None, :]
    byte = (c0 >> 2) | (c1 >> 2) << 2 | (c2 >> 2) << 4 | (c3 >> 2) << 6
    tl.store(high + t[:, None] * row + at, byte.to(tl.uint8), mask=here & (t >= 0)[:, None])
    byte = (c0 & 3) | (c1 & 3) << 2 | (c2 & 3) << 4 | (c3 & 3) << 6
    tl.store(low + rank[:, None] * row + at, byte.to(tl.uint8), mask=here & has_low[:, None])


@triton.jit
def _low_rows(
    words: tl.tensor, t: tl.tensor, keep: tl.tensor, ranked: tl.constexpr, block_size: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Return the rows of the low plane of some tokens, and whether they have any."""
    if ranked:
        return ranks(words, t, block_size)
    return t, t < keep


@triton.jit
def pack_keys(
    raw: tl.tensor, new: tl.tensor, new_token: tl.tensor, offset: tl.tensor,
    page: tl.tensor, halves: tl.tensor, words: tl.tensor, low: tl.tensor, keep: tl.tensor,
    j: tl.tensor, ranked: tl.constexpr, block_size: tl.constexpr, head: tl.constexpr,
    n_k: tl.constexpr, n_v: tl.constexpr,
) -> None:  # fmt: skip
    """Quantise a block's keys by channel.

    Args:
        raw: As of `load_quarter`, like the next three.
        new: The step's keys.
        new_token: Elements from one of them to the next.
        offset: Tokens in the residual row.
        page: The page.
        halves: The same as float16.
        words: Its bits of tokens.
        low: Where the low plane goes.
        keep: How many tokens have one, where it is not ``ranked``.
        j: Channels of a quarter, padded.
        ranked: Whether the low plane is that of the tokens whose bits are set, side by side.
        block_size: Tokens of a block.
        head: Head size.
        n_k: Salient tokens of a block, of keys.
        n_v: The same of values.
    """
    l0, s0 = _key_range(raw, new, new_token, offset, halves, j, 0, block_size, head, n_k, n_v)
    l1, s1 = _key_range(raw, new, new_token, offset, halves, j, 1, block_size, head, n_k, n_v)
    l2, s2 = _key_range(raw, new, new_token, offset, halves, j, 2, block_size, head, n_k, n_v)
    l3, s3 = _key_range(raw, new, new_token, offset, halves, j, 3, block_size, head, n_k, n_v)
    for begin in range(0, block_size, chunk_of(head)):
        t = begin + tl.arange(0, chunk_of(head))
        rank, has_low = _low_rows(words, t, keep, ranked, block_size)
        x0 = load_quarter(raw, new, new_token, offset, t, j, 0, head)
        x1 = load_quarter(raw, new, new_token, offset, t, j, 1, head)
        x2 = load_quarter(raw, new, new_token, offset, t, j, 2, head)
        x3 = load_quarter(raw, new, new_token, offset, t, j, 3, head)
        _store_planes(
            code_of(x0, l0[None, :], s0[None, :]), code_of(x1, l1[None, :], s1[None, :]),
            code_of(x2, l2[None, :], s2[None, :]), code_of(x3, l3[None, :], s3[None, :]),
            page + part("k_high", block_size, head, n_k, n_v), low, t, rank, has_low, j, head // 4,
        )  # fmt: skip


@triton.jit
def pack_values(
    raw: tl.tensor, new: tl.tensor, new_token: tl.tensor, offset: tl.tensor,
    page: tl.tensor, halves: tl.tensor, words: tl.tensor, low: tl.tensor, keep: tl.tensor,
    j: tl.tensor, ranked: tl.constexpr, scaled: tl.constexpr, block_size: tl.constexpr,
    head: tl.constexpr, n_k: tl.constexpr, n_v: tl.constexpr,
) -> None:  # fmt: skip
    """Quantise a block's values by token, after a scale for each channel where ``scaled``.

    Other arguments are those of `pack_keys`.
    """
    c0 = _value_scale(raw, new, new_token, offset, halves, j, scaled, 0, block_size, head, n_k, n_v)
    c1 = _value_scale(raw, new, new_token, offset, halves, j, scaled, 1, block_size, head, n_k, n_v)
    c2 = _value_scale(raw, new, new_token, offset, halves, j, scaled, 2, block_size, head, n_k, n_v)
    c3 = _value_scale(raw, new, new_token, offset, halves, j, scaled, 3, block_size, head, n_k, n_v)
    infinity, here = tl.full((1, 1), float("inf"), tl.float32), (j < head // 4)[None, :]
    for begin in range(0, block_size, chunk_of(head)):
        t = begin + tl.arange(0, chunk_of(head))
        rank, has_low = _low_rows(words, t, keep, ranked, block_size)
        y0 = load_quarter(raw, new, new_token, offset, t, j, 0, head)
        y1 = load_quarter(raw, new, new_token, offset, t, j, 1, head)
        y2 = load_quarter(raw, new, new_token, offset, t, j, 2, head)
        y3 = load_quarter(raw, new, new_token, offset, t, j, 3, head)
        y0, y1 = tl.div_rn(y0, c0[None, :]), tl.div_rn(y1, c1[None, :])
        y2, y3 = tl.div_rn(y2, c2[None, :]), tl.div_rn(y3, c3[None, :])
        least = tl.minimum(tl.minimum(y0, y1), tl.minimum(y2, y3))
        most = tl.maximum(tl.maximum(y0, y1), tl.maximum(y2, y3))
        least = tl.min(tl.where(here, least, infinity), axis=1)
        most = tl.max(tl.where(here, most, -infinity), axis=1)
        least, step = least_and_step(least, most)
        tl.store(halves + part("v_min", block_size, head, n_k, n_v, 2) + t, least)
        tl.store(halves + part("v_step", block_size, head, n_k, n_v, 2) + t, step)
        low_of, by = least.to(tl.float32)[:, None], divisor(step)[:, None]
        _store_planes(
            code_of(y0, low_of, by), code_of(y1, low_of, by),
            code_of(y2, low_of, by), code_of(y3, low_of, by),
            page + part("v_high", block_size, head, n_k, n_v), low, t, rank, has_low, j, head // 4,
        )  # fmt: skip
