"""The rows that the draft layer sees of one prompt: text as it is, images compressed.

Serving can leave out whole KV blocks only (:mod:`vllm_plugins.engine.block_holes`). Training lays
its rows out by the same plan, so that both see the same rows at the same positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_plugins.engine.block_holes.plan import Hole, plan_hole
from vllm_plugins.spec_decode.specvlm.compressor import VisualCompressor, prune_seed
from vllm_plugins.spec_decode.specvlm.settings import Choice

Span = tuple[int, int]


@dataclass(frozen=True)
class CompactRows:
    """What goes through the draft layer.

    Attributes:
        rows: Fused rows, shape (m, hidden).
        positions: Of RoPE, int64, shape (m,).
        sources: Draft row that each one is, -1 where an operator made it; int64, shape (m,).
    """

    rows: torch.Tensor
    positions: torch.Tensor
    sources: torch.Tensor


def draft_span(start: int, end: int) -> Span:
    """Return the draft rows of an image at target positions [start, end).

    Row t carries the embedding of token t + 1, so they lie one row earlier. The embedding of a
    prompt's very first token is in no row.
    """
    return max(0, start - 1), end - 1


def plan_span(compressor: VisualCompressor, span: Span, choice: Choice) -> Hole:
    """Plan which blocks one image leaves empty in the draft layer.

    Args:
        compressor: Whose settings say how many rows are wanted and how long a block is.
        span: The image's draft rows.
        choice: What is done to it.
    """
    wanted = compressor.settings.planned(choice, span[1] - span[0])
    return plan_hole(*span, wanted, compressor.settings.block_size)


def compact(
    rows: torch.Tensor,
    spans: Sequence[Span],
    choice: Choice | None,
    compressor: VisualCompressor,
    contents: Sequence[str | int],
    weights: torch.Tensor | None = None,
) -> CompactRows:
    """Compress the images of one prompt.

    Args:
        rows: Its fused draft rows, shape (n, hidden).
        spans: Draft rows of each image, ascending and apart.
        choice: What is done to them; None leaves them whole.
        compressor: The drafter's.
        contents: What identifies each image, for the seed of pruning.
        weights: Of ``weighted``, shape (3,).
    """
    parts, positions, sources, done = [], [], [], 0
    index = torch.arange(len(rows), device=rows.device)
    for span, content in zip(spans, contents, strict=True):
        hole = plan_span(compressor, span, choice) if choice else None
        if hole is None or hole.blocks == 0:
            continue
        seed = prune_seed(content, compressor.settings.seed)
        candidates = rows[hole.start : hole.behind]
        made, offsets = compressor(choice, candidates, hole.selected, seed, weights)
        parts += [rows[done : hole.start], made]
        positions += [index[done : hole.start], hole.start + offsets]
        sources += [index[done : hole.start], torch.full_like(offsets, -1)]
        done = hole.behind
    parts.append(rows[done:])
    positions.append(index[done:])
    sources.append(index[done:])
    return CompactRows(torch.cat(parts), torch.cat(positions), torch.cat(sources))
