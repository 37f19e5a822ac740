"""Mapped caches: a decode worker reads a prefill worker's KV cache where it is.

As in DistServe's code, whose decode workers map the prefill workers' pools by CUDA IPC and copy out
of them. A writer exports each storage of its caches once, at start; a reader asks for the handles
over the authenticated Unix socket, checks them against the writer's `Shard`, and maps them once per
run of the writer. How a storage is exported and opened is up to `DirectCaches`; the geometry is the
same for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from vllm_plugins.kv_connectors.pd.geometry import MAX_LAYERS
from vllm_plugins.kv_connectors.pd.pages import Pages
from vllm_plugins.kv_connectors.pd.protocol import MAX_BLOCKS, integers, text

if TYPE_CHECKING:
    from vllm_plugins.kv_connectors.pd.geometry import Shard

# CUDA's handle has 64 bytes, to which PyTorch adds two. Those of expandable segments name each
# segment of 20 MiB, which for a pool exceeds any header.
MAX_KEY_BYTES = 128
MAX_BYTES = 1 << 48
# Pages are of these, since all types of one byte are taken for the first.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.uint8, torch.int16, torch.int32, torch.float16, torch.bfloat16, torch.float32,
        torch.float64,
    )
}  # fmt: skip


class UnavailableError(Exception):
    """Caches cannot be mapped, so that their KV has to be copied through host memory."""


@dataclass(frozen=True)
class StorageHandle:
    """What another process needs to map a storage.

    Attributes:
        key: Names the allocation that the storage lies in, to `DirectCaches` alone.
        size: Bytes of the storage.
        offset: Bytes in the allocation before it.
    """

    key: bytes
    size: int
    offset: int


class DirectCaches(Protocol):
    """How this worker's storages are exported, and others' opened."""

    @property
    def device(self) -> str:
        """Name of this worker's device that no other device on the host has."""

    def export(self, storage: torch.UntypedStorage) -> StorageHandle:
        """Let processes of this user map a storage of this worker's.

        Raises:
            UnavailableError: Its memory cannot be mapped.
        """

    def open(self, handle: StorageHandle, device: str) -> torch.UntypedStorage:
        """Map a storage of another process's; it is unmapped with the last that uses it.

        Args:
            handle: What the other process exported.
            device: The `device` of the other process.

        Raises:
            UnavailableError: It cannot be mapped here.
        """


@dataclass(frozen=True)
class LayerView:
    """Where a layer's cache lies in its storage.

    Attributes:
        storage: Index of the storage.
        offset: Numbers before the first.
        shape: Of the cache.
        strides: Of the cache, in numbers.
        dtype: Name of the type, one of `DTYPES`.
    """

    storage: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    def end(self) -> int:
        """Return the bytes of the storage up to the cache's last."""
        steps = zip(self.shape, self.strides, strict=True)
        last = self.offset + sum((length - 1) * stride for length, stride in steps)
        return (last + 1) * DTYPES[self.dtype].itemsize

    def to_json(self) -> list[Any]:
        """Return the JSON form."""
        return [self.storage, self.offset, list(self.shape), list(self.strides), self.dtype]

    @classmethod
    def from_json(cls, value: Any) -> LayerView:
        """Return the view of a peer's JSON value.

        Raises:
            ValueError: It is malformed.
        """
        if not isinstance(value, list) or len(value) != 5 or value[4] not in list(DTYPES):
            raise ValueError("a cache is not described")
        storage, offset = integers(value[:2], 2, MAX_BYTES)
        dims = len(value[2]) if isinstance(value[2], list) else 0
        if dims not in (3, 4):
            raise ValueError("a cache is not paged attention's")
        shape, strides = (tuple(integers(part, dims, MAX_BYTES)) for part in value[2:4])
        if not all(shape):
            raise ValueError("a cache is empty")
        return cls(storage, offset, shape, strides, value[4])


