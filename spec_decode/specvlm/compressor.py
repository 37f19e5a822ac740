"""The elastic visual compressor: five ways to make few rows of an image's many (paper, section 3).

An operator gets the fused rows of one image in the order of its tokens, a raster over the patch
grid, and gives as many as the slots that whole KV blocks leave free. Choices that the paper leaves
open, so guesses: compression acts on the fused rows (after ``fc``), so that one operator serves
embeddings and features; pooling averages stretches of the raster; the convolution is depthwise and
separable; rows that are made take the positions of the slots they lie in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from vllm_plugins.spec_decode.specvlm.settings import (
    CONCATENATED,
    WEIGHTED,
    Choice,
    Operator,
    SpecVLMSettings,
)


def prune_seed(content: str | int, seed: int) -> int:
    """Return the seed of an image's random subset, the same in every process.

    Args:
        content: What identifies the picture, such as its content hash.
        seed: The drafter's.
    """
    digest = hashlib.sha256(f"{seed}:{content}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def prune_offsets(candidates: int, kept: int, seed: int) -> torch.Tensor:
    """Choose ``kept`` of ``candidates`` at random, ascending; int64 on the host, shape (kept,)."""
    random = torch.Generator().manual_seed(seed)
    return torch.randperm(candidates, generator=random)[:kept].sort().values


def pool(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Average stretches of rows; (images, n, hidden) to (images, count, hidden)."""
    if count == rows.shape[1]:
        return rows
    return functional.adaptive_avg_pool1d(rows.transpose(1, 2), count).transpose(1, 2)


