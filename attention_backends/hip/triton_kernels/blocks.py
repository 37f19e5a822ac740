"""What all kernels share: query blocks, and which keys they look at, where these lie.

A query block is a row of six numbers: its first token, its length, its row of the block table, the
position of its first query, its level and its row of the lists (`query_blocks.QueryBlocks`).
Positions are those of keys in their sequence. Addresses within the cache are 64 bit: it is larger
than 2^31 elements as a rule.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_plugins.attention_backends.hip.plan import LayerPlan
from vllm_plugins.attention_backends.hip.query_blocks import QueryBlocks

# `selection.NONE`, and `query_blocks.DENSE`, as kernels see them.
NONE = tl.constexpr(2**31 - 1)
DENSE = tl.constexpr(-1)
FIELDS = tl.constexpr(6)


def pack(blocks: QueryBlocks) -> torch.Tensor:
    """Return query blocks as kernels read them, int32, shape (blocks, 6)."""
    columns = (
        blocks.start, blocks.length, blocks.row, blocks.position, blocks.level, blocks.kept_row,
    )  # fmt: skip
    return torch.stack(columns, dim=1).to(torch.int32)


@triton.jit
def query_block(blocks: tl.tensor, m: tl.tensor) -> tuple[tl.tensor, ...]:
    """Return start, length, row, position, level and list row of query block ``m``."""
    at = blocks + m * FIELDS
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2),
        tl.load(at + 3), tl.load(at + 4), tl.load(at + 5),
    )  # fmt: skip


@triton.jit
def candidates_end(
    position: tl.tensor, sink: tl.constexpr, window: tl.constexpr, overlap: tl.constexpr
) -> tl.tensor:
    """Return the position before which candidates end (`selection.candidates_end`)."""
    return tl.maximum(position + 1 - window + overlap, sink)


@triton.jit
def candidate_chunks(
    index: tl.tensor,
    parents: tl.tensor,
    end: tl.tensor,
    num_candidates: tl.tensor,
    chunk: tl.constexpr,
    parent: tl.constexpr,
    sink: tl.constexpr,
) -> tl.tensor:
    """Return the first positions of some of the chunks that a stage starts from.

    They are sorted as a whole, since the survivors that they are cut from are.

    Args:
        index: Which chunks.
        parents: Survivors of the stage before, of this query block; unused in the first stage.
        end: Candidates end before this position.
        num_candidates: Upper bound of the number of chunks, at most what ``parents`` hold.
        chunk: Keys of a chunk.
        parent: Keys of a chunk of the stage before, 0 in the first stage.
        sink: Where candidates begin.

    Returns:
        Positions of the shape of ``index``, `NONE` where there is no such chunk.
    """
    if parent == 0:
        start = sink + index * chunk
        valid = (index < num_candidates) & (start < end)
    else:
        ratio: tl.constexpr = parent // chunk
        parent = tl.load(parents + index // ratio, mask=index < num_candidates, other=NONE)
        # NONE must not wrap around when something is added to it.
        start = tl.where(parent == NONE, 0, parent) + index % ratio * chunk
        valid = (parent != NONE) & (start < end)
    return tl.where(valid, start, NONE)


@triton.jit
def cache_place(
    position: tl.tensor, valid: tl.tensor, table: tl.tensor, block_size: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Return the cache blocks that hold some of a request's keys, and where in them they are.

    Args:
        position: Of the keys.
        valid: Whether there is such a key; nothing is read of others.
        table: The request's row of the block table.
        block_size: Tokens of a cache block.

    Returns:
        Blocks, int64, and tokens within them, int32, of the shape of ``position``.
    """
    page = tl.load(table + position // block_size, mask=valid, other=0)
    return page.to(tl.int64), position % block_size


@dataclass(frozen=True)
class Batch:
    """Query blocks and the keys that they look at.

    Attributes:
        query: Shape (tokens, heads, head size), the last axis contiguous.
        keys: Shape (cache blocks, block size, kv heads, head size), any strides but for the last
            axis.
        block_table: int32, shape (requests, blocks).
        blocks: Query blocks as of `pack`.
        queries: Most queries of a block.
        max_len: Upper bound of the sequences' lengths; only selecting needs it.
    """

    query: torch.Tensor
    keys: torch.Tensor
    block_table: torch.Tensor
    blocks: torch.Tensor
    queries: int
    max_len: int = 0

    @property
    def kv_heads(self) -> int:
        """Heads of keys."""
        return self.keys.shape[2]

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.query.shape[1] // self.keys.shape[2]

    @property
    def head_size(self) -> int:
        """Elements of a head."""
        return self.query.shape[2]


def geometry(plan: LayerPlan, overlap: int, stage: int) -> dict[str, int]:
    """Return what kernels are told of a stage when they are compiled."""
    this, before = plan.stages[stage], plan.stages[stage - 1] if stage else None
    return {
        "chunk": this.chunk,
        "keep": this.keep_chunks,
        "parent": before.chunk if before else 0,
        "parent_keep": before.keep_chunks if before else 0,
        "sink": plan.sink,
        "window": plan.window,
        "overlap": overlap,
    }
