"""Which query blocks of a batch are sparse, and which pruning stages are due for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_plugins.attention_backends.hip.mask_cache import UNKNOWN, MaskCache
from vllm_plugins.attention_backends.hip.query_blocks import DENSE, QueryBlocks, cut

if TYPE_CHECKING:
    from vllm_plugins.attention_backends.hip.plugin import HipOptions


@dataclass(frozen=True)
class Rows:
    """The requests of a batch, every tensor on the host.

    Attributes:
        start: First token of each request in the batch, int32, shape (n,).
        length: Tokens that it computes, int32, shape (n,).
        position: Position of its first token, int32, shape (n,).
        prefilling: Whether these are still tokens of its prompt, bool, shape (n,).
        block_table: int32, shape (n, blocks).
        slots: Slot that each token of the batch is written to, int64, shape (tokens,).
        block_size: Tokens of a cache block.
    """

    start: torch.Tensor
    length: torch.Tensor
    position: torch.Tensor
    prefilling: torch.Tensor
    block_table: torch.Tensor
    slots: torch.Tensor
    block_size: int


class BatchPlanner:
    """Turns each batch into query blocks, remembering what is kept of each request.

    Args:
        options: The plug-in's options.
        max_num_seqs: Most requests of a batch.
        decode_queries: Most tokens of a request in a decode step.
    """

    def __init__(self, options: HipOptions, max_num_seqs: int, decode_queries: int) -> None:
        self._options = options
        self._decode_queries = decode_queries
        self._cache = MaskCache(max_num_seqs, decode_queries, options.refresh, torch.device("cpu"))

    def plan(self, rows: Rows) -> tuple[QueryBlocks, QueryBlocks]:
        """Return the query blocks of decodes and those of prompts."""
        decoding = ~rows.prefilling & (rows.length > 0) & (rows.length <= self._decode_queries)
        prompts = ~decoding & (rows.length > 0)
        return self._decodes(rows, decoding), self._prompts(rows, prompts)

    def _decodes(self, rows: Rows, chosen: torch.Tensor) -> QueryBlocks:
        index = chosen.nonzero().flatten()
        start, length, position = rows.start[index], rows.length[index], rows.position[index]
        last, size = (position - 1).clamp(min=0), rows.block_size
        before = rows.block_table[index, last // size].long() * size + last % size
        before = torch.where(position > 0, before, UNKNOWN)
        offset = torch.arange(self._decode_queries)
        token = (start[:, None] + offset).clamp(max=len(rows.slots) - 1)
        slots = torch.where(offset < length[:, None], rows.slots[token], UNKNOWN)
        sparse = self._is_sparse("decode", position + length)
        kept_row, level = self._cache.step(before, slots, position, sparse, rows.slots)
        level = torch.where(sparse, level, DENSE).to(torch.int32)
        return QueryBlocks(start, length, index.to(torch.int32), position, level, kept_row)

    def _prompts(self, rows: Rows, chosen: torch.Tensor) -> QueryBlocks:
        index = chosen.nonzero().flatten()
        start, length, position = rows.start[index], rows.length[index], rows.position[index]
        tail = self._options.dense_tail_queries
        blocks = cut(start, length, position, index.to(torch.int32))
        # A block is judged by its own end: that of the chunk would depend on how chunks are cut.
        end = blocks.position + blocks.length
        chunk_end = torch.zeros(len(rows.start), dtype=torch.int32)
        chunk_end[index] = position + length
        sparse = self._is_sparse("prefill", end) & (end <= chunk_end[blocks.row] - tail)
        blocks.level[~sparse] = DENSE
        return blocks

    def _is_sparse(self, phase: str, end: torch.Tensor) -> torch.Tensor:
        if self._options.phases not in (phase, "both"):
            return torch.zeros_like(end, dtype=torch.bool)
        return end > self._options.dense_threshold