class StridedConvolution(nn.Module):
    """A depthwise convolution over the patch grid, strided along its lines, then a pointwise one.

    It begins as the average of each stretch of a line, so that it starts no worse than pooling
    (own choice).

    Args:
        hidden_size: Width of a row.
        columns: Patches of a line of the grid.
        stride: Patches of a line for each output.
    """

    def __init__(self, hidden_size: int, columns: int, stride: int) -> None:
        super().__init__()
        self.columns, self.stride = columns, stride
        # Odd, so that an output has a middle, and no narrower than the stride, which would skip.
        width = max(3, 2 * (stride // 2) + 1)
        self.depthwise = nn.Conv2d(
            hidden_size,
            hidden_size,
            (3, width),
            (1, stride),
            (1, width // 2),
            groups=hidden_size,
            bias=False,
        )
        self.pointwise = nn.Linear(hidden_size, hidden_size, bias=False)
        with torch.no_grad():
            self.depthwise.weight.zero_()[:, :, 1] = 1 / width
            nn.init.eye_(self.pointwise.weight)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Convolve rows of (images, n, hidden); about n / stride come out, in raster order."""
        images, count, hidden = rows.shape
        lines, rest = divmod(count, self.columns)
        missing = -count % self.columns
        grid = functional.pad(rows, (0, 0, 0, missing)).reshape(images, -1, self.columns, hidden)
        out = self.depthwise(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        # Outputs of the last, partial line whose middle lies beyond the rows are left out.
        valid = lines * out.shape[2] - (-rest // self.stride)
        return self.pointwise(out.reshape(images, -1, hidden)[:, :valid])


class Resampler(nn.Module):
    """One layer of cross-attention with learned queries: a Q-Former without its other parts.

    It begins as near the mean of all rows, by value and output projections that are the identity
    (own choice).

    Args:
        hidden_size: Width of a row.
        queries: Rows that come out.
        heads: Of the attention; divides the width.
    """

    def __init__(self, hidden_size: int, queries: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.randn(queries, hidden_size))
        self.norm = nn.LayerNorm(hidden_size)
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        with torch.no_grad():
            nn.init.eye_(self.v_proj.weight)
            nn.init.eye_(self.o_proj.weight)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Attend to rows of (images, n, hidden); shape (images, queries, hidden)."""
        queries = self._split(self.q_proj(self.queries)[None]).expand(len(rows), -1, -1, -1)
        keys, values = self._split(self.k_proj(self.norm(rows))), self._split(self.v_proj(rows))
        out = functional.scaled_dot_product_attention(queries, keys, values)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _split(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(2, (self.heads, -1)).transpose(1, 2)


class VisualCompressor(nn.Module):
    """All operators of one drafter. Parameters: ``conv.*`` and ``resampler.*``.

    Args:
        hidden_size: Width of a row.
        settings: Ratios, queries and patch grid.
        heads: Of the resampler's attention.
    """

    def __init__(self, hidden_size: int, settings: SpecVLMSettings, heads: int) -> None:
        super().__init__()
        self.settings = settings
        stride = max(1, round(settings.conv_ratio))
        self.conv = StridedConvolution(hidden_size, settings.grid[1], stride)
        self.resampler = Resampler(hidden_size, settings.queries, heads)

    def forward(
        self,
        choice: Choice,
        rows: torch.Tensor,
        count: int,
        seed: int = 0,
        weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compress one image.

        Args:
            choice: Operator or combination.
            rows: Its fused rows, shape (n, hidden).
            count: Rows to make of them, at most n.
            seed: Of pruning, from :func:`prune_seed`.
            weights: Of ``weighted``, in the order of ``WEIGHTED``; shape (3,).

        Returns:
            The rows, shape (count, hidden), and the offset within the image of the position that
            each takes, int64, shape (count,).
        """
        mixed = None if weights is None else weights[None]
        out, offsets = self.compress(choice, rows[None], count, [seed], mixed)
        return out[0], offsets[0]

    def compress(
        self,
        choice: Choice,
        rows: torch.Tensor,
        count: int,
        seeds: Sequence[int],
        weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compress several images of equal length at once.

        Args:
            choice: Operator or combination, the same for all.
            rows: Fused rows, shape (images, n, hidden).
            count: Rows to make of each, at most n.
            seeds: Of pruning, one for each image.
            weights: Of ``weighted``, shape (images, 3).

        Returns:
            Rows, shape (images, count, hidden), and offsets, int64, shape (images, count). Pruned
            rows keep their own positions; rows that were made take those of their slots.
        """
        slots = torch.arange(count, device=rows.device).expand(len(rows), -1)
        if count == 0:
            return rows[:, :0], slots
        if choice == "prune":
            return self._prune(rows, count, seeds)
        if choice == "weighted":
            assert weights is not None
            parts = torch.stack([self._operate(op, rows, count, seeds) for op in WEIGHTED], 1)
            return torch.einsum("ip,ipnh->inh", weights.to(rows.dtype), parts), slots
        if choice == "concat":
            shares = zip(CONCATENATED, self.shares(rows.shape[1], count), strict=True)
            made = [self._operate(op, rows, share, seeds) for op, share in shares if share]
            return torch.cat(made, 1), slots
        return self._operate(choice, rows, count, seeds), slots

    def shares(self, length: int, count: int) -> list[int]:
        """Share ``count`` slots out to the operators of ``concat``, as each wants them.

        The resampler gets its queries first; what whole blocks add or take goes to the others in
        proportion.
        """
        *wanted, queries = (self.settings.wanted(op, length) for op in CONCATENATED)
        queries = min(queries, count)
        total, bounds, passed = sum(wanted), [0], 0
        for part in wanted:
            passed += part
            bounds.append((count - queries) * passed // total)
        return [b - a for a, b in pairwise(bounds)] + [queries]

    def _operate(
        self, operator: Operator, rows: torch.Tensor, count: int, seeds: Sequence[int]
    ) -> torch.Tensor:
        if operator == "prune":
            return self._prune(rows, count, seeds)[0]
        if operator == "pool":
            return pool(rows, count)
        if operator == "conv":
            return pool(self.conv(rows), count)
        if operator == "resample":
            return self._resample(rows, count)
        # Whole blocks leave slots that something must fill: the image's first rows, as they are.
        return rows[:, :count]

    def _prune(
        self, rows: torch.Tensor, count: int, seeds: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.stack([prune_offsets(rows.shape[1], count, seed) for seed in seeds])
        chosen = chosen.to(rows.device, non_blocking=True)
        return rows.gather(1, chosen[..., None].expand(-1, -1, rows.shape[2])), chosen

    def _resample(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Queries first, and pooled rows in the slots that whole blocks leave beyond them."""
        made = self.resampler(rows)[:, :count]
        rest = count - made.shape[1]
        return torch.cat([made, pool(rows, rest)], 1) if rest else made
