"""Keeping a stage's best chunks, straight into what is kept of each request.

One program for a query block finds the score of the last chunk that survives, by bisection over the
integers that are ordered like the scores, then copies the survivors in their order: no sort, equal
scores go to the earlier chunk, and lists of blocks whose stage is not due are left alone.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_plugins.attention_backends.hip.plan import LayerPlan
from vllm_plugins.attention_backends.hip.triton_kernels.blocks import (
    NONE,
    Batch,
    candidate_chunks,
    candidates_end,
    geometry,
    query_block,
)
from vllm_plugins.attention_backends.hip.triton_kernels.scan import WIDTH, scan_stage

# Chunks that a program handles at once.
TILE = 1024
# Below every rank: of chunks that do not exist.
NO_RANK = tl.constexpr(-(2**31))


@triton.jit
def _rank(score: tl.tensor) -> tl.tensor:
    """Return int32 numbers in the order of float32 scores."""
    # Both zeros are the same score.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _last_survivor(
    ranks: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    num_candidates: tl.tensor,
    keep: tl.constexpr,
    tile: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Find the largest rank that ``keep`` chunks reach.

    Args:
        ranks: Of the candidates.
        low: Their least, int64; more than ``keep`` chunks reach it.
        high: Their largest, int64.
        num_candidates: Their number.
        keep: Chunks to keep.
        tile: Chunks to count at once.

    Returns:
        The rank, int64, and how many of the chunks that have it survive (or more than have it).
    """
    above = tl.full([], 0, tl.int32)
    while low < high:
        middle = (low + high + 1) >> 1
        reach = tl.zeros([tile], tl.int32)
        for begin in range(0, num_candidates, tile):
            index = begin + tl.arange(0, tile)
            rank = tl.load(ranks + index, mask=index < num_candidates, other=NO_RANK)
            reach += (rank >= middle.to(tl.int32)).to(tl.int32)
        count = tl.sum(reach, axis=0)
        if count >= keep:
            low = middle
            # Scores between this and the next one make no difference.
            high = tl.where(count == keep, middle, high)
        else:
            high = middle - 1
            above = count
    return low, keep - above


@triton.jit(do_not_specialize=["num_candidates"])
def _keep_best(
    scores: tl.tensor, ranks: tl.tensor, parents: tl.tensor, kept: tl.tensor, blocks: tl.tensor,
    num_candidates: tl.tensor, width: tl.tensor,
    stage: tl.constexpr, chunk: tl.constexpr, keep: tl.constexpr, parent: tl.constexpr,
    parent_keep: tl.constexpr, sink: tl.constexpr, window: tl.constexpr, overlap: tl.constexpr,
    kv_heads: tl.constexpr, tile: tl.constexpr,
) -> None:  # fmt: skip
    m = tl.program_id(0)
    _, length, _, position, level, list_row = query_block(blocks, m)
    if (length == 0) | (level < 0) | (level > stage):
        return
    end = candidates_end(position, sink, window, overlap)
    parents += list_row * parent_keep
    kept += list_row * keep
    ranks += m.to(tl.int64) * width
    scores += m.to(tl.int64) * kv_heads * width
    lane = tl.arange(0, tile)

    least, budget = tl.full([], NO_RANK, tl.int64), tl.full([], 0, tl.int32)
    is_pruned = candidate_chunks(keep, parents, end, num_candidates, chunk, parent, sink) != NONE
    if is_pruned:
        low, high = tl.full([], 2**31 - 1, tl.int64), tl.full([], NO_RANK, tl.int64)
        for begin in range(0, num_candidates, tile):
            index = begin + lane
            starts = candidate_chunks(index, parents, end, num_candidates, chunk, parent, sink)
            score = tl.full([tile], float("-inf"), tl.float32)
            for h in range(kv_heads):
                here = tl.load(scores + h * width + index, mask=starts != NONE, other=0.0)
                score = tl.maximum(score, here)
            rank = _rank(score)
            low = tl.minimum(low, tl.min(tl.where(starts != NONE, rank, 2**31 - 1), axis=0))
            rank = tl.where(starts != NONE, rank, NO_RANK)
            high = tl.maximum(high, tl.max(rank, axis=0))
            tl.store(ranks + index, rank, mask=index < num_candidates)
        # Other threads may read what these have written.
        tl.debug_barrier()
        least, budget = _last_survivor(ranks, low, high, num_candidates, keep, tile)

    taken, equal = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for begin in range(0, num_candidates, tile):
        index = begin + lane
        starts = candidate_chunks(index, parents, end, num_candidates, chunk, parent, sink)
        survives = starts != NONE
        if is_pruned:
            rank = tl.load(ranks + index, mask=index < num_candidates, other=NO_RANK)
            is_equal = rank == least
            nth = equal + tl.cumsum(is_equal.to(tl.int32), axis=0)
            survives = survives & ((rank > least) | (is_equal & (nth <= budget)))
            equal += tl.sum(is_equal.to(tl.int32), axis=0)
        to = taken + tl.cumsum(survives.to(tl.int32), axis=0) - 1
        tl.store(kept + to, starts, mask=survives)
        taken += tl.sum(survives.to(tl.int32), axis=0)
    for begin in range(0, keep, tile):
        index = begin + lane
        rest = (index >= taken) & (index < keep)
        tl.store(kept + index, tl.full([tile], NONE, tl.int32), mask=rest)


def select(batch: Batch, plan: LayerPlan, overlap: int, lists: Sequence[torch.Tensor]) -> None:
    """Run the stages that are due for each query block.

    Args:
        batch: Query blocks and keys; a block's level is the first stage to run.
        plan: The layer's.
        overlap: Keys of the window that are candidates too.
        lists: For each stage what is kept, int32, shape (list rows, ``stage.keep_chunks``),
            contiguous, sorted and padded with `NONE`; updated.
    """
    if plan.top_k == 0:
        return
    reach = batch.max_len - plan.window + overlap - plan.sink
    candidates = max(-(-reach // plan.stages[0].chunk), 0)
    for stage, this in enumerate(plan.stages):
        before = plan.stages[stage - 1] if stage else None
        parents = lists[stage - 1] if stage else batch.blocks
        if before is not None:
            candidates = min(candidates, before.keep_chunks) * (before.chunk // this.chunk)
        width = -(-candidates // WIDTH) * WIDTH
        shape = (len(batch.blocks), batch.kv_heads, width)
        scores = batch.blocks.new_empty(shape, dtype=torch.float32)
        if candidates > this.keep_chunks:
            scan_stage(batch, plan, overlap, stage, parents, candidates, scores)
        _keep_best[(len(batch.blocks),)](
            scores, batch.blocks.new_empty(len(batch.blocks), width), parents, lists[stage],
            batch.blocks, candidates, width, stage=stage, kv_heads=batch.kv_heads, tile=TILE,
            num_warps=4, **geometry(plan, overlap, stage),
        )  # fmt: skip
