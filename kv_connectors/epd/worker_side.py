"""The worker's side: copies between vLLM's encoder cache and the arena, as ordered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.epd.shared_memory import SharedMemory, digest_of

if TYPE_CHECKING:
    from vllm_plugins.kv_connectors.epd.orders import Copy, Orders
    from vllm_plugins.kv_connectors.epd.shared_memory import Location

logger = init_logger("vllm.vllm_plugins.epd")


class WorkerSide:
    """Carries out a step's orders; of the engine's workers only the first one saves."""

    def __init__(self) -> None:
        # The connector is made after the worker has its rank and its device.
        self._rank = get_tensor_model_parallel_rank()
        self._device = _current_device()
        self._memory: SharedMemory | None = None
        self._saves: dict[str, Copy] = {}

    def begin(self, orders: Orders, encoder_cache: dict[str, torch.Tensor]) -> None:
        """Load what the step needs, and save what it was told to and is encoded already."""
        memory = self._map(orders.memory)
        for copy in orders.loads:
            encoder_cache[copy.media] = read_rows(memory, copy).to(self._device)
        # All ranks end up with the same embeddings.
        self._saves = {copy.media: copy for copy in orders.saves} if self._rank == 0 else {}
        for media in [media for media in self._saves if media in encoder_cache]:
            self.save(media, encoder_cache[media])

    def save(self, media: str, embeddings: torch.Tensor) -> None:
        """Write an item that the step has encoded, if it is to be written."""
        copy = self._saves.pop(media, None)
        if copy is None or self._memory is None:
            return
        wanted = (copy.shape.num_tokens, copy.shape.width)
        dtype = str(embeddings.dtype).removeprefix("torch.")
        if tuple(embeddings.shape) != wanted or dtype != copy.shape.dtype:
            logger.error(
                "vllm-plugins: epd: the encoder gave %s of %s for item %s where %s of %s belong",
                tuple(embeddings.shape),
                dtype,
                media,
                wanted,
                copy.shape.dtype,
            )
            return
        write_rows(self._memory, copy, embeddings)

    def end(self, orders: Orders) -> None:
        """Report that a step's copies are done."""
        if orders.step and self._memory is not None:
            self._memory.report(self._rank, orders.step)

    def close(self) -> None:
        """Unmap the arena."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _map(self, location: Location) -> SharedMemory:
        if self._memory is None:
            self._memory = SharedMemory.open(location)
        return self._memory


def write_rows(memory: SharedMemory, copy: Copy, embeddings: torch.Tensor) -> None:
    """Write an item's embeddings to its blocks, and stamp them as complete.

    Args:
        memory: The arena's.
        copy: Where they go.
        embeddings: Of the copy's shape and type, on any device.
    """
    rows = embeddings.detach().to("cpu").contiguous().view(torch.uint8).numpy()
    pieces = memory.runs(copy.blocks, copy.shape)
    for first, count, piece in pieces:
        np.frombuffer(piece, np.uint8)[:] = rows[first : first + count].reshape(-1)
    digest = digest_of(piece for _, _, piece in pieces)
    memory.stamp(copy.blocks[0], copy.sequence, digest)


def read_rows(memory: SharedMemory, copy: Copy) -> torch.Tensor:
    """Return an item's embeddings, in host memory of their own.

    Raises:
        PluginError: Its blocks hold another item.
    """
    shape = copy.shape
    if memory.stamped(copy.blocks[0])[0] != copy.sequence:
        raise PluginError(
            "--plugin epd",
            f"the arena does not hold item {copy.media} where the scheduler says",
            "report this as a defect",
        )
    rows = np.empty((shape.num_tokens, shape.row_bytes), np.uint8)
    for first, count, piece in memory.runs(copy.blocks, shape):
        rows[first : first + count].reshape(-1)[:] = np.frombuffer(piece, np.uint8)
    return torch.from_numpy(rows).view(getattr(torch, shape.dtype))


def _current_device() -> torch.device:
    """Return this worker's device; a bare "cuda" would be the first one for all workers."""
    kind = current_platform.device_type
    index = current_platform.current_device() if current_platform.is_cuda_alike() else None
    return torch.device(kind) if index is None else torch.device(kind, index)
