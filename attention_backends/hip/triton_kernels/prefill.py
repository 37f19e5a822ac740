"""Block-sparse attention of prompts: FlashAttention-2 over sink, selected key blocks and window."""

import torch
import triton
import triton.language as tl

from vllm_plugins.attention_backends.hip.plan import QUERY_BLOCK, LayerPlan
from vllm_plugins.attention_backends.hip.triton_kernels.blocks import DENSE, Batch, query_block
from vllm_plugins.attention_backends.hip.triton_kernels.tiles import LOG2E, attend_tile, attended


# The width of a block table is not known when kernels are warmed up, and of no use.
@triton.jit(do_not_specialize=["table_row"])
def _attend_block(
    query: tl.tensor, keys: tl.tensor, values: tl.tensor, block_table: tl.tensor,
    selected: tl.tensor, blocks: tl.tensor, out: tl.tensor, scale: float,
    query_token: tl.tensor, query_head: tl.tensor,
    key_page: tl.tensor, key_token: tl.tensor, key_head: tl.tensor,
    value_page: tl.tensor, value_token: tl.tensor, value_head: tl.tensor, table_row: tl.tensor,
    out_token: tl.tensor, out_head: tl.tensor,
    sink: tl.constexpr, window: tl.constexpr, keep: tl.constexpr, keep_pad: tl.constexpr,
    chunk: tl.constexpr, block_size: tl.constexpr, heads: tl.constexpr, group: tl.constexpr,
    rows: tl.constexpr,
    head: tl.constexpr, head_pad: tl.constexpr, tile: tl.constexpr,
) -> None:  # fmt: skip
    """Attend with one query head of a query block."""
    # Query heads that share keys run side by side, and find them in the cache. All is one axis of
    # the grid: the other ones end at 65535 programs.
    h, m = tl.program_id(0) % heads, tl.program_id(0) // heads
    start, length, row, position, level, list_row = query_block(blocks, m)
    if length == 0:
        return
    end, kv_head = position + length, h // group
    t, d, i = tl.arange(0, rows), tl.arange(0, head_pad), tl.arange(0, keep_pad)
    selected += list_row * keep
    # Of a dense block everything is sink.
    sinks, first = tl.minimum(sink, end), tl.maximum(position + 1 - window, sink)
    blocked = 0
    if level == DENSE:
        sinks, first = end, end
    else:
        listed = tl.load(selected + i, mask=i < keep, other=2**31 - 1)
        blocked = tl.sum((listed < first).to(tl.int32), axis=0) * chunk
    num_keys = sinks + blocked + tl.maximum(end - first, 0)

    in_row = (t < length)[:, None] & (d < head)[None, :]
    query += (start + t).to(tl.int64)[:, None] * query_token + h * query_head + d[None, :]
    q = tl.load(query, mask=in_row, other=0.0)
    keys += kv_head.to(tl.int64) * key_head
    values += kv_head.to(tl.int64) * value_head
    table = block_table + row.to(tl.int64) * table_row
    total = tl.zeros([rows, head_pad], tl.float32)
    weight, peak = tl.zeros([rows], tl.float32), tl.full([rows], float("-inf"), tl.float32)
    for begin in range(0, num_keys, tile):
        n = begin + tl.arange(0, tile)
        at, valid = attended(n, selected, sinks, blocked, first, end, chunk)
        total, weight, peak = attend_tile(
            q, position + t, scale, total, weight, peak, at, valid, table, keys, values,
            key_page, key_token, value_page, value_token, block_size, head, head_pad,
        )  # fmt: skip
    out += (start + t).to(tl.int64)[:, None] * out_token + h * out_head + d[None, :]
    # Rows behind the last query have weights too, of the same keys.
    tl.store(out, (total / weight[:, None]).to(out.dtype.element_ty), mask=in_row)


def prefill(
    batch: Batch,
    values: torch.Tensor,
    selected: torch.Tensor,
    plan: LayerPlan,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attend with blocks of up to `QUERY_BLOCK` queries.

    Args:
        batch: Query blocks and keys.
        values: As the batch's keys.
        selected: Selected key blocks, int32, shape (list rows, chunks), contiguous.
        plan: The layer's.
        scale: Of the scores.
        out: Shape (tokens, heads, head size); the blocks' tokens are written.
    """
    head_pad, keep = triton.next_power_of_2(batch.head_size), plan.stages[-1].keep_chunks
    narrow = head_pad * batch.query.element_size() <= 256
    heads = batch.query.shape[1]
    _attend_block[(heads * len(batch.blocks),)](
        batch.query, batch.keys, values, batch.block_table, selected, batch.blocks, out,
        scale * LOG2E, *batch.query.stride()[:2], *batch.keys.stride()[:3], *values.stride()[:3],
        batch.block_table.stride(0), *out.stride()[:2],
        sink=plan.sink, window=plan.window, keep=keep,
        keep_pad=max(triton.next_power_of_2(keep), 1), chunk=plan.stages[-1].chunk,
        block_size=batch.keys.shape[1], heads=heads, group=batch.group, rows=QUERY_BLOCK,
        head=batch.head_size, head_pad=head_pad, tile=64 if narrow else 32,
        num_warps=4, num_stages=2,
    )  # fmt: skip
