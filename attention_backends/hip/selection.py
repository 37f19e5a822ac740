"""Which key blocks a query block attends to: the pruning stages of InfiniteHiP, in plain torch.

This is the algorithm as the paper states it (arXiv 2502.08910, sections 3.1 and 3.2), for several
query blocks at once. It is what runs where no kernel does, and what the kernels are tested against.

Positions are those of keys in their sequence. Lists of chunks hold their first positions, sorted,
and are padded with ``NONE``. Wherever the text says "head", all query heads of the layer are meant:
a selection is shared by all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_plugins.attention_backends.hip.plan import FEW_QUERIES, LayerPlan, Stage

# Pads lists of chunks; larger than any position, so that sorting puts it last.
NONE = torch.iinfo(torch.int32).max

# From positions (blocks, chunks, heads) to the keys there, (blocks, chunks, heads, head size).
GatherKeys = Callable[[torch.Tensor], torch.Tensor]


def all_chunks(end: torch.Tensor, sink: int, chunk: int, max_end: int) -> torch.Tensor:
    """Cut the candidates [sink, end) of each query block into chunks.

    Args:
        end: Candidates end before this position, int, shape (blocks,).
        sink: Where they begin.
        chunk: Keys of a chunk.
        max_end: Upper bound of ``end``, known on the host.

    Returns:
        First positions, int32, shape (blocks, chunks).
    """
    starts = torch.arange(sink, max(max_end, sink), chunk, device=end.device, dtype=torch.int32)
    starts = starts.expand(end.shape[0], -1)
    return torch.where(starts < end[:, None], starts, NONE)


def split_chunks(kept: torch.Tensor, chunk: int, into: int, end: torch.Tensor) -> torch.Tensor:
    """Cut the chunks that survived a stage into those of the next one.

    Args:
        kept: First positions of the survivors, int32, shape (blocks, n).
        chunk: Keys of one of them.
        into: Keys of a chunk of the next stage.
        end: Candidates end before this position, shape (blocks,).

    Returns:
        First positions, sorted, int32, shape (blocks, n * chunk / into).
    """
    offsets = torch.arange(0, chunk, into, device=kept.device, dtype=torch.int32)
    # NONE must not wrap around when something is added to it.
    starts = kept.clamp(max=NONE - chunk)[..., None] + offsets
    valid = (kept != NONE)[..., None] & (starts < end[:, None, None])
    return torch.where(valid, starts, NONE).flatten(1)


def score_chunks(
    query: torch.Tensor,
    starts: torch.Tensor,
    chunk: int,
    end: torch.Tensor,
    gather_keys: GatherKeys,
    centre: bool = True,
) -> torch.Tensor:
    """Score chunks by representative keys (``SelectRep``, algorithm 2).

    Each head bisects a chunk on its own: it moves to the half whose representative has the larger
    score and stops at a single key. A chunk's score is the largest that any head saw on its way,
    as in the published code; the paper takes the last one alone.

    Args:
        query: Scaled queries, shape (blocks, queries, heads, head size); rows of NaN-free zeros
            may pad shorter blocks only if every block has at least one real query and padding
            repeats it.
        starts: First positions of chunks, int32, shape (blocks, chunks).
        chunk: Keys of a chunk.
        end: Candidates end before this position, shape (blocks,).
        gather_keys: Reads keys.
        centre: A range is represented by its centre, or else by its first key.

    Returns:
        Scores in the dtype of ``query``, -inf at padding, shape (blocks, chunks).
    """
    valid = starts != NONE
    heads = query.shape[2]
    first = torch.where(valid, starts, 0)[..., None].expand(-1, -1, heads).long()
    last = torch.minimum(first + chunk, end[:, None, None].long().clamp(min=1))
    last = torch.maximum(last, first + 1)

    def score(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        representative = (a + b) // 2 if centre else a
        keys = gather_keys(representative)
        return torch.einsum("mqhd,mchd->mchq", query, keys).amax(dim=-1)

    best = score(first, first + 1) if chunk == 1 else query.new_full(first.shape, -torch.inf)
    for _ in range((chunk - 1).bit_length()):
        middle = (first + last) // 2
        # A range of one key has an empty left half; its right half is the range itself.
        left = torch.where(
            middle > first, score(first, torch.maximum(middle, first + 1)), -torch.inf
        )
        right = score(middle, last)
        go_left = left >= right
        best = torch.maximum(best, torch.maximum(left, right))
        first, last = torch.where(go_left, first, middle), torch.where(go_left, middle, last)
    return best.amax(dim=-1).masked_fill(~valid, -torch.inf)


def keep_best(starts: torch.Tensor, scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the chunks with the best scores; of equal scores the earlier chunk wins.

    Args:
        starts: First positions, sorted, int32, shape (blocks, chunks).
        scores: -inf at padding, shape (blocks, chunks).
        count: Chunks to keep.

    Returns:
        First positions, sorted, int32, shape (blocks, min(count, chunks)).
    """
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return starts.gather(1, best).sort(dim=1).values


def prune(
    query: torch.Tensor,
    starts: torch.Tensor,
    stage: Stage,
    end: torch.Tensor,
    gather_keys: GatherKeys,
    centre: bool = True,
) -> torch.Tensor:
    """Run one stage: score chunks and keep the best of them.

    Arguments are those of `score_chunks`. Returns the survivors, shape (blocks, at most
    ``stage.keep_chunks``).
    """
    if starts.shape[1] <= stage.keep_chunks:
        return starts
    if query.shape[1] > FEW_QUERIES:
        query = query[:, :: stage.query_stride]
    scores = score_chunks(query, starts, stage.chunk, end, gather_keys, centre)
    return keep_best(starts, scores, stage.keep_chunks)


def candidates_end(first_query: torch.Tensor, plan: LayerPlan, overlap: int) -> torch.Tensor:
    """Return the position before which candidates end.

    Args:
        first_query: Position of each query block's first query, shape (blocks,).
        plan: The layer's.
        overlap: Keys of the window that are candidates too; 0 where nothing is kept.
    """
    return (first_query + 1 - plan.window + overlap).clamp(min=plan.sink)


def select_blocks(
    query: torch.Tensor,
    first_query: torch.Tensor,
    plan: LayerPlan,
    gather_keys: GatherKeys,
    overlap: int = 0,
    kept: list[torch.Tensor] | None = None,
    first_stage: int = 0,
) -> list[torch.Tensor]:
    """Run the stages from ``first_stage`` on.

    Args:
        query: Scaled queries, shape (blocks, queries, heads, head size).
        first_query: Position of each block's first query, shape (blocks,).
        plan: The layer's.
        gather_keys: Reads keys.
        overlap: Keys of the window that are candidates too.
        kept: Survivors of every stage at its last run; only needed with ``first_stage`` > 0.
        first_stage: First stage to run.

    Returns:
        The survivors of every stage; the last are the key blocks that are attended to.
    """
    end = candidates_end(first_query, plan, overlap)
    survivors = list(kept[:first_stage]) if kept is not None else []
    for i in range(first_stage, len(plan.stages)):
        stage = plan.stages[i]
        if i == 0:
            starts = all_chunks(end, plan.sink, stage.chunk, int(end.max()))
        else:
            starts = split_chunks(survivors[-1], plan.stages[i - 1].chunk, stage.chunk, end)
        survivors.append(prune(query, starts, stage, end, gather_keys, plan.centre))
    return survivors
