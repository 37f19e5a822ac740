"""What the kernels are told about a batch, about blocks to seal, and about a layer's memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_plugins.attention_backends.zipcache.key_transform import KeyTransform
from vllm_plugins.attention_backends.zipcache.page import PageFormat

# Where a block's tokens are: its state. A staging row is its own number; residual row r is RAW - r.
SEALED = -1
RAW = -2


@dataclass(frozen=True)
class Batch:
    """One batch, by request; every tensor int32 and on the host.

    Attributes:
        start: First token in the batch, shape (n,).
        length: Tokens that are computed, shape (n,).
        position: Position of the first of them, shape (n,).
        block_table: Shape (n, blocks).
        state: Where each block's tokens are, while and after this batch is written, shape (cache
            blocks,).
        residual_row: Row of the request's unfilled block, or -1, shape (n,).
        score_from: First block whose sums the request's probes add to, shape (n,).
        reset: Whether those sums start from zero, shape (n,).
        probe_start: First probe of each request, shape (n + 1,).
        probe: Probes, counted from their request's first token in the batch, ascending.
    """

    start: torch.Tensor
    length: torch.Tensor
    position: torch.Tensor
    block_table: torch.Tensor
    state: torch.Tensor
    residual_row: torch.Tensor
    score_from: torch.Tensor
    reset: torch.Tensor
    probe_start: torch.Tensor
    probe: torch.Tensor


@dataclass(frozen=True)
class Seals:
    """Blocks whose quota of salient tokens is applied.

    Attributes:
        block: int32, shape (m,).
        source: Where its tokens are: a state, int32, shape (m,).
        forced: First tokens of the block that are salient at any rate, int32, shape (m,).
        weight: What sums of attention are multiplied by, float32, shape (m, block size).
    """

    block: torch.Tensor
    source: torch.Tensor
    forced: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def of(
        cls, block: list[int], source: list[int], forced: list[int], weight: list[np.ndarray]
    ) -> Seals:
        """Make it from lists with one entry for each block."""
        return cls(
            block=torch.tensor(block, dtype=torch.int32),
            source=torch.tensor(source, dtype=torch.int32),
            forced=torch.tensor(forced, dtype=torch.int32),
            weight=torch.from_numpy(np.stack(weight)),
        )


@dataclass
class LayerMemory:
    """One layer's memory.

    Attributes:
        page: Format of its pages.
        scaled: Whether values have a scale for each channel.
        residual: Keys, then values of unfilled blocks in the model's dtype, shape (rows, kv heads,
            2, N, D).
        residual_sums: Probes' attention to them, float32, shape (rows, kv heads, N).
        staging: Low planes of keys, then values of blocks that are not sealed yet, uint8, shape
            (rows, kv heads, 2, N, D / 4).
        staging_sums: As ``residual_sums``, shape (rows, kv heads, N).
        cache: Pages, uint8, shape (cache blocks, kv heads, page bytes); set once the cache exists.
        transform: What keys and queries are multiplied by before all else, or None.
    """

    page: PageFormat
    scaled: bool
    residual: torch.Tensor
    residual_sums: torch.Tensor
    staging: torch.Tensor
    staging_sums: torch.Tensor
    cache: torch.Tensor
    transform: KeyTransform | None = None

    @classmethod
    def take(
        cls,
        page: PageFormat,
        kv_heads: int,
        rows: int,
        staged: int,
        dtype: torch.dtype,
        scaled: bool = True,
        device: torch.device | str = "cpu",
    ) -> LayerMemory:
        """Take a layer's memory besides the cache.

        Args:
            page: Format of its pages.
            kv_heads: Heads of keys and values.
            rows: Unfilled blocks at a time.
            staged: Blocks that wait for their quota at a time.
            dtype: The model's.
            scaled: Whether values have a scale for each channel.
            device: Where.
        """
        n, d = page.block_size, page.head_size
        # The kernels read whole vectors, so up to 8 bytes behind the last row.
        low = torch.full((staged * kv_heads * page.staged_bytes + 8,), 0, dtype=torch.uint8,
                         device=device)  # fmt: skip
        # Filled, not only reserved: the CPU platform measures what is in use.
        return cls(
            page=page,
            scaled=scaled,
            residual=torch.full((rows, kv_heads, 2, n, d), 0, dtype=dtype, device=device),
            residual_sums=torch.full((rows, kv_heads, n), 0.0, device=device),
            staging=low[:-8].view(staged, kv_heads, 2, n, page.row),
            staging_sums=torch.full((staged, kv_heads, n), 0.0, device=device),
            cache=torch.empty((0, kv_heads, page.bytes), dtype=torch.uint8, device=device),
        )

    @property
    def bytes(self) -> int:
        """Bytes besides the cache."""
        parts = (self.residual, self.residual_sums, self.staging, self.staging_sums)
        own = sum(x.nbytes for x in parts)
        return own if self.transform is None else own + self.transform.bytes
