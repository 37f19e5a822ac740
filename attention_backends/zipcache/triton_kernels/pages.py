"""What all kernels share: where the parts of a page lie, and codes in registers.

A code of four bits becomes a number without a conversion, which would run at a quarter of the rate
of other instructions: its bits are set in the mantissa of a power of two, so that what is
multiplied is that power plus the code, exact in every dtype, and the power times the other factor's
sum is taken away afterwards. Two quarters of the channels at a time need the same shift of a byte,
with another power each (`zero_of`). A token without low bits has its high code's first quarter and
a half more, the centre of its cell: the missing plane reads as ones, and the half is a bit of the
mantissa too.

Quarters of a head (channels from j, j + D/4, ...) share the bytes of a plane, so a tile of tokens
is four matrices [tokens, D / 4] that are never put together: a product with all channels is the sum
of four. Addresses within the cache are 64 bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_plugins.attention_backends.zipcache import batch, page

# States, as kernels see them.
SEALED = tl.constexpr(batch.SEALED)
RAW = tl.constexpr(batch.RAW)
# What a plane reads as where there is none: ones.
NO_LOW = tl.constexpr(0x55)
# Softmax in powers of two: one instruction less for each weight.
LOG2E = 1.4426950408889634


@triton.constexpr_function
def part(name: str, block_size: int, head: int, n_k: int, n_v: int, item: int = 1) -> int:
    """Return where a part of a page begins (`page.PageFormat`), in items of some bytes."""
    return int(getattr(page.PageFormat(block_size, head, n_k, n_v), name)) // item


@triton.constexpr_function
def chooses(quota: int, block_size: int) -> bool:
    """Return whether a quota leaves a choice, so that its tokens have bits."""
    return 0 < quota < block_size


@triton.constexpr_function
def number_type(dtype: Any) -> Any:
    """Return the integers that have the bits of a dtype's numbers."""
    return tl.uint32 if dtype == tl.float32 else tl.uint16


@triton.constexpr_function
def zero_of(quarter: int) -> float:
    """Return what stands for code 0 in a quarter of the channels."""
    return 16.0 if quarter % 2 else 64.0


@triton.constexpr_function
def number_base(dtype: Any, quarter: int) -> int:
    """Return the bits of `zero_of`."""
    even, odd = {
        tl.float32: (0x42800000, 0x41800000),
        tl.float16: (0x5400, 0x4C00),
        tl.bfloat16: (0x4280, 0x4180),
    }[dtype]
    return odd if quarter % 2 else even


@triton.constexpr_function
def number_shift(dtype: Any, quarter: int) -> int:
    """Return which bit of its mantissa counts one."""
    return {tl.float32: 17, tl.float16: 4, tl.bfloat16: 1}[dtype] + 2 * (quarter % 2)


