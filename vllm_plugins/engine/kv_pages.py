"""Reading and writing the paged KV cache, whatever the attention backend's layout.

Writing goes through the backend's own cache update, which knows its layout. Reading has no such
method, so the layouts that are known are tried at start: keys and values are written to block 0,
which vLLM keeps for padding and no request reads, and the first layout that reads back what was
written is the one in use. A backend with another layout is refused rather than misread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from vllm_plugins.errors import PluginError

if TYPE_CHECKING:
    from vllm_plugins.engine.worker_host import RunnerView

# From a layer's cache [blocks, kv heads, block size, 2 * head size] to views of its keys and its
# values [blocks, kv heads, block size, head size].
Split = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _interleaved(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's key is followed by its value: FlashAttention, Triton, FlashInfer."""
    keys, values = cache.split(cache.shape[-1] // 2, dim=-1)
    return keys, values


def _transposed_keys(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys of a block and head, head size outermost, then all values: CPU_ATTN on AVX."""
    blocks, heads, size, width = cache.shape
    flat = cache.view(blocks, heads, 2, size * width // 2)
    keys = flat[:, :, 0].view(blocks, heads, width // 2, size).transpose(2, 3)
    return keys, flat[:, :, 1].view(blocks, heads, size, width // 2)


LAYOUTS: tuple[Split, ...] = (_interleaved, _transposed_keys)


class KVPages:
    """Keys and values of single tokens in the paged cache, by slot.

    Attributes:
        block_size: Tokens of a block of the KV cache manager, which slots are counted in.

    Args:
        runner: The worker's model and KV cache.
        layer_names: The attention layers, in order, of one KV cache group.

    Raises:
        PluginError: The cache is quantised, or its layout is not known.
    """

    def __init__(self, runner: RunnerView, layer_names: list[str]) -> None:
        self._layers: list[Any] = [runner.attention_layer(name) for name in layer_names]
        if runner.config.cache_config.cache_dtype not in ("auto", "float16", "bfloat16"):
            raise PluginError(
                "--kv-cache-dtype", "a quantised KV cache cannot be moved", "use 'auto'"
            )
        first = self._layers[0]
        cache = first.kv_cache
        if cache.dim() != 4:
            raise PluginError(
                "attention backend",
                f"{type(first.impl).__name__} has a cache of unknown form {tuple(cache.shape)}",
                "use --attention-backend FLASH_ATTN, TRITON_ATTN or the CPU's own",
            )
        # An attention kernel's blocks may be smaller than those that requests hold.
        self.num_heads, self._kernel_block = cache.shape[1], cache.shape[2]
        self.block_size = runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self.head_size = cache.shape[3] // 2
        self.dtype, self.device = cache.dtype, cache.device
        self._split = self._probe()

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self._layers)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return self.num_layers * 2 * self.num_heads * self.head_size * self.dtype.itemsize

    @torch.inference_mode()
    def write(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Write tokens of one layer.

        Args:
            layer: Index of the layer.
            keys: As attention reads them (rotated), shape (n, kv heads, head size).
            values: Of the same shape.
            slots: ``block * block_size + offset``, int64, shape (n,).
        """
        module = self._layers[layer]
        module.impl.do_kv_cache_update(module, keys, values, module.kv_cache, slots)

    @torch.inference_mode()
    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of the keys and values of one layer's tokens.

        Args:
            layer: Index of the layer.
            slots: int64, shape (n,).

        Returns:
            Keys and values, each of shape (n, kv heads, head size).
        """
        keys, values = self._split(self._layers[layer].kv_cache)
        return self._gather(keys, slots), self._gather(values, slots)

    def read_values(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        """Return a copy of the values of one layer's tokens, (n, kv heads, head size)."""
        return self._gather(self._split(self._layers[layer].kv_cache)[1], slots)

    def _gather(self, view: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        block, offset = slots // self._kernel_block, slots % self._kernel_block
        return view[block, :, offset]

    def _probe(self) -> Split:
        generator = torch.Generator().manual_seed(0)
        shape = (2, self._kernel_block, self.num_heads, self.head_size)
        keys, values = torch.randn(shape, generator=generator).to(self.device, self.dtype)
        slots = torch.arange(self._kernel_block, device=self.device)
        self.write(0, keys, values, slots)
        for split in LAYOUTS:
            self._split = split
            read_keys, read_values = self.read(0, slots)
            if torch.equal(read_keys, keys) and torch.equal(read_values, values):
                self._layers[0].kv_cache[0].zero_()
                return split
        raise PluginError(
            "attention backend",
            f"the layout of {type(self._layers[0].impl).__name__}'s cache is not known",
            "use --attention-backend FLASH_ATTN, TRITON_ATTN or the CPU's own",
        )
