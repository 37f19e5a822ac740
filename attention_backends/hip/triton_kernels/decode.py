"""Attention of few queries: decode, and verification of drafts.

The keys of a query block are cut into splits of fixed size, one program each and kv head, whose
results a second kernel merges by their log-sum-exp. How they are cut depends on the layer's plan
alone, so what else is in a batch changes no result.
"""

import torch
import triton
import triton.language as tl

from vllm_plugins.attention_backends.hip.plan import LayerPlan
from vllm_plugins.attention_backends.hip.triton_kernels.blocks import DENSE, Batch, query_block
from vllm_plugins.attention_backends.hip.triton_kernels.tiles import LOG2E, attend_tile, attended

# Keys of one program: 13 of them for the default plan, 104 with 8 kv heads, one for most of an
# H100's 132 multiprocessors at batch 1.
SPLIT = 256
# Splits that are merged at once.
MERGE = 16


@triton.jit
def _is_empty(
    n: tl.tensor, selected: tl.tensor, window: tl.tensor, end: tl.tensor,
    sink: tl.constexpr, top_k: tl.constexpr, chunk: tl.constexpr, split: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Whether none of the ``split`` keys from number ``n`` on exists (`tiles.attended`)."""
    at = tl.maximum(n - sink, 0)
    in_block = (n + split > sink) & (at < top_k)
    # The list is sorted: what follows the first is not before it.
    first = tl.load(selected + at // chunk, mask=in_block, other=2**31 - 1)
    in_window = (n + split > sink + top_k) & (window + tl.maximum(at - top_k, 0) < end)
    return (n >= tl.minimum(sink, end)) & (first >= window) & (in_window == 0)


# The width of a block table is not known when kernels are warmed up, and of no use.
@triton.jit(do_not_specialize=["table_row"])
def _attend_split(
    query: tl.tensor, keys: tl.tensor, values: tl.tensor, block_table: tl.tensor,
    selected: tl.tensor, blocks: tl.tensor, partial: tl.tensor, lse: tl.tensor, scale: float,
    query_token: tl.tensor, query_head: tl.tensor,
    key_page: tl.tensor, key_token: tl.tensor, key_head: tl.tensor,
    value_page: tl.tensor, value_token: tl.tensor, value_head: tl.tensor, table_row: tl.tensor,
    sink: tl.constexpr, window: tl.constexpr, top_k: tl.constexpr, chunk: tl.constexpr,
    block_size: tl.constexpr, queries: tl.constexpr, group: tl.constexpr, rows: tl.constexpr,
    head: tl.constexpr, head_pad: tl.constexpr, split: tl.constexpr, tile: tl.constexpr,
) -> None:  # fmt: skip
    """Attend to one split with all queries and query heads of a kv head."""
    m, kv_head, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, length, row, position, level, list_row = query_block(blocks, m)
    if length == 0:
        return
    end, dense = position + length, level == DENSE
    r, d = tl.arange(0, rows), tl.arange(0, head_pad)
    t, g = r // group, r % group
    # Where this program's states are: (block, kv head, split, query, query head).
    state = (m * tl.num_programs(1) + kv_head).to(tl.int64) * tl.num_programs(2) + s
    state = state * (queries * group) + r
    exists = t < tl.minimum(length, queries)
    selected += list_row * (top_k // chunk)
    first = tl.maximum(position + 1 - window, sink)
    if dense:
        empty = s * split >= end
    else:
        empty = _is_empty(s * split, selected, first, end, sink, top_k, chunk, split)
    if empty:
        tl.store(lse + state, tl.full([rows], float("-inf"), tl.float32), mask=exists)
        return

    in_row = exists[:, None] & (d < head)[None, :]
    query += (start + t).to(tl.int64)[:, None] * query_token
    query += (kv_head * group + g)[:, None] * query_head + d[None, :]
    q = tl.load(query, mask=in_row, other=0.0)
    keys += kv_head.to(tl.int64) * key_head
    values += kv_head.to(tl.int64) * value_head
    table = block_table + row.to(tl.int64) * table_row
    # Of a dense block everything is sink.
    sinks, blocked = tl.where(dense, end, sink), tl.where(dense, 0, top_k)
    first = tl.where(dense, end, first)
    total = tl.zeros([rows, head_pad], tl.float32)
    weight, peak = tl.zeros([rows], tl.float32), tl.full([rows], float("-inf"), tl.float32)
    for begin in range(s * split, s * split + split, tile):
        n = begin + tl.arange(0, tile)
        at, valid = attended(n, selected, sinks, blocked, first, end, chunk)
        total, weight, peak = attend_tile(
            q, position + t, scale, total, weight, peak, at, valid, table, keys, values,
            key_page, key_token, value_page, value_token, block_size, head, head_pad,
        )  # fmt: skip
    seen = weight > 0.0
    total = total / tl.where(seen, weight, 1.0)[:, None]
    tl.store(partial + state[:, None] * head + d[None, :], total, mask=in_row)
    tl.store(lse + state, tl.where(seen, peak + tl.log2(weight), float("-inf")), mask=exists)


@triton.jit(do_not_specialize=["num_splits"])
def _merge(
    partial: tl.tensor, lse: tl.tensor, out: tl.tensor, blocks: tl.tensor, num_splits: tl.tensor,
    out_token: tl.tensor, out_head: tl.tensor,
    queries: tl.constexpr, group: tl.constexpr, head: tl.constexpr, head_pad: tl.constexpr,
    tile: tl.constexpr,
) -> None:  # fmt: skip
    """Merge the splits of one query and query head (section 2.2 of arXiv 2501.01005)."""
    m, t, h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, length, _, _, _, _ = query_block(blocks, m)
    if t >= length:
        return
    d, lane = tl.arange(0, head_pad), tl.arange(0, tile)
    state = m.to(tl.int64) * (tl.num_programs(2) // group) + h // group
    state = state * num_splits * (queries * group) + t * group + h % group
    total, weight, peak = tl.zeros([head_pad], tl.float32), 0.0, float("-inf")
    for begin in range(0, num_splits, tile):
        s = begin + lane
        at = state + s * (queries * group)
        here = tl.load(lse + at, mask=s < num_splits, other=float("-inf"))
        # Nothing was written of splits that saw nothing.
        mask = (here > float("-inf"))[:, None] & (d < head)[None, :]
        part = tl.load(partial + at[:, None] * head + d[None, :], mask=mask, other=0.0)
        now = tl.maximum(peak, tl.max(here, axis=0))
        base = tl.where(now == float("-inf"), 0.0, now)
        p, fade = tl.exp2(here - base), tl.exp2(peak - base)
        total = total * fade + tl.sum(part * p[:, None], axis=0)
        weight = weight * fade + tl.sum(p, axis=0)
        peak = now
    out += (start + t).to(tl.int64) * out_token + h * out_head
    tl.store(out + d, (total / weight).to(out.dtype.element_ty), mask=d < head)


def num_splits(plan: LayerPlan, queries: int, dense_len: int) -> int:
    """Return the splits that a query block may need.

    Args:
        plan: The layer's.
        queries: Most queries of a block.
        dense_len: Longest sequence of a dense block.
    """
    keys = max(plan.sink + plan.top_k + plan.window + queries - 1, dense_len)
    return triton.cdiv(keys, SPLIT)


def decode(
    batch: Batch,
    values: torch.Tensor,
    selected: torch.Tensor,
    plan: LayerPlan,
    scale: float,
    dense_len: int,
    out: torch.Tensor,
) -> None:
    """Attend with few queries.

    Args:
        batch: Query blocks and keys.
        values: As the batch's keys.
        selected: Selected key blocks, int32, shape (list rows, chunks), contiguous.
        plan: The layer's.
        scale: Of the scores.
        dense_len: Longest sequence of a dense block, 0 if there is none.
        out: Shape (tokens, heads, head size); the blocks' tokens are written.
    """
    blocks, heads = len(batch.blocks), batch.query.shape[1]
    splits = num_splits(plan, batch.queries, dense_len)
    head_pad = triton.next_power_of_2(batch.head_size)
    shape = (blocks, batch.kv_heads, splits, batch.queries * batch.group)
    lse = batch.query.new_empty(shape, dtype=torch.float32)
    partial = batch.query.new_empty((*shape, batch.head_size), dtype=torch.float32)
    _attend_split[(blocks, batch.kv_heads, splits)](
        batch.query, batch.keys, values, batch.block_table, selected, batch.blocks, partial, lse,
        scale * LOG2E, *batch.query.stride()[:2], *batch.keys.stride()[:3], *values.stride()[:3],
        batch.block_table.stride(0),
        sink=plan.sink, window=plan.window, top_k=plan.top_k, chunk=plan.stages[-1].chunk,
        block_size=batch.keys.shape[1], queries=batch.queries, group=batch.group,
        rows=max(triton.next_power_of_2(batch.queries * batch.group), 16),
        head=batch.head_size, head_pad=head_pad, split=SPLIT,
        tile=64 if head_pad * batch.query.element_size() <= 256 else 32, num_warps=4, num_stages=2,
    )  # fmt: skip
    _merge[(blocks, batch.queries, heads)](
        partial, lse, out, batch.blocks, splits, *out.stride()[:2],
        queries=batch.queries, group=batch.group, head=batch.head_size, head_pad=head_pad,
        tile=MERGE, num_warps=4,
    )  # fmt: skip
