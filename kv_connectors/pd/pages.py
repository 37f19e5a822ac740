"""A worker's paged KV cache as bytes: blocks of some heads of one layer, out and in.

vLLM 0.32 hands each layer's cache out as one view with blocks first, whatever its strides: blocks
x KV heads x slots x width where there are heads, and blocks x slots x width (MLA) where there are
none. Copies follow that logical order, so two sides need not share strides. Recurrent layers have
one page per block, blocks x 1 x 1 x bytes, whose first bytes are a state; it is moved as it is.
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
        states: Of each recurrent layer, the form of its states.
        tensor_ranks: The worker's tensor rank, and how many there are.

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
        states: Mapping[str, str] | None = None,
        tensor_ranks: tuple[int, int] = (0, 1),
    ) -> None:
        states = states or {}
        self._caches = {
            name: _states_of(name, cache, num_blocks)
            if name in states
            else _checked(name, cache, num_blocks, heads)
            for name, cache in caches.items()
        }
        self._num_blocks = num_blocks
        self._heads = heads
        device = next(iter(self._caches.values())).device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        sizes = tuple(self._bytes_per_head(name) for name in self._caches)
        forms = tuple((name, states[name]) for name in self._caches if name in states)
        self.shard = Shard(
            tuple(self._caches), heads, block_size, sizes, identity, forms, *tensor_ranks
        )

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

    @torch.inference_mode()
    def copy(
        self,
        source: Pages,
        layers: Sequence[str],
        blocks: Sequence[int],
        targets: Sequence[int],
        heads: Heads,
    ) -> None:
        """Copy blocks of another worker's caches, mapped here, and wait until they are here.

        Runs on a stream of these pages' own, and keeps the calling thread alone waiting.

        Args:
            source: The other worker's caches, of the same rows as these (`direct.open_caches`).
            layers: The layers, of one KV cache group.
            blocks: Ids of the other worker's blocks.
            targets: As many ids of blocks of these pages.
            heads: Which heads, as numbered in the whole model.
        """
        if self._stream is None:
            self._copy(source, layers, blocks, targets, heads)
            return
        done = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._stream):
            self._copy(source, layers, blocks, targets, heads)
            done.record(self._stream)
        # Not the stream: other threads' copies are on it too.
        done.synchronize()

    def _copy(
        self,
        source: Pages,
        layers: Sequence[str],
        blocks: Sequence[int],
        targets: Sequence[int],
        heads: Heads,
    ) -> None:
        by_parts: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for layer in layers:
            pair = source._view(layer, heads), self._view(layer, heads)
            by_parts.setdefault(self._parts(layer), []).append(pair)
        for parts, pairs in by_parts.items():
            device = pairs[0][1].device
            theirs, ours = (_rows(ids, parts).to(device) for ids in (blocks, targets))
            if device.type == "cuda" and all(view.stride(-1) == 1 for one in pairs for view in one):
                # Triton is not there on every platform.
                from vllm_plugins.kv_connectors.pd.direct_kernel import copy_rows

                copy_rows(pairs, theirs, ours)
                continue
            for read, written in pairs:
                written.index_copy_(0, ours, read.index_select(0, theirs))

    def mark_written(self) -> None:
        """Let later copies wait for what the model's stream has written until now."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def await_written(self) -> None:
        """Wait for what `mark_written` marked: another process's streams cannot wait for it."""
        if self._stream is not None:
            self._stream.synchronize()

    @property
    def caches(self) -> Mapping[str, torch.Tensor]:
        """Each layer's cache by name, in the order of the model; those of one byte as uint8."""
        return self._caches

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return self._num_blocks

    def _view(self, layer: str, heads: Heads) -> torch.Tensor:
        cache = self._caches[layer]
        if not self._has_heads(layer):
            return cache
        return cache[:, heads.first - self._heads.first : heads.last - self._heads.first]

    def _rows(self, layer: str, blocks: Sequence[int]) -> torch.Tensor:
        return _rows(blocks, self._parts(layer))

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


def _states_of(name: str, cache: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Return a recurrent layer's pages as bytes, without heads: blocks x 1 x bytes of a state."""
    if cache.dim() != 4 or cache.shape[:3] != (num_blocks, 1, 1) or cache.element_size() != 1:
        raise PluginError(
            "--plugin pd", f"the cache of {name} is not one of states by block", "use another model"
        )
    return cache.view(torch.uint8)[:, 0]


def _rows(blocks: Sequence[int], parts: int) -> torch.Tensor:
    """Return the rows of a cache that make up blocks of the pool, each divided into some parts."""
    ids = torch.tensor(blocks, dtype=torch.int64)
    return ids if parts == 1 else (ids[:, None] * parts + torch.arange(parts)).flatten()


def _as_tensor(buffer: ReadableBuffer, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(memoryview(buffer), np.uint8)).view(dtype)
