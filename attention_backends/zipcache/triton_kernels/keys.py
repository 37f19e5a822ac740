"""Keys and values of a block as they are attended to, in registers, for many queries at once.

Decode folds a block's ranges into its one query instead (`decode`); with many queries that would
cost more than rebuilding keys and values does.
"""

import triton
import triton.language as tl

from vllm_plugins.attention_backends.zipcache.triton_kernels.pages import (
    RAW,
    load_bytes,
    low_rows,
    number_of,
    part,
    zero_of,
)


@triton.jit
def open_block(
    page: tl.tensor, place: tl.tensor, h: tl.tensor, kv_heads: tl.tensor, cache: tl.tensor,
    halves: tl.tensor, words: tl.tensor, staging: tl.tensor, residual: tl.tensor,
    page_block: tl.tensor, page_head: tl.tensor,
    block_size: tl.constexpr, head: tl.constexpr, n_k: tl.constexpr, n_v: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Return where the parts of a block are.

    Args:
        page: The block.
        place: Its state.
        h: KV head.
        kv_heads: Number of KV heads.
        cache: Pages as bytes, like the next two as other numbers.
        halves: As float16.
        words: As int32.
        staging: Low planes of blocks that are not sealed.
        residual: Keys and values of blocks that are not packed.
        page_block: Bytes from one block to the next.
        page_head: Bytes from one KV head's page to the next.
        block_size: Tokens of a block.
        head: Head size.
        n_k: Salient tokens of a block, of keys.
        n_v: The same of values.

    Returns:
        The page as bytes and as float16; the keys' low plane, and the values' from it on in bytes;
        the residual row; the bits of tokens, keys' first; and the number of the row that holds what
        is not in the page.
    """
    at = page.to(tl.int64) * page_block + h * page_head
    held = tl.where(place <= RAW, -place + RAW, tl.maximum(place, 0)).to(tl.int64) * kv_heads + h
    low = cache + at + part("k_low", block_size, head, n_k, n_v)
    next_low = n_k * (head // 4)
    if place >= 0:
        low = staging + held * (2 * block_size * (head // 4))
        next_low = block_size * (head // 4)
    bits = words + at // 4 + part("k_bitmap", block_size, head, n_k, n_v, 4)
    raw = residual + held * (2 * block_size * head)
    return cache + at, halves + at // 2, low, next_low, raw, bits, held


@triton.jit
def _raw_quarter(
    rows: tl.tensor, t: tl.tensor, valid: tl.tensor, j: tl.tensor, quarter: tl.constexpr,
    head: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    mask = valid[:, None] & (j < head // 4)[None, :]
    return tl.load(rows + t[:, None] * head + quarter * (head // 4) + j[None, :], mask=mask,
                   other=0.0)  # fmt: skip


@triton.jit
def _key_quarter(
    high: tl.tensor, low: tl.tensor, has_low: tl.tensor, half: tl.tensor, j: tl.tensor,
    quarter: tl.constexpr, dtype: tl.constexpr, block_size: tl.constexpr, head: tl.constexpr,
    n_k: tl.constexpr, n_v: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    at, here = quarter * (head // 4) + j, j < head // 4
    step = tl.load(half + part("k_step", block_size, head, n_k, n_v, 2) + at, mask=here, other=0.0)
    least = tl.load(half + part("k_min", block_size, head, n_k, n_v, 2) + at, mask=here, other=0.0)
    code = number_of(high, low, has_low, quarter, dtype).to(tl.float32) - zero_of(quarter)
    return (code * step.to(tl.float32)[None, :] + least.to(tl.float32)[None, :]).to(dtype)


@triton.jit
def _value_quarter(
    high: tl.tensor, low: tl.tensor, has_low: tl.tensor, step: tl.tensor, least: tl.tensor,
    half: tl.tensor, j: tl.tensor, quarter: tl.constexpr, dtype: tl.constexpr,
    block_size: tl.constexpr, head: tl.constexpr, n_k: tl.constexpr, n_v: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    at = part("v_scale", block_size, head, n_k, n_v, 2) + quarter * (head // 4) + j
    scale = tl.load(half + at, mask=j < head // 4, other=0.0).to(tl.float32)
    code = number_of(high, low, has_low, quarter, dtype).to(tl.float32) - zero_of(quarter)
    return ((code * step[:, None] + least[:, None]) * scale[None, :]).to(dtype)


@triton.jit
def load_keys(
    opened: tl.tensor, half: tl.tensor, low: tl.tensor, raw: tl.tensor, bits: tl.tensor,
    place: tl.tensor, t: tl.tensor, valid: tl.tensor, j: tl.tensor,
    block_size: tl.constexpr, head: tl.constexpr, n_k: tl.constexpr, n_v: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Return a tile of a block's keys in the residual's dtype, one matrix for each quarter.

    Args:
        opened: As of `open_block`, like the next four.
        half: The page as float16.
        low: The keys' low plane.
        raw: The residual row.
        bits: The bits of tokens.
        place: The block's state.
        t: Tokens within the block.
        valid: Whether a token is read; others are zero, or whatever a page has.
        j: Channels of a quarter, padded.
        block_size: Tokens of a block.
        head: Head size.
        n_k: Salient tokens of a block, of keys.
        n_v: The same of values.
    """
    dtype: tl.constexpr = raw.dtype.element_ty
    if place <= RAW:
        k0 = _raw_quarter(raw, t, valid, j, 0, head)
        k1 = _raw_quarter(raw, t, valid, j, 1, head)
        k2 = _raw_quarter(raw, t, valid, j, 2, head)
        k3 = _raw_quarter(raw, t, valid, j, 3, head)
    else:
        rank, has_low = low_rows(bits, place, t, n_k, block_size)
        high = opened + part("k_high", block_size, head, n_k, n_v)
        high, under = load_bytes(high, low, t, rank, has_low, valid, j, head // 4, dtype)
        k0 = _key_quarter(high, under, has_low, half, j, 0, dtype, block_size, head, n_k, n_v)
        k1 = _key_quarter(high, under, has_low, half, j, 1, dtype, block_size, head, n_k, n_v)
        k2 = _key_quarter(high, under, has_low, half, j, 2, dtype, block_size, head, n_k, n_v)
        k3 = _key_quarter(high, under, has_low, half, j, 3, dtype, block_size, head, n_k, n_v)
    return k0, k1, k2, k3


@triton.jit
def load_values(
    opened: tl.tensor, half: tl.tensor, low: tl.tensor, raw: tl.tensor, bits: tl.tensor,
    place: tl.tensor, t: tl.tensor, valid: tl.tensor, j: tl.tensor,
    block_size: tl.constexpr, head: tl.constexpr, n_k: tl.constexpr, n_v: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Return a tile of a block's values; ``low`` is their plane, the rest as of `load_keys`."""
    dtype: tl.constexpr = raw.dtype.element_ty
    of_keys: tl.constexpr = part("k_bitmap", block_size, head, n_k, n_v, 4)
    bits += part("v_bitmap", block_size, head, n_k, n_v, 4) - of_keys
    if place <= RAW:
        raw += block_size * head
        v0 = _raw_quarter(raw, t, valid, j, 0, head)
        v1 = _raw_quarter(raw, t, valid, j, 1, head)
        v2 = _raw_quarter(raw, t, valid, j, 2, head)
        v3 = _raw_quarter(raw, t, valid, j, 3, head)
    else:
        rank, has_low = low_rows(bits, place, t, n_v, block_size)
        high = opened + part("v_high", block_size, head, n_k, n_v)
        high, under = load_bytes(high, low, t, rank, has_low, valid, j, head // 4, dtype)
        at = half + part("v_min", block_size, head, n_k, n_v, 2) + t
        least = tl.load(at, mask=valid, other=0.0).to(tl.float32)
        step = tl.load(at + block_size, mask=valid, other=0.0).to(tl.float32)
        v0 = _value_quarter(high, under, has_low, step, least, half, j, 0, dtype, block_size, head,
                            n_k, n_v)  # fmt: skip
        v1 = _value_quarter(high, under, has_low, step, least, half, j, 1, dtype, block_size, head,
                            n_k, n_v)  # fmt: skip
        v2 = _value_quarter(high, under, has_low, step, least, half, j, 2, dtype, block_size, head,
                            n_k, n_v)  # fmt: skip
        v3 = _value_quarter(high, under, has_low, step, least, half, j, 3, dtype, block_size, head,
                            n_k, n_v)  # fmt: skip
    return v0, v1, v2, v3


@triton.jit
def load_own(
    rows: tl.tensor, row_stride: tl.tensor, t: tl.tensor, valid: tl.tensor, j: tl.tensor,
    quarter: tl.constexpr, head: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return a quarter of some of the step's own keys or values, zero where not ``valid``."""
    mask = valid[:, None] & (j < head // 4)[None, :]
    at = t.to(tl.int64)[:, None] * row_stride + quarter * (head // 4) + j[None, :]
    return tl.load(rows + at, mask=mask, other=0.0)
