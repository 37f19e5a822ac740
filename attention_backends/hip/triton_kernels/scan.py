"""Scoring chunks by representative keys (``SelectRep``, algorithm 2 of arXiv 2502.08910).

A program scores some chunks of one query block with the query heads of one kv head. Every head
bisects every chunk on its own: log2(chunk) rounds, each of which reads the representatives of two
halves. Nothing is scored of blocks whose stage is not due, nor where a stage has no more chunks
than it keeps. The grid depends on an upper bound alone, so nobody waits for the device.
"""

import torch
import triton
import triton.language as tl

from vllm_plugins.attention_backends.hip.plan import FEW_QUERIES, QUERY_BLOCK, LayerPlan, Stage
from vllm_plugins.attention_backends.hip.triton_kernels.blocks import (
    NONE,
    Batch,
    cache_place,
    candidate_chunks,
    candidates_end,
    geometry,
    query_block,
)

# Scores of a query block and kv head begin at multiples of so many.
WIDTH = 64
# Elements of one half's keys that a program holds in registers: 64 of 128 threads each.
ELEMENTS = 8192


@triton.jit
def _halves(first: tl.tensor, last: tl.tensor, centre: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Return the middle of ranges of keys, and the representatives of both halves.

    A range of one key is represented by that key on either side.
    """
    middle = (first + last) // 2
    if centre:
        return middle, (first + middle) // 2, (middle + last) // 2
    else:
        return middle, first, middle


@triton.jit
def _bisect(
    first: tl.tensor, last: tl.tensor, middle: tl.tensor, left: tl.tensor, right: tl.tensor
) -> tuple[tl.tensor, ...]:
    """Return the better halves, and the better scores."""
    go_left = left >= right
    first = tl.where(go_left, first, middle)
    last = tl.where(go_left, middle, last)
    return first, last, tl.maximum(left, right)


@triton.jit
def _program(
    num_candidates: tl.tensor, kv_heads: tl.constexpr, tile: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Return a program's first chunk, its kv head and its query block.

    All are one axis of the grid: the other ones end at 65535 programs.
    """
    tiles, rest = (num_candidates + tile - 1) // tile, tl.program_id(0)
    return rest % tiles * tile, rest // tiles % kv_heads, rest // tiles // kv_heads


@triton.jit
def _is_pruned(
    parents: tl.tensor,
    end: tl.tensor,
    num_candidates: tl.tensor,
    chunk: tl.constexpr,
    parent: tl.constexpr,
    sink: tl.constexpr,
    keep: tl.constexpr,
) -> tl.tensor:
    """Whether a query block has more chunks than a stage keeps of them."""
    return candidate_chunks(keep, parents, end, num_candidates, chunk, parent, sink) != NONE


@triton.jit
def _best_of_few(
    keys: tl.tensor,
    query: tl.tensor,
    length: tl.tensor,
    query_token: tl.tensor,
    in_row: tl.tensor,
    queries: tl.constexpr,
) -> tl.tensor:
    """Return the largest score over a block's queries.

    Args:
        keys: Of each head, shape (heads, chunks, head size).
        query: Pointers to the first query of each head, shape (heads, head size).
        length: Number of queries.
        query_token: Elements from one query to the next.
        in_row: Which elements of ``query`` exist.
        queries: Most queries of a block.

    Returns:
        float32, shape (heads, chunks).
    """
    keys = keys.to(tl.float32)
    best = tl.full([keys.shape[0], keys.shape[1]], float("-inf"), tl.float32)
    for t in range(queries):
        # A block with fewer queries scores its last one again.
        here = query + tl.minimum(t, length - 1) * query_token
        here = tl.load(here, mask=in_row, other=0.0).to(tl.float32)
        best = tl.maximum(best, tl.sum(keys * here[:, None, :], axis=2))
    return best


# The width of a block table is not known when kernels are warmed up, and of no use.
@triton.jit(do_not_specialize=["num_candidates", "table_row"])
def _scan_few(
    query: tl.tensor, keys: tl.tensor, block_table: tl.tensor, parents: tl.tensor,
    blocks: tl.tensor, scores: tl.tensor, num_candidates: tl.tensor, width: tl.tensor,
    query_token: tl.tensor, query_head: tl.tensor, key_page: tl.tensor, key_token: tl.tensor,
    key_head: tl.tensor, table_row: tl.tensor,
    stage: tl.constexpr, chunk: tl.constexpr, keep: tl.constexpr, parent: tl.constexpr,
    parent_keep: tl.constexpr, sink: tl.constexpr, window: tl.constexpr, overlap: tl.constexpr,
    centre: tl.constexpr, rounds: tl.constexpr, block_size: tl.constexpr, queries: tl.constexpr,
    kv_heads: tl.constexpr, group: tl.constexpr, group_pad: tl.constexpr, head: tl.constexpr,
    head_pad: tl.constexpr, tile: tl.constexpr,
) -> None:  # fmt: skip
    """Score chunks for up to `FEW_QUERIES` queries: all query heads at once, without matrices."""
    first_chunk, kv_head, m = _program(num_candidates, kv_heads, tile)
    start, length, row, position, level, list_row = query_block(blocks, m)
    if (length == 0) | (level < 0) | (level > stage):
        return
    end = candidates_end(position, sink, window, overlap)
    parents += list_row * parent_keep
    if not _is_pruned(parents, end, num_candidates, chunk, parent, sink, keep):
        return
    index = first_chunk + tl.arange(0, tile)
    starts = candidate_chunks(index, parents, end, num_candidates, chunk, parent, sink)
    if tl.min(starts, axis=0) == NONE:
        return

    g, d = tl.arange(0, group_pad), tl.arange(0, head_pad)
    in_row = (g < group)[:, None] & (d < head)[None, :]
    query += start.to(tl.int64) * query_token
    query += (kv_head * group + g)[:, None] * query_head + d[None, :]
    keys += kv_head.to(tl.int64) * key_head
    table = block_table + row.to(tl.int64) * table_row
    exists = (g < group)[:, None] & (starts != NONE)[None, :]
    first = tl.where(exists, starts[None, :], 0)
    last = tl.where(exists, tl.minimum(first + chunk, end), 1)
    best = tl.full([group_pad, tile], float("-inf"), tl.float32)
    for _ in range(rounds):
        middle, left_at, right_at = _halves(first, last, centre)
        page, token = cache_place(left_at, exists, table, block_size)
        left_at = page * key_page + token * key_token
        page, token = cache_place(right_at, exists, table, block_size)
        right_at = page * key_page + token * key_token
        mask = exists[:, :, None] & (d < head)[None, None, :]
        # Both are on their way before the first is used.
        left = tl.load(keys + left_at[:, :, None] + d[None, None, :], mask=mask, other=0.0)
        right = tl.load(keys + right_at[:, :, None] + d[None, None, :], mask=mask, other=0.0)
        left = _best_of_few(left, query, length, query_token, in_row, queries)
        right = _best_of_few(right, query, length, query_token, in_row, queries)
        first, last, better = _bisect(first, last, middle, left, right)
        best = tl.maximum(best, better)
    best = tl.max(tl.where(exists, best, float("-inf")), axis=0)
    to = scores + (m * kv_heads + kv_head).to(tl.int64) * width + index
    tl.store(to, best, mask=starts != NONE)


@triton.jit
def _best_of_many(keys: tl.tensor, query: tl.tensor, scored: tl.tensor) -> tl.tensor:
    """Return the largest score over a block's queries, float32, shape (chunks,).

    Args:
        keys: Shape (chunks, head size).
        query: Shape (queries, head size).
        scored: Which queries take part, shape (queries,).
    """
    # TF32 would give other ties than every other path.
    score = tl.dot(keys, tl.trans(query), input_precision="ieee")
    return tl.max(tl.where(scored[None, :], score, float("-inf")), axis=1)


# The width of a block table is not known when kernels are warmed up, and of no use.
@triton.jit(do_not_specialize=["num_candidates", "table_row"])
def _scan_many(
    query: tl.tensor, keys: tl.tensor, block_table: tl.tensor, parents: tl.tensor,
    blocks: tl.tensor, scores: tl.tensor, num_candidates: tl.tensor, width: tl.tensor,
    query_token: tl.tensor, query_head: tl.tensor, key_page: tl.tensor, key_token: tl.tensor,
    key_head: tl.tensor, table_row: tl.tensor,
    stage: tl.constexpr, chunk: tl.constexpr, keep: tl.constexpr, parent: tl.constexpr,
    parent_keep: tl.constexpr, sink: tl.constexpr, window: tl.constexpr, overlap: tl.constexpr,
    centre: tl.constexpr, rounds: tl.constexpr, block_size: tl.constexpr, queries: tl.constexpr,
    kv_heads: tl.constexpr, group: tl.constexpr, head: tl.constexpr, head_pad: tl.constexpr,
    tile: tl.constexpr, few: tl.constexpr, query_stride: tl.constexpr,
) -> None:  # fmt: skip
    """Score chunks for the queries of a prompt: head by head, as matrix products."""
    first_chunk, kv_head, m = _program(num_candidates, kv_heads, tile)
    start, length, row, position, level, list_row = query_block(blocks, m)
    if (length == 0) | (level < 0) | (level > stage):
        return
    end = candidates_end(position, sink, window, overlap)
    parents += list_row * parent_keep
    if not _is_pruned(parents, end, num_candidates, chunk, parent, sink, keep):
        return
    index = first_chunk + tl.arange(0, tile)
    starts = candidate_chunks(index, parents, end, num_candidates, chunk, parent, sink)
    if tl.min(starts, axis=0) == NONE:
        return

    d, exists = tl.arange(0, head_pad), starts != NONE
    # All of a few queries are scored, as while decoding.
    t = tl.arange(0, queries) * tl.where(length <= few, 1, query_stride)
    scored = t < length
    query += start.to(tl.int64) * query_token + t[:, None] * query_token + d[None, :]
    keys += kv_head.to(tl.int64) * key_head
    table = block_table + row.to(tl.int64) * table_row
    in_query, in_key = scored[:, None] & (d < head)[None], exists[:, None] & (d < head)[None]
    best = tl.full([tile], float("-inf"), tl.float32)
    for g in range(group):
        here = tl.load(query + (kv_head * group + g) * query_head, mask=in_query, other=0.0)
        first = tl.where(exists, starts, 0)
        last = tl.where(exists, tl.minimum(first + chunk, end), 1)
        for _ in range(rounds):
            middle, left_at, right_at = _halves(first, last, centre)
            page, token = cache_place(left_at, exists, table, block_size)
            left_at = page * key_page + token * key_token
            page, token = cache_place(right_at, exists, table, block_size)
            right_at = page * key_page + token * key_token
            left = tl.load(keys + left_at[:, None] + d[None, :], mask=in_key, other=0.0)
            right = tl.load(keys + right_at[:, None] + d[None, :], mask=in_key, other=0.0)
            left, right = _best_of_many(left, here, scored), _best_of_many(right, here, scored)
            first, last, better = _bisect(first, last, middle, left, right)
            best = tl.maximum(best, better)
    to = scores + (m * kv_heads + kv_head).to(tl.int64) * width + index
    tl.store(to, best, mask=exists)


def scan_stage(
    batch: Batch,
    plan: LayerPlan,
    overlap: int,
    stage: int,
    parents: torch.Tensor,
    candidates: int,
    scores: torch.Tensor,
) -> None:
    """Score the chunks that a stage starts from, where it is due and prunes any.

    Args:
        batch: Query blocks and keys.
        plan: The layer's.
        overlap: Keys of the window that are candidates too.
        stage: Which stage.
        parents: Survivors of the stage before, int32, shape (list rows, chunks), contiguous; unused
            in the first stage.
        candidates: Upper bound of the number of chunks.
        scores: Gets the largest score over the heads of each kv head, float32, shape (blocks, kv
            heads, at least ``candidates``), contiguous. Scores lack the scale, which changes no
            order; what is not scored is left as it is.
    """
    few, this = batch.queries <= FEW_QUERIES, plan.stages[stage]
    head_pad = triton.next_power_of_2(batch.head_size)
    own = _few(batch, head_pad) if few else _many(batch, head_pad, this)
    grid = (triton.cdiv(candidates, own["tile"]) * batch.kv_heads * len(batch.blocks),)
    (_scan_few if few else _scan_many)[grid](
        batch.query, batch.keys, batch.block_table, parents, batch.blocks, scores,
        candidates, scores.shape[2],
        *batch.query.stride()[:2], *batch.keys.stride()[:3], batch.block_table.stride(0),
        stage=stage, centre=plan.centre, rounds=max(this.chunk.bit_length() - 1, 1),
        block_size=batch.keys.shape[1], kv_heads=batch.kv_heads, group=batch.group,
        head=batch.head_size, head_pad=head_pad, num_stages=1, **geometry(plan, overlap, stage),
        **own,
    )  # fmt: skip


def _few(batch: Batch, head_pad: int) -> dict[str, int]:
    group_pad = triton.next_power_of_2(batch.group)
    tile = min(max(ELEMENTS // (group_pad * head_pad), 4), WIDTH)
    return {"queries": batch.queries, "group_pad": group_pad, "tile": tile, "num_warps": 4}


def _many(batch: Batch, head_pad: int, stage: Stage) -> dict[str, int]:
    queries = max(-(-QUERY_BLOCK // stage.query_stride), FEW_QUERIES, 16)
    return {
        "queries": triton.next_power_of_2(queries),
        "few": FEW_QUERIES,
        "query_stride": stage.query_stride,
        # A warpgroup multiplies 64 rows at a time.
        "tile": 64 if head_pad * batch.query.element_size() <= 256 else 32,
        "num_warps": 4,
    }
