"""The batch's query tokens, cut into the blocks that share a selection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from vllm_plugins.attention_backends.hip.plan import QUERY_BLOCK

DENSE = -1
"""Level of a query block that attends to everything."""


@dataclass(frozen=True)
class QueryBlocks:
    """Query blocks, every field int32 of shape (blocks,).

    Attributes:
        start: First token in the batch.
        length: Number of tokens, at most `QUERY_BLOCK`.
        row: Row of the block table.
        position: Position of the first query in its sequence.
        level: First pruning stage to run; the number of stages where what was kept is still good;
            `DENSE`.
        kept_row: Row of the kept lists, or -1 where nothing is kept.
    """

    start: torch.Tensor
    length: torch.Tensor
    row: torch.Tensor
    position: torch.Tensor
    level: torch.Tensor
    kept_row: torch.Tensor

    def __len__(self) -> int:
        return self.start.shape[0]


def cut(
    start: torch.Tensor, length: torch.Tensor, position: torch.Tensor, row: torch.Tensor
) -> QueryBlocks:
    """Cut requests' queries at multiples of `QUERY_BLOCK` in absolute position.

    A prompt that is computed in chunks of whole blocks is cut as it is in one piece.

    Args:
        start: First token of each request in the batch, int32, shape (n,), like the others a host
            tensor.
        length: Tokens that it computes, at least one.
        position: Position of its first token.
        row: Its row of the block table.

    Returns:
        Blocks in the order of tokens, all of level 0, nothing kept.
    """
    first, last = position // QUERY_BLOCK, (position + length - 1) // QUERY_BLOCK
    counts = last - first + 1
    request = torch.repeat_interleave(counts)
    index = torch.arange(len(request)) - (counts.cumsum(0) - counts)[request]
    edge = ((first[request] + index) * QUERY_BLOCK).to(torch.int32)
    begin = torch.maximum(edge, position[request])
    end = torch.minimum(edge + QUERY_BLOCK, (position + length)[request])
    return QueryBlocks(
        start=start[request] + begin - position[request],
        length=end - begin,
        row=row[request],
        position=begin,
        level=torch.zeros_like(begin),
        kept_row=torch.full_like(begin, -1),
    )


def concatenate(parts: Sequence[QueryBlocks]) -> QueryBlocks:
    """Return the blocks of several lists in one."""
    return QueryBlocks(
        *(torch.cat([getattr(x, f.name) for x in parts]) for f in fields(QueryBlocks))
    )
