"""Attending to one tile of keys: where they are, and the running softmax (FlashAttention-2)."""

import triton
import triton.language as tl

from vllm_plugins.attention_backends.hip.triton_kernels.blocks import NONE, cache_place

# Softmax in powers of two: one instruction less for each weight.
LOG2E = 1.4426950408889634


@triton.jit
def attended(
    n: tl.tensor,
    selected: tl.tensor,
    sink: tl.tensor,
    num_selected: tl.tensor,
    window: tl.tensor,
    end: tl.tensor,
    chunk: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Return the positions of some of the keys that a sparse query block attends to.

    Keys are numbered through: sink, selected blocks, window. Each stands for itself once, since
    what selected blocks share with the window is left to the window, and candidates for selection
    begin behind the sink.

    Args:
        n: Numbers of keys.
        selected: The block's list of selected key blocks, sorted.
        sink: Keys of the sink.
        num_selected: Keys of selected blocks, a multiple of ``chunk``; the list may be shorter.
        window: Position of the window's first key, not below ``sink``.
        end: Position behind the last key.
        chunk: Keys of a selected block.

    Returns:
        Positions, and whether there is such a key, of the shape of ``n``.
    """
    in_sink, in_block = n < sink, (n >= sink) & (n < sink + num_selected)
    at = tl.where(in_block, n - sink, 0)
    first = tl.load(selected + at // chunk, mask=in_block, other=NONE)
    # NONE must not wrap around when something is added to it.
    block = tl.where(first == NONE, window, first + at % chunk)
    position = tl.where(in_sink, n, window + n - sink - num_selected)
    position = tl.where(in_block, block, position)
    valid = tl.where(in_block, position < window, position < end)
    return tl.where(valid, position, 0), valid


@triton.jit
def attend_tile(
    query: tl.tensor, query_position: tl.tensor, scale: tl.tensor,
    total: tl.tensor, weight: tl.tensor, peak: tl.tensor,
    position: tl.tensor, valid: tl.tensor, table: tl.tensor, keys: tl.tensor, values: tl.tensor,
    key_page: tl.tensor, key_token: tl.tensor, value_page: tl.tensor, value_token: tl.tensor,
    block_size: tl.constexpr, head: tl.constexpr, head_pad: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Fold a tile of keys into the running softmax of some queries, causally.

    Args:
        query: Shape (queries, padded head size).
        query_position: Position of each query, shape (queries,).
        scale: Of the scores, times `LOG2E`.
        total: Weighted values, float32, shape (queries, padded head size).
        weight: Sum of weights, float32, shape (queries,).
        peak: Largest score, float32, shape (queries,).
        position: Of the keys, shape (keys,).
        valid: Whether there is such a key.
        table: The request's row of the block table.
        keys: First key of the kv head.
        values: First value of the kv head.
        key_page: Elements from one cache block of keys to the next.
        key_token: Elements from one key of a cache block to the next.
        value_page: As ``key_page``, of values.
        value_token: As ``key_token``, of values.
        block_size: Tokens of a cache block.
        head: Head size.
        head_pad: Head size, padded to a power of two.

    Returns:
        ``total``, ``weight`` and ``peak`` with the tile in them.
    """
    d = tl.arange(0, head_pad)
    mask = valid[:, None] & (d < head)[None, :]
    page, token = cache_place(position, valid, table, block_size)
    at = page * key_page + token * key_token
    k = tl.load(keys + at[:, None] + d[None, :], mask=mask, other=0.0)
    at = page * value_page + token * value_token
    v = tl.load(values + at[:, None] + d[None, :], mask=mask, other=0.0)
    score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
    seen = valid[None, :] & (position[None, :] <= query_position[:, None])
    score = tl.where(seen, score, float("-inf"))
    now = tl.maximum(peak, tl.max(score, axis=1))
    # A query that has seen nothing yet: -inf minus -inf is no number.
    base = tl.where(now == float("-inf"), 0.0, now)
    p = tl.exp2(score - base[:, None])
    fade = tl.exp2(peak - base)
    weight = weight * fade + tl.sum(p, axis=1)
    total = total * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return total, weight, now