def quarter_pad(head_size: int) -> int:
    """Return the channels of a quarter, padded to what a matrix product takes."""
    return max(triton.next_power_of_2(head_size // 4), 16)


def typed(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return pages as bytes, as float16 for the ranges, and as int32 for the bits of tokens."""
    return cache, cache.view(torch.float16), cache.view(torch.int32)


@triton.jit
def _popcount(x: tl.tensor) -> tl.tensor:
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return (((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def ranks(words: tl.tensor, t: tl.tensor, block_size: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Return how many salient tokens are before some, and whether these are salient.

    Args:
        words: The page's bits, int32.
        t: Tokens within the block, int32.
        block_size: Tokens of a block.
    """
    # Counting bits needs no exchange between threads, as a running sum would.
    rank, is_salient = tl.zeros_like(t), tl.zeros_like(t)
    for w in tl.static_range(block_size // 32):
        word = tl.load(words + w).to(tl.uint32, bitcast=True)
        at = t - 32 * w
        inside = tl.minimum(tl.maximum(at, 0), 31).to(tl.uint32)
        one = tl.full(t.shape, 1, tl.uint32)
        before = tl.where(at >= 32, 0xFFFFFFFF, (one << inside) - 1).to(tl.uint32)
        rank += _popcount(word & before).to(tl.int32)
        here = (at >= 0) & (at < 32)
        is_salient += tl.where(here, (word >> inside).to(tl.int32) & 1, 0)
    return rank, is_salient != 0


@triton.jit
def sealed_rows(
    words: tl.tensor, t: tl.tensor, quota: tl.constexpr, block_size: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Return the rows of a sealed block's low plane of some tokens, and whether they have any.

    Args:
        words: The plane's bits of tokens, int32.
        t: Tokens within the block, int32.
        quota: Rows of the plane.
        block_size: Tokens of a block.
    """
    rank, has_low = t, t < quota
    if chooses(quota, block_size):
        rank, has_low = ranks(words, t, block_size)
    return rank, has_low


@triton.jit
def low_rows(
    words: tl.tensor, place: tl.tensor, t: tl.tensor, quota: tl.constexpr, block_size: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """As `sealed_rows`, of a block in any packed state, ``place``."""
    rank, has_low = sealed_rows(words, t, quota, block_size)
    # Of a staged block every token has a low plane.
    return tl.where(place >= 0, t, rank), tl.where(place >= 0, t >= 0, has_low)


@triton.jit
def number_of(
    high: tl.tensor, low: tl.tensor, has_low: tl.tensor, quarter: tl.constexpr, dtype: tl.constexpr
) -> tl.tensor:
    """Return `zero_of` plus code for one quarter of the channels.

    Args:
        high: Bytes of the high plane as `number_type`, shape (tokens, bytes).
        low: As ``high``, of the low plane, `NO_LOW` where there is none.
        has_low: Whether there is one, shape (tokens,).
        quarter: Which quarter.
        dtype: Of the result.
    """
    shift: tl.constexpr = number_shift(dtype, quarter)
    to_low: tl.constexpr = shift - 2 * quarter
    to_high: tl.constexpr = to_low + 2
    high = high << to_high if to_high >= 0 else high >> -to_high
    low = low << to_low if to_low >= 0 else low >> -to_low
    zero: tl.constexpr = number_base(dtype, quarter)
    half: tl.constexpr = zero | 1 << shift - 1
    base = tl.where(has_low, zero, half).to(high.dtype)[:, None]
    bits = (3 << shift) & low | (12 << shift) & high | base
    return bits.to(high.dtype).to(dtype, bitcast=True)


@triton.jit
def load_bytes(
    high: tl.tensor, low: tl.tensor, t: tl.tensor, rank: tl.tensor, has_low: tl.tensor,
    valid: tl.tensor, j: tl.tensor, row: tl.constexpr, dtype: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Load a tile of tokens of both planes, as `number_of` takes them.

    Args:
        high: The high plane.
        low: The low plane, of all tokens or of the salient ones alone.
        t: Tokens within the block.
        rank: Rows of the low plane.
        has_low: Whether a token has one.
        valid: Whether a token is read at all.
        j: Bytes of a row, padded.
        row: Bytes of a row.
        dtype: Of the numbers.
    """
    kind: tl.constexpr = number_type(dtype)
    here, at = (j < row)[None, :], j[None, :]
    mask = valid[:, None] & here
    upper = tl.load(high + t[:, None] * row + at, mask=mask, other=0)
    mask = (valid & has_low)[:, None] & here
    lower = tl.load(low + rank[:, None] * row + at, mask=mask, other=NO_LOW)
    return upper.to(kind), lower.to(kind)


@triton.jit
def softmax_step(score: tl.tensor, weight: tl.tensor, peak: tl.tensor) -> tuple[tl.tensor, ...]:
    """Fold scores into a running softmax (FlashAttention-2).

    Args:
        score: In powers of two, -inf where a key is not seen, float32, shape (queries, keys).
        weight: Sum of weights, float32, shape (queries,).
        peak: Largest score, float32, shape (queries,).

    Returns:
        Weights, what has been summed up before is to be multiplied by, ``weight`` and ``peak``.
    """
    now = tl.maximum(peak, tl.max(score, axis=1))
    # A query that has seen nothing yet: -inf minus -inf is no number.
    base = tl.where(now == float("-inf"), 0.0, now)
    p = tl.exp2(score - base[:, None])
    fade = tl.exp2(peak - base)
    return p, fade, weight * fade + tl.sum(p, axis=1), now
