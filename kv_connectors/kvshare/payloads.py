"""The KV of stored segments in host memory, one shard in each worker.

The scheduler's part decides what is stored and what is evicted; this only holds it. Keys are kept
as attention reads them, rotated at the position where they were computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_plugins.engine.kv_pages import KVPages


class LostSegmentError(Exception):
    """A segment's KV is not there, or is not what it should be.

    Args:
        key: The segment.
    """

    def __init__(self, key: int) -> None:
        super().__init__(f"KV of segment {key} is missing or damaged")
        self.key = key


@dataclass(frozen=True)
class Piece:
    """Tokens ``[offset, offset + length)`` of a stored segment."""

    key: int
    offset: int
    length: int


class Payloads:
    """KV of segments by key; each of shape (layers, 2, tokens, kv heads, head size).

    Args:
        pages: The paged cache from which it is read; gives all sizes.
    """

    def __init__(self, pages: KVPages) -> None:
        self._pages = pages
        self._pinned = pages.device.type == "cuda"
        self._stored: dict[int, torch.Tensor] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def save(self, lengths: dict[int, int], slots: torch.Tensor) -> None:
        """Copy KV out of the paged cache.

        Args:
            lengths: Tokens of each new segment, by key, in the order of ``slots``.
            slots: Slots of all their tokens, int64, shape (sum of lengths,).
        """
        pages, sizes = self._pages, list(lengths.values())
        shape = (pages.num_layers, 2)
        row = (pages.num_heads, pages.head_size)
        new = [
            torch.empty((*shape, size, *row), dtype=pages.dtype, pin_memory=self._pinned)
            for size in sizes
        ]
        for layer in range(pages.num_layers):
            for half, tensor in enumerate(pages.read(layer, slots)):
                # One copy off the device a layer; the pieces are cut on the host.
                for target, part in zip(new, tensor.cpu().split(sizes), strict=True):
                    target[layer, half] = part
        for key, payload in zip(lengths, new, strict=True):
            self._stored[key] = payload
            self.bytes += payload.nbytes

    def forget(self, key: int) -> None:
        """Drop a segment, if it is there."""
        payload = self._stored.pop(key, None)
        if payload is not None:
            self.bytes -= payload.nbytes

    def check(self, pieces: Sequence[Piece]) -> None:
        """Make sure that pieces can be loaded.

        Raises:
            LostSegmentError: One cannot.
        """
        pages = self._pages
        for piece in pieces:
            payload = self._stored.get(piece.key)
            expected = (pages.num_layers, 2, pages.num_heads, pages.head_size)
            if (
                payload is None
                or payload.dtype != pages.dtype
                or (*payload.shape[:2], *payload.shape[3:]) != expected
                or payload.shape[2] < piece.offset + piece.length
            ):
                raise LostSegmentError(piece.key)

    def load(self, layer: int, half: int, pieces: Sequence[Piece]) -> torch.Tensor:
        """Return one layer's keys (half 0) or values (half 1) of pieces, one after the other.

        Args:
            layer: Index of the layer.
            half: 0 for keys, 1 for values.
            pieces: What to return; `check` has passed them.

        Returns:
            Shape (sum of lengths, kv heads, head size), on the cache's device.
        """
        parts = [self._stored[p.key][layer, half, p.offset : p.offset + p.length] for p in pieces]
        return torch.cat(parts).to(self._pages.device, non_blocking=True)
