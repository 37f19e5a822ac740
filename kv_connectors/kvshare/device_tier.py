"""The device tier: KV of segments that are used again and again, beside the KV cache itself.

It is a cache of the host tier. Its memory, the *arena*, is taken in one piece before vLLM measures
how much is left for the KV cache, and handed out in pages, so that it does not fragment.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_plugins.kv_connectors.kvshare.segment_file import KVShape

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PAGE_TOKENS = 64
GIB = 1 << 30

KV_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ArenaSize:
    """Memory to take on the device, before there is a KV cache to take sizes from.

    Attributes:
        shape: Sizes of the KV.
        nbytes: Most bytes to take.
    """

    shape: KVShape
    nbytes: int

    @classmethod
    def of(cls, config: VllmConfig, gib: float) -> ArenaSize:
        """Return the size for an engine's configuration.

        Args:
            config: The engine's configuration.
            gib: Memory in GiB.
        """
        model = config.model_config
        shape = KVShape(
            model.get_num_layers(config.parallel_config),
            model.get_num_kv_heads(config.parallel_config),
            model.get_head_size(),
            KV_DTYPES.get(config.cache_config.cache_dtype, model.dtype),
        )
        return cls(shape, int(gib * GIB))


class DeviceTier:
    """KV of segments in device memory; when it is full, what was idle longest goes.

    All work is enqueued on the current stream, and nothing waits for it.

    Args:
        size: Memory to take.
        device: Where.

    Raises:
        torch.OutOfMemoryError: It is not there.
    """

    def __init__(self, size: ArenaSize, device: torch.device) -> None:
        self.shape = size.shape
        pages = size.nbytes // (PAGE_TOKENS * self.shape.bytes_per_token)
        layers, halves, tokens, *row = self.shape.of(pages * PAGE_TOKENS)
        # Token rows, so that a page is one piece of memory whatever the number of layers.
        self._arena = torch.empty(
            (tokens, layers, halves, *row), dtype=self.shape.dtype, device=device
        )
        self._free = list(range(pages))
        self._pages: dict[int, list[int]] = {}
        # Rows of the arena by segment, int64, shape (tokens,); what was idle longest first.
        self._rows: OrderedDict[int, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: int) -> bool:
        return key in self._rows

    @torch.inference_mode()
    def put(self, key: int, kv: torch.Tensor) -> None:
        """Keep a segment, if the tier is large enough for it, or note its use if it is kept.

        Args:
            key: The segment.
            kv: In host memory, shape (layers, 2, tokens, kv heads, head size).
        """
        if key in self._rows:
            self._rows.move_to_end(key)
            return
        tokens = kv.shape[2]
        needed = -(-tokens // PAGE_TOKENS)
        if needed * PAGE_TOKENS > len(self._arena):
            return
        while len(self._free) < needed:
            self.forget(next(iter(self._rows)))
        pages = self._pages[key] = [self._free.pop() for _ in range(needed)]
        starts = np.array(pages, dtype=np.int64)[:, None] * PAGE_TOKENS
        numbers = (starts + np.arange(PAGE_TOKENS)).ravel()[:tokens]
        device = self._arena.device
        rows = self._rows[key] = torch.from_numpy(numbers).to(device, non_blocking=True)
        for layer in range(kv.shape[0]):
            for half in range(2):
                part = kv[layer, half].to(device, non_blocking=True)
                self._arena[:, layer, half].index_copy_(0, rows, part)

    def forget(self, key: int) -> None:
        """Drop a segment, if it is there; reads that are enqueued already are not disturbed."""
        if self._rows.pop(key, None) is not None:
            self._free += self._pages.pop(key)

    def load(self, key: int, offset: int, layer: int, half: int, out: torch.Tensor) -> None:
        """Copy tokens of one layer of a segment that is kept.

        Args:
            key: The segment.
            offset: First token.
            layer: Index of the layer.
            half: 0 for keys, 1 for values.
            out: Where to, on the device, shape (n, kv heads, head size).
        """
        rows = self._rows[key][offset : offset + len(out)]
        torch.index_select(self._arena[:, layer, half], 0, rows, out=out)