@dataclass(frozen=True)
class CacheHandles:
    """What a reader needs to map the caches of one worker.

    Attributes:
        device: Name of the worker's device.
        num_blocks: Blocks of its pool.
        storages: Each storage once, however many layers share it.
        layers: By layer, in the order of the worker's `Shard`.
    """

    device: str
    num_blocks: int
    storages: tuple[StorageHandle, ...]
    layers: tuple[LayerView, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the header: for 200 layers with a storage each, less than 100 KiB."""
        return {
            "device": self.device,
            "num_blocks": self.num_blocks,
            "storages": [[one.key.hex(), one.size, one.offset] for one in self.storages],
            "layers": [layer.to_json() for layer in self.layers],
        }

    @classmethod
    def from_json(cls, header: Mapping[str, Any], shard: Shard) -> CacheHandles:
        """Return the handles in a peer's header, checked against what it said that it holds.

        Args:
            header: The header.
            shard: The peer's.

        Raises:
            ValueError: They are malformed, or describe other caches than the peer's.
        """
        storages, layers = header.get("storages"), header.get("layers")
        if not isinstance(storages, list) or not 0 < len(storages) <= MAX_LAYERS:
            raise ValueError("storages is no list of handles")
        if not isinstance(layers, list) or len(layers) != len(shard.layers):
            raise ValueError("the caches are not those of the layers")
        found = cls(
            text(header, "device"),
            integers([header.get("num_blocks")], 1, MAX_BLOCKS)[0],
            tuple(map(_storage, storages)),
            tuple(map(LayerView.from_json, layers)),
        )
        for layer, size in zip(found.layers, shard.bytes_per_head, strict=True):
            found._check(layer, size, len(shard.heads))
        return found

    def _check(self, layer: LayerView, bytes_per_head: int, heads: int) -> None:
        if layer.storage >= len(self.storages):
            raise ValueError("a cache lies in no storage")
        if layer.end() > self.storages[layer.storage].size:
            raise ValueError("a cache is larger than its storage")
        has_heads = len(layer.shape) == 4
        if has_heads and layer.shape[1] != heads:
            raise ValueError("a cache has other heads than the worker")
        if not self.num_blocks or layer.shape[0] % self.num_blocks:
            raise ValueError("a cache does not have the pool's blocks")
        numbers = math.prod(layer.shape) // self.num_blocks // (heads if has_heads else 1)
        if numbers * DTYPES[layer.dtype].itemsize != bytes_per_head:
            raise ValueError("a cache's blocks have another size")


def export_caches(pages: Pages, direct: DirectCaches) -> CacheHandles:
    """Export a worker's caches; once, before anything else uses them (see `direct_cuda`).

    Raises:
        UnavailableError: Some of their memory cannot be mapped.
    """
    if pages.shard.states:
        raise UnavailableError("recurrent states are handed over through host memory alone")
    places: dict[int, int] = {}
    storages: list[StorageHandle] = []
    views = []
    for cache in pages.caches.values():
        storage = cache.untyped_storage()
        place = places.setdefault(storage.data_ptr(), len(storages))
        if place == len(storages):
            storages.append(direct.export(storage))
        dtype = str(cache.dtype).removeprefix("torch.")
        if dtype not in DTYPES or cache.dim() not in (3, 4):
            raise UnavailableError(f"a cache of {dtype} in {cache.dim()} dimensions is not mapped")
        views.append(
            LayerView(place, cache.storage_offset(), tuple(cache.shape), cache.stride(), dtype)
        )
    return CacheHandles(direct.device, pages.num_blocks, tuple(storages), tuple(views))


def open_caches(handles: CacheHandles, shard: Shard, own: Pages, direct: DirectCaches) -> Pages:
    """Map another worker's caches, as far as this worker has the layers.

    Args:
        handles: The other worker's, checked.
        shard: What the other worker holds.
        own: This worker's caches.
        direct: Opens storages.

    Returns:
        The other worker's caches, to copy from.

    Raises:
        UnavailableError: They cannot be mapped, or their rows differ from this worker's.
    """
    views = {
        name: view
        for name, view in zip(shard.layers, handles.layers, strict=True)
        if name in own.caches
    }
    for name, view in views.items():
        _check_rows(name, view, handles.num_blocks, own)
    used = {view.storage for view in views.values()}
    storages = {place: direct.open(handles.storages[place], handles.device) for place in used}
    caches = {name: _mapped(view, storages[view.storage]) for name, view in views.items()}
    return Pages(caches, handles.num_blocks, shard.block_size, shard.heads, shard.identity)


def _storage(value: Any) -> StorageHandle:
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], str):
        raise ValueError("a storage is not described")
    if not 0 < len(value[0]) <= 2 * MAX_KEY_BYTES:
        raise ValueError("a storage's handle has another size")
    size, offset = integers(value[1:], 2, MAX_BYTES)
    return StorageHandle(bytes.fromhex(value[0]), size, offset)


def _check_rows(name: str, view: LayerView, num_blocks: int, own: Pages) -> None:
    """Refuse what is not copied row by row; strides and numbers of heads may differ."""
    cache = own.caches[name]
    heads = cache.dim() == 4
    mine = (cache.dtype, cache.dim(), cache.shape[0] // own.num_blocks, *cache.shape[1 + heads :])
    theirs = (
        DTYPES[view.dtype],
        len(view.shape),
        view.shape[0] // num_blocks,
        *view.shape[1 + heads :],
    )
    if mine != theirs:
        raise UnavailableError(f"the blocks of {name} are divided in another way")


def _mapped(view: LayerView, storage: torch.UntypedStorage) -> torch.Tensor:
    empty = torch.empty(0, dtype=DTYPES[view.dtype], device=storage.device)
    return empty.set_(storage, view.offset, view.shape, view.strides)
