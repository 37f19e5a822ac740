"""Attention of one query of each row: split over keys, pages read as they are packed.

A key is min + step * code by channel, so q . k = q . min + (q * step) . code: ranges are folded
into the query once for each block. A value is c * (min + step * code) with c by channel and the
rest by token: ranges are folded into the weights, c into the block's sum. Codes go from registers
into tensor cores (`pages.number_of`); no page is unpacked in memory.

The cached blocks of a sequence are cut into at most as many parts as the grid has splits, of
`MIN_KEYS` keys at least. How they are cut depends on the sequence's length alone, read on the
device: so neither the grid nor a result depends on what else is in a batch, and a graph can be
captured. The query's own key and value are read as they came, by the first split.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_plugins.attention_backends.zipcache.batch import LayerMemory
from vllm_plugins.attention_backends.zipcache.triton_kernels.batches import (
    DeviceBatch,
    Workspace,
    row_of_batch,
)
from vllm_plugins.attention_backends.zipcache.triton_kernels.pages import (
    LOG2E,
    RAW,
    load_bytes,
    low_rows,
    number_of,
    part,
    quarter_pad,
    softmax_step,
    typed,
    zero_of,
)
from vllm_plugins.attention_backends.zipcache.triton_kernels.raw import (
    own_score,
    own_value,
    raw_score,
    raw_values,
)

# Keys of a split at least: fewer cost more in merging than they gain.
MIN_KEYS = tl.constexpr(256)
# Codes count from the middle of their range: so what is rounded is multiplied by 7.5 at most.
MIDDLE = tl.constexpr(7.5)
# Splits that are merged at once.
MERGE = 16
# Multiprocessors of an H100 or H200; each gets two programs of a single sequence.
MULTIPROCESSORS = 132
LEAST_SPLITS, MOST_SPLITS = 8, 64


def num_splits(kv_heads: int, max_len: int) -> int:
    """Return the splits of a sequence.

    Args:
        kv_heads: Of the layer on this rank.
        max_len: Longest sequence.
    """
    wanted = triton.cdiv(2 * MULTIPROCESSORS, kv_heads)
    splits = min(max(wanted, LEAST_SPLITS), MOST_SPLITS)
    return min(splits, triton.cdiv(max_len, MIN_KEYS.value))


@triton.jit
def blocks_of_split(
    cached: tl.tensor, splits: tl.tensor, block_size: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Return the blocks of a sequence's cached tokens, and how many of them a split has."""
    blocks = (cached + block_size - 1) // block_size
    least: tl.constexpr = (MIN_KEYS + block_size - 1) // block_size
    return blocks, tl.maximum((blocks + splits - 1) // splits, least)


@triton.jit
def _fold(
    q: tl.tensor, halves: tl.tensor, j: tl.tensor, quarter: tl.constexpr, dtype: tl.constexpr,
    block_size: tl.constexpr, head: tl.constexpr, n_k: tl.constexpr, n_v: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Fold a block's ranges into a quarter of the queries.

    Returns:
        What codes are multiplied by, and for each channel what is added to each query's scores.
    """
    at, here = quarter * (head // 4) + j, j < head // 4
    step = halves + part("k_step", block_size, head, n_k, n_v, 2) + at
    least = halves + part("k_min", block_size, head, n_k, n_v, 2) + at
    step, least = tl.load(step, mask=here, other=0.0), tl.load(least, mask=here, other=0.0)
    folded = (q * step.to(tl.float32)[None, :]).to(dtype)
    middle = least.to(tl.float32) + step.to(tl.float32) * MIDDLE
    # What is taken away again has to be what was rounded.
    away = folded.to(tl.float32) * (zero_of(quarter) + MIDDLE)
    return folded, q * middle[None, :] - away


@triton.jit
def _unfold(
    total: tl.tensor, fade: tl.tensor, product: tl.tensor, offset: tl.tensor, sums: tl.tensor,
    halves: tl.tensor, is_seen: tl.tensor, j: tl.tensor, quarter: tl.constexpr,
    block_size: tl.constexpr, head: tl.constexpr, n_k: tl.constexpr, n_v: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Add a block's weighted values to a quarter of the sums.

    Args:
        total: Sums so far.
        fade: What they are multiplied by.
        product: Weights, with the steps in them, times numbers of codes.
        offset: Weights times the middles of ranges, by query.
        sums: Of the weights with the steps in them, as they were rounded.
        halves: The page as float16.
        is_seen: Whether any token of it is.
        j: Channels of a quarter, padded.
        quarter: Which quarter.
        block_size: Tokens of a block.
        head: Head size.
        n_k: Salient tokens of a block, of keys.
        n_v: The same of values.
    """
    at = part("v_scale", block_size, head, n_k, n_v, 2) + quarter * (head // 4) + j
    # The scale of a page that is not seen may be no number.
    mask = j < tl.where(is_seen, head // 4, 0)
    scale = tl.load(halves + at, mask=mask, other=0.0).to(tl.float32)
    values = product + (offset - sums * (zero_of(quarter) + MIDDLE))[:, None]
    return total * fade[:, None] + values * scale[None, :]


@triton.jit
def _attend_pages(
    q0: tl.tensor, q1: tl.tensor, q2: tl.tensor, q3: tl.tensor, first: tl.tensor, last: tl.tensor,
    cached: tl.tensor, table: tl.tensor, state: tl.tensor, cache: tl.tensor, halves: tl.tensor,
    words: tl.tensor, staging: tl.tensor, page_block: tl.tensor, staged_row: tl.tensor,
    a0: tl.tensor, a1: tl.tensor, a2: tl.tensor, a3: tl.tensor, weight: tl.tensor, peak: tl.tensor,
    dtype: tl.constexpr, block_size: tl.constexpr, head: tl.constexpr, quarter: tl.constexpr,
    n_k: tl.constexpr, n_v: tl.constexpr, tile: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Attend to the packed blocks of a split, the others passed over.

    Returns:
        Sums, weight and peak, and how many blocks are raw.
    """
    row: tl.constexpr = head // 4
    j, num_raw = tl.arange(0, quarter), 0
    for i in range(first, last):
        page = tl.load(table + i)
        place = tl.load(state + page)
        num_raw += (place <= RAW).to(tl.int32)
        # Of a raw block nothing is seen here: the loop has no branch, so loads run ahead.
        seen = tl.where(place <= RAW, 0, tl.minimum(block_size, cached - i * block_size))
        at = page.to(tl.int64) * page_block
        base, half = cache + at, halves + at // 2
        k_bits = words + at // 4 + part("k_bitmap", block_size, head, n_k, n_v, 4)
        v_bits = words + at // 4 + part("v_bitmap", block_size, head, n_k, n_v, 4)
        low = staging + tl.maximum(place, 0).to(tl.int64) * staged_row
        k_low = tl.where(place >= 0, low, base + part("k_low", block_size, head, n_k, n_v))
        low += block_size * row
        v_low = tl.where(place >= 0, low, base + part("v_low", block_size, head, n_k, n_v))
        f0, c0 = _fold(q0, half, j, 0, dtype, block_size, head, n_k, n_v)
        f1, c1 = _fold(q1, half, j, 1, dtype, block_size, head, n_k, n_v)
        f2, c2 = _fold(q2, half, j, 2, dtype, block_size, head, n_k, n_v)
        f3, c3 = _fold(q3, half, j, 3, dtype, block_size, head, n_k, n_v)
        constant = tl.sum((c0 + c1) + (c2 + c3), axis=1)
        for begin in tl.static_range(0, block_size, tile):
            t = begin + tl.arange(0, tile)
            valid = t < seen
            rank, has_low = low_rows(k_bits, place, t, n_k, block_size)
            high, under = load_bytes(
                base + part("k_high", block_size, head, n_k, n_v), k_low, t, rank, has_low, valid,
                j, row, dtype,
            )  # fmt: skip
            score = tl.dot(f0, tl.trans(number_of(high, under, has_low, 0, dtype)),
                           input_precision="ieee")  # fmt: skip
            score = tl.dot(f1, tl.trans(number_of(high, under, has_low, 1, dtype)), score,
                           input_precision="ieee")  # fmt: skip
            score = tl.dot(f2, tl.trans(number_of(high, under, has_low, 2, dtype)), score,
                           input_precision="ieee")  # fmt: skip
            score = tl.dot(f3, tl.trans(number_of(high, under, has_low, 3, dtype)), score,
                           input_precision="ieee")  # fmt: skip
            score = tl.where(valid[None, :], score + constant[:, None], float("-inf"))
            p, fade, weight, peak = softmax_step(score, weight, peak)
            # Ranges behind the last token may be no numbers.
            at_t = half + part("v_min", block_size, head, n_k, n_v, 2) + t
            least = tl.load(at_t, mask=valid, other=0.0).to(tl.float32)
            step = tl.load(at_t + block_size, mask=valid, other=0.0).to(tl.float32)
            w = (p * step[None, :]).to(dtype)
            offset = tl.sum(p * (least + step * MIDDLE)[None, :], axis=1)
            sums = tl.sum(w.to(tl.float32), axis=1)
            if n_v != n_k:
                rank, has_low = low_rows(v_bits, place, t, n_v, block_size)
            high, under = load_bytes(
                base + part("v_high", block_size, head, n_k, n_v), v_low, t, rank, has_low, valid,
                j, row, dtype,
            )  # fmt: skip
            v = tl.dot(w, number_of(high, under, has_low, 0, dtype), input_precision="ieee")
            a0 = _unfold(a0, fade, v, offset, sums, half, seen > 0, j, 0, block_size, head, n_k,
                         n_v)  # fmt: skip
            v = tl.dot(w, number_of(high, under, has_low, 1, dtype), input_precision="ieee")
            a1 = _unfold(a1, fade, v, offset, sums, half, seen > 0, j, 1, block_size, head, n_k,
                         n_v)  # fmt: skip
            v = tl.dot(w, number_of(high, under, has_low, 2, dtype), input_precision="ieee")
            a2 = _unfold(a2, fade, v, offset, sums, half, seen > 0, j, 2, block_size, head, n_k,
                         n_v)  # fmt: skip
            v = tl.dot(w, number_of(high, under, has_low, 3, dtype), input_precision="ieee")
            a3 = _unfold(a3, fade, v, offset, sums, half, seen > 0, j, 3, block_size, head, n_k,
                         n_v)  # fmt: skip
    return a0, a1, a2, a3, weight, peak, num_raw


# The width of a block table is not known when kernels are warmed up, and of no use.
@triton.jit(do_not_specialize=["table_row"])
def _attend_split(
    query: tl.tensor, key: tl.tensor, value: tl.tensor, query_start: tl.tensor,
    seq_lens: tl.tensor, table: tl.tensor, state: tl.tensor, cache: tl.tensor, halves: tl.tensor,
    words: tl.tensor, residual: tl.tensor, staging: tl.tensor, partial: tl.tensor,
    split_lse: tl.tensor, scale: float, query_token: tl.tensor, query_head: tl.tensor,
    key_token: tl.tensor, key_head: tl.tensor, value_token: tl.tensor, value_head: tl.tensor,
    table_row: tl.tensor, page_block: tl.tensor, page_head: tl.tensor,
    group: tl.constexpr, rows: tl.constexpr, block_size: tl.constexpr, head: tl.constexpr,
    quarter: tl.constexpr, n_k: tl.constexpr, n_v: tl.constexpr, tile: tl.constexpr,
    raw_tile: tl.constexpr,
) -> None:  # fmt: skip
    """Attend to one split with all query heads of a KV head."""
    s, h, m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, kv_heads = tl.num_programs(0), tl.num_programs(1)
    start, length, cached = row_of_batch(query_start, seq_lens, m)
    blocks, each = blocks_of_split(cached, splits, block_size)
    first, last = s * each, tl.minimum(s * each + each, blocks)
    if (length != 1) | ((first >= last) & (s > 0)):
        return
    row: tl.constexpr = head // 4
    dtype: tl.constexpr = query.dtype.element_ty
    g, j = tl.arange(0, rows), tl.arange(0, quarter)
    token, here = start.to(tl.int64), (g < group)[:, None] & (j < row)[None, :]
    query += token * query_token + (h * group + g)[:, None] * query_head + j[None, :]
    q0 = tl.load(query, mask=here, other=0.0).to(tl.float32) * scale
    q1 = tl.load(query + row, mask=here, other=0.0).to(tl.float32) * scale
    q2 = tl.load(query + 2 * row, mask=here, other=0.0).to(tl.float32) * scale
    q3 = tl.load(query + 3 * row, mask=here, other=0.0).to(tl.float32) * scale
    # The query's own key is where the first split begins.
    key += token * key_token + h * key_head
    value += token * value_token + h * value_head
    own = own_score(q0, key, j, 0, head) + own_score(q1, key, j, 1, head)
    own += own_score(q2, key, j, 2, head) + own_score(q3, key, j, 3, head)
    peak = tl.where(s == 0, own, float("-inf"))
    weight = tl.where(s == 0, tl.full([rows], 1.0, tl.float32), 0.0)
    a0 = own_value(value, s == 0, j, 0, rows, head)
    a1 = own_value(value, s == 0, j, 1, rows, head)
    a2 = own_value(value, s == 0, j, 2, rows, head)
    a3 = own_value(value, s == 0, j, 3, rows, head)
    table += m.to(tl.int64) * table_row
    a0, a1, a2, a3, weight, peak, num_raw = _attend_pages(
        q0, q1, q2, q3, first, last, cached, table, state, cache + h * page_head,
        halves + h * page_head // 2, words + h * page_head // 4,
        staging + h * (2 * block_size * row), page_block, kv_heads * (2 * block_size * row),
        a0, a1, a2, a3, weight, peak, dtype, block_size, head, quarter, n_k, n_v, tile,
    )  # fmt: skip
    if num_raw > 0:
        # As they came, so that what is not packed is attended to as by any other kernel.
        r0 = tl.load(query, mask=here, other=0.0)
        r1 = tl.load(query + row, mask=here, other=0.0)
        r2 = tl.load(query + 2 * row, mask=here, other=0.0)
        r3 = tl.load(query + 3 * row, mask=here, other=0.0)
        for i in range(first, last):
            place = tl.load(state + tl.load(table + i))
            if place <= RAW:
                raw = ((-place + RAW).to(tl.int64) * kv_heads + h) * (2 * block_size * head)
                seen = tl.minimum(block_size, cached - i * block_size)
                for begin in range(0, seen, raw_tile):
                    t = begin + tl.arange(0, raw_tile)
                    score = (
                        raw_score(r0, residual + raw, t, seen, j, 0, head)
                        + raw_score(r1, residual + raw, t, seen, j, 1, head)
                        + raw_score(r2, residual + raw, t, seen, j, 2, head)
                        + raw_score(r3, residual + raw, t, seen, j, 3, head)
                    )
                    score = tl.where((t < seen)[None, :], score * scale, float("-inf"))
                    p, fade, weight, peak = softmax_step(score, weight, peak)
                    p = p.to(dtype)
                    v = residual + raw + block_size * head
                    a0 = raw_values(a0, fade, p, v, t, seen, j, 0, head)
                    a1 = raw_values(a1, fade, p, v, t, seen, j, 1, head)
                    a2 = raw_values(a2, fade, p, v, t, seen, j, 2, head)
                    a3 = raw_values(a3, fade, p, v, t, seen, j, 3, head)
    at = ((m.to(tl.int64) * kv_heads + h) * splits + s) * group + g
    tl.store(split_lse + at, peak + tl.log2(weight), mask=g < group)
    to, by = partial + at[:, None] * head + j[None, :], 1.0 / weight[:, None]
    tl.store(to, a0 * by, mask=here)
    tl.store(to + row, a1 * by, mask=here)
    tl.store(to + 2 * row, a2 * by, mask=here)
    tl.store(to + 3 * row, a3 * by, mask=here)


@triton.jit
def _merge(
    query_start: tl.tensor, seq_lens: tl.tensor, partial: tl.tensor, split_lse: tl.tensor,
    lse: tl.tensor, out: tl.tensor, out_token: tl.tensor, out_head: tl.tensor,
    splits: tl.constexpr, group: tl.constexpr, block_size: tl.constexpr, head: tl.constexpr,
    head_pad: tl.constexpr, tile: tl.constexpr,
) -> None:  # fmt: skip
    """Merge the splits of one query head (section 2.2 of arXiv 2501.01005)."""
    g, m, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    start, length, cached = row_of_batch(query_start, seq_lens, m)
    if length != 1:
        return
    blocks, each = blocks_of_split(cached, splits, block_size)
    # Nothing is written of splits behind the last block.
    used = tl.maximum((blocks + each - 1) // each, 1)
    d, lane = tl.arange(0, head_pad), tl.arange(0, tile)
    state = (m.to(tl.int64) * (heads // group) + g // group) * splits * group + g % group
    total, weight, peak = tl.zeros([head_pad], tl.float32), 0.0, float("-inf")
    for begin in range(0, used, tile):
        s = begin + lane
        at = state + s * group
        here = tl.load(split_lse + at, mask=s < used, other=float("-inf"))
        mask = (s < used)[:, None] & (d < head)[None, :]
        part_of = tl.load(partial + at[:, None] * head + d[None, :], mask=mask, other=0.0)
        now = tl.maximum(peak, tl.max(here, axis=0))
        p, fade = tl.exp2(here - now), tl.exp2(peak - now)
        total = total * fade + tl.sum(part_of * p[:, None], axis=0)
        weight = weight * fade + tl.sum(p, axis=0)
        peak = now
    tl.store(lse + start.to(tl.int64) * heads + g, peak + tl.log2(weight))
    out += start.to(tl.int64) * out_token + g * out_head
    tl.store(out + d, (total / weight).to(out.dtype.element_ty), mask=d < head)


def decode(
    layer: LayerMemory,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    batch: DeviceBatch,
    space: Workspace,
    scale: float,
) -> None:
    """Attend with the rows that have one token.

    Args:
        layer: The layer's memory, after `write.write` of the batch.
        query: Shape (tokens, heads, head size), the last axis contiguous.
        key: The step's keys, shape (tokens, kv heads, head size).
        value: As ``key``.
        out: Of the shape of ``query``; these rows' tokens are written.
        batch: The batch.
        space: What layers share.
        scale: Of the scores.
    """
    page, heads, kv_heads = layer.page, query.shape[1], key.shape[1]
    rows, splits, group = len(batch.seq_lens), space.partial.shape[2], heads // kv_heads
    geometry = {"group": group, "block_size": page.block_size, "head": page.head_size}
    _attend_split[(splits, kv_heads, rows)](
        query, key, value, batch.query_start, batch.seq_lens, batch.block_table, batch.state,
        *typed(layer.cache), layer.residual, layer.staging, space.partial, space.split_lse,
        scale * LOG2E, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        batch.block_table.stride(0), *layer.cache.stride()[:2],
        rows=max(triton.next_power_of_2(group), 16), quarter=quarter_pad(page.head_size),
        n_k=page.k_salient, n_v=page.v_salient, **geometry,
        **_tiles(page.block_size, page.head_size, query.dtype),
    )  # fmt: skip
    _merge[(heads, rows)](
        batch.query_start, batch.seq_lens, space.partial, space.split_lse, space.lse, out,
        *out.stride()[:2], splits=splits, head_pad=triton.next_power_of_2(page.head_size),
        tile=MERGE, num_warps=4, **geometry,
    )  # fmt: skip


def _tiles(block_size: int, head_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return tokens in registers at once, and how a program runs."""
    narrow = head_size <= 128 and dtype.itemsize == 2
    tile = min(block_size, 128 if narrow else 64)
    return {"tile": tile, "raw_tile": 32, "num_warps": 4, "num_stages": 2}
