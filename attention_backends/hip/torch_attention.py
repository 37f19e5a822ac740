"""HiP attention in plain torch, on any device: what runs where no kernels were built.

It does what the kernels do, in their order, and is several times slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_plugins.attention_backends.hip.cpu_kernels import Paged
from vllm_plugins.attention_backends.hip.plan import LayerPlan
from vllm_plugins.attention_backends.hip.query_blocks import DENSE, QueryBlocks
from vllm_plugins.attention_backends.hip.selection import NONE, select_blocks

# Keys that a dense block reads at once.
SPAN = 4096


@dataclass(frozen=True)
class _Block:
    """One query block: its queries (1, queries, heads, head size) and where its keys are."""

    query: torch.Tensor
    position: int
    paged: Paged
    row: int

    def read(self, positions: torch.Tensor, values: bool = False) -> torch.Tensor:
        """Return keys or values at positions, float32, shape (n, kv heads, head size)."""
        size = self.paged.block_size
        block = self.paged.block_table[self.row, positions // size].long()
        offset = positions % size + (size if values else 0)
        return self.paged.cache[block, :, offset].float()

    def gather_keys(self, positions: torch.Tensor) -> torch.Tensor:
        """Read the key of each head's own position, as `selection.GatherKeys`."""
        heads, kv_heads = self.query.shape[2], self.paged.cache.shape[1]
        size = self.paged.block_size
        block = self.paged.block_table[self.row, positions // size].long()
        kv_head = torch.arange(heads, device=positions.device) // (heads // kv_heads)
        return self.paged.cache[block, kv_head, positions % size].float()


def attention(
    query: torch.Tensor,
    out: torch.Tensor,
    paged: Paged,
    blocks: QueryBlocks,
    plan: LayerPlan,
    kept: Sequence[torch.Tensor],
    scale: float,
) -> None:
    """Select and attend for every query block; arguments as of `cpu_kernels.attention`."""
    for m in range(len(blocks)):
        start, length = int(blocks.start[m]), int(blocks.length[m])
        q = query[start : start + length].float()[None] * scale
        block = _Block(q, int(blocks.position[m]), paged, int(blocks.row[m]))
        level, kept_row = int(blocks.level[m]), int(blocks.kept_row[m])
        if level == DENSE:
            positions = torch.arange(block.position + length)
        else:
            selected = _select(block, plan, level, kept_row, kept)
            positions = _attended(block.position, length, selected, plan)
        out[start : start + length] = _attend(block, positions).to(out.dtype)


def _select(
    block: _Block, plan: LayerPlan, level: int, row: int, kept: Sequence[torch.Tensor]
) -> torch.Tensor:
    before = [k[row : row + 1] for k in kept] if row >= 0 else None
    survivors = select_blocks(
        block.query,
        torch.tensor([block.position]),
        plan,
        block.gather_keys,
        plan.overlap if row >= 0 else 0,
        before,
        level,
    )
    for stage, found in enumerate(survivors):
        if row >= 0 and stage >= level:
            kept[stage][row] = NONE
            kept[stage][row, : found.shape[1]] = found[0]
    return survivors[-1][0]


def _attended(first: int, length: int, selected: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    """Return the positions of sink, selected blocks and window, each once, sorted."""
    end, window = first + length, max(first + 1 - plan.window, 0)
    sink = torch.arange(min(plan.sink, end))
    chunks = selected[selected != NONE, None] + torch.arange(plan.stages[-1].chunk)
    chunks = chunks[chunks < window]
    rest = torch.arange(max(window, plan.sink), max(end, plan.sink))
    return torch.cat([sink, chunks, rest])


def _attend(block: _Block, positions: torch.Tensor) -> torch.Tensor:
    """Return causal attention over the keys at ``positions``, (queries, heads, head size)."""
    queries, heads, size = block.query.shape[1:]
    groups = block.paged.cache.shape[1]
    q = block.query[0].view(queries, groups, heads // groups, size)
    at = block.position + torch.arange(queries)
    total = maximum = weight = None
    for span in positions.split(SPAN):
        scores = torch.einsum("tkgd,nkd->tkgn", q, block.read(span))
        scores.masked_fill_((span > at[:, None])[:, None, None], -torch.inf)
        largest = scores.amax(dim=-1, keepdim=True)
        new = largest if maximum is None else torch.maximum(maximum, largest)
        p = (scores - new).exp()
        value = torch.einsum("tkgn,nkd->tkgd", p, block.read(span, values=True))
        if maximum is None:
            total, weight = value, p.sum(dim=-1, keepdim=True)
        else:
            fade = (maximum - new).exp()
            total, weight = total * fade + value, weight * fade + p.sum(dim=-1, keepdim=True)
        maximum = new
    assert total is not None
    return (total / weight).reshape(queries, heads, size)
