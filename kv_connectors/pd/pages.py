"""A worker's paged KV cache as bytes: blocks of some heads of one layer, out and in.

vLLM 0.32 hands each layer's cache out as one view with blocks first, whatever its strides: blocks
x KV heads x slots x width where there are heads, and blocks x slots x width (MLA) where there are
none. Copies follow that logical order, so two sides need not share strides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.pd.geometry import Heads, Shard

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


class Pages:
    """The KV caches of one worker.

    Args:
        caches: Each layer's cache by name, in the order of the model.
        num_blocks: Blocks of the pool; a cache may divide each into several of its own.
        block_size: Tokens of a block.
        heads: The worker's KV heads.
        identity: Digest of what must be equal on both sides.

    Raises:
        PluginError: A cache has a form that is not known.
    """

    def __init__(
        self,
        caches: Mapping[str, torch.Tensor],
        num_blocks: int,
        block_size: int,
        heads: Heads,
        identity: str,
    ) -> None:
        self._caches = {
            name: _checked(name, cache, num_blocks, heads) for name, cache in caches.items()
        }
        self._num_blocks = num_blocks
        self._heads = heads
        device = next(iter(self._caches.values())).device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        sizes = tuple(self._bytes_per_head(name) for name in self._caches)
        self.shard = Shard(tuple(self._caches), heads, block_size, sizes, identity)

    def block_bytes(self, layer: str, heads: Heads) -> int:
        """Return the bytes of one block of some heads."""
        return self._bytes_per_head(layer) * (len(heads) if self._has_heads(layer) else 1)

    @torch.inference_mode()
    def gather(self, layer: str, blocks: Sequence[int], heads: Heads, out: WriteableBuffer) -> None:
        """Copy blocks out, in the order given.

        Args:
            layer: Name of the layer.
            blocks: Block ids.
            heads: Which heads, as numbered in the whole model.
            out: Receives ``len(blocks) * block_bytes(layer, heads)`` bytes.
        """
        view = self._view(layer, heads)
        rows = self._rows(layer, blocks)
        target = _as_tensor(out, view.dtype).view(len(rows), *view.shape[1:])
        if self._stream is None:
            torch.index_select(view, 0, rows, out=target)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(view.index_select(0, rows.to(view.device)), non_blocking=True)
        self._stream.synchronize()

    @torch.inference_mode()
    def scatter(
        self, layer: str, blocks: Sequence[int], heads: Heads, data: ReadableBuffer
    ) -> None:
        """Copy blocks in; the counterpart of `gather`."""
        view = self._view(layer, heads)
        rows = self._rows(layer, blocks)
        source = _as_tensor(data, view.dtype).view(len(rows), *view.shape[1:])
        if self._stream is None:
            view.index_copy_(0, rows, source)
            return
        with torch.cuda.stream(self._stream):
            view.index_copy_(0, rows.to(view.device), source.to(view.device, non_blocking=True))
        self._stream.synchronize()

    def mark_written(self) -> None:
        """Let later copies wait for what the model's stream has written until now."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def _view(self, layer: str, heads: Heads) -> torch.Tensor:
        cache = self._caches[layer]
        if not self._has_heads(layer):
            return cache
        return cache[:, heads.first - self._heads.first : heads.last - self._heads.first]

    def _rows(self, layer: str, blocks: Sequence[int]) -> torch.Tensor:
        """Return the rows of a layer's cache that make up blocks of the pool."""
        ids = torch.tensor(blocks, dtype=torch.int64)
        parts = self._parts(layer)
        return ids if parts == 1 else (ids[:, None] * parts + torch.arange(parts)).flatten()

    def _parts(self, layer: str) -> int:
        return self._caches[layer].shape[0] // self._num_blocks

    def _has_heads(self, layer: str) -> bool:
        return self._caches[layer].dim() == 4

    def _bytes_per_head(self, layer: str) -> int:
        cache = self._caches[layer]
        numbers = cache[0, 0].numel() if self._has_heads(layer) else cache[0].numel()
        return self._parts(layer) * numbers * cache.element_size()


def _checked(name: str, cache: object, num_blocks: int, heads: Heads) -> torch.Tensor:
    if (
        not isinstance(cache, torch.Tensor)
        or cache.dim() not in (3, 4)
        or not cache.shape[0]
        or cache.shape[0] % num_blocks
        or (cache.dim() == 4 and cache.shape[1] != len(heads))
    ):
        raise PluginError(
            "--plugin pd", f"the cache of {name} is not paged attention's", "use another model"
        )
    # PyTorch does not index all types of one byte.
    return cache.view(torch.uint8) if cache.element_size() == 1 else cache


def _as_tensor(buffer: ReadableBuffer, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(memoryview(buffer), np.uint8)).view(dtype)
