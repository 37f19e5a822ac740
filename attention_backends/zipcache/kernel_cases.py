"""What ``vllm-plugins bench --kernel zipcache`` times: decode of one layer, beside stock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm_plugins.attention_backends.zipcache import cpu_kernels, torch_kernels
from vllm_plugins.attention_backends.zipcache.batch import RAW, SEALED, Batch, LayerMemory, Seals
from vllm_plugins.attention_backends.zipcache.page import BLOCK_SIZES, PageFormat
from vllm_plugins.attention_backends.zipcache.plugin import ZipCacheOptions
from vllm_plugins.bench.kernels import STOCK, KernelCase
from vllm_plugins.errors import PluginError

if TYPE_CHECKING:
    from vllm_plugins.attention_backends.zipcache.cuda_kernel_cases import CudaLayer
    from vllm_plugins.bench.kernels import KernelShape, Load


def kernel_cases(shape: KernelShape, load: Load, options: dict[str, Any]) -> Sequence[KernelCase]:
    """Return the stock kernel on plain keys, and ZipCache's on packed pages.

    Args:
        shape: The layer.
        load: Phase, context and batch; decode only.
        options: The plug-in's, validated.

    Raises:
        PluginError: It is not decode, or there are no pages of such blocks.
    """
    if load.phase != "decode":
        raise PluginError(
            "--kernel zipcache --phase prefill", "a prompt in one chunk reads no page",
            "time it in decode",
        )  # fmt: skip
    if shape.block_size not in BLOCK_SIZES:
        raise PluginError(
            f"--kernel zipcache --block-size {shape.block_size}", "pages are of other sizes",
            f"use one of {', '.join(map(str, BLOCK_SIZES))}",
        )  # fmt: skip
    chosen = ZipCacheOptions.model_validate(options)
    page = PageFormat.of(shape.block_size, shape.head_size, *chosen.shares)
    layer = _layer(shape, load, page)
    tokens = load.batch * load.context
    return [
        KernelCase(STOCK, layer.stock(), tokens * shape.token_bytes),
        KernelCase("zipcache", layer.packed(), tokens * shape.kv_heads * page.token_bytes),
        KernelCase("zipcache, seal one block", layer.sealing(), 0),
    ]


def _layer(shape: KernelShape, load: Load, page: PageFormat) -> CudaLayer | _PackedLayer:
    if shape.device != "cuda":
        return _PackedLayer(shape, load, page)
    # Its kernels are in Triton, which a CPU build may lack.
    from vllm_plugins.attention_backends.zipcache.cuda_kernel_cases import CudaLayer

    return CudaLayer(shape, load, page)


class _PackedLayer:
    """One layer's cache of random keys and values, packed and plain."""

    def __init__(self, shape: KernelShape, load: Load, page: PageFormat) -> None:
        self.shape, self.load, self.page = shape, load, page
        self.scale = shape.head_size**-0.5
        self.generator = torch.Generator().manual_seed(0)
        self.per_row = -(-load.context // shape.block_size)
        order = torch.randperm(self.per_row * load.batch, generator=self.generator)
        self.table = order.to(torch.int32).view(load.batch, self.per_row)
        self.query = self._random(load.batch, shape.heads, shape.head_size)
        self.key = self._random(load.batch, shape.kv_heads, shape.head_size)
        self.value = torch.randn_like(self.key)
        self.out = torch.empty_like(self.query)
        self.kernels = cpu_kernels if cpu_kernels.library() is not None else torch_kernels
        self.memory = LayerMemory.take(page, shape.kv_heads, load.batch, 0, shape.torch_dtype)
        self.memory.residual.copy_(self._random(*self.memory.residual.shape))
        self.state = torch.full((order.numel(),), SEALED, dtype=torch.int32)
        self._fill()

    def _random(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator).to(self.shape.torch_dtype)

    def _fill(self) -> None:
        """Seal all blocks, and leave the last one of each sequence raw."""
        shape = (self.table.numel(), self.shape.kv_heads, self.page.bytes)
        self.memory.cache = torch.zeros(shape, dtype=torch.uint8)
        self.kernels.seal(self.memory, self._seals(list(range(self.table.numel()))))
        self.state[self.table[:, -1].long()] = RAW - torch.arange(
            self.load.batch, dtype=torch.int32
        )

    def _seals(self, blocks: list[int]) -> Seals:
        n = len(blocks)
        score = torch.rand(self.memory.residual_sums.shape, generator=self.generator)
        self.memory.residual_sums.copy_(score)
        source = [RAW - i % self.load.batch for i in range(n)]
        weight = torch.ones(n, self.page.block_size).numpy()
        return Seals.of(blocks, source, [0] * n, list(weight))

    def packed(self) -> Callable[[], None]:
        """Return a decode step over packed pages and an unfilled block."""
        n = self.load.batch
        ints = torch.ones(n, dtype=torch.int32)
        batch = Batch(
            start=torch.arange(n, dtype=torch.int32),
            length=ints,
            position=ints * (self.load.context - 1),
            block_table=self.table,
            state=self.state,
            residual_row=torch.arange(n, dtype=torch.int32),
            score_from=ints * 0,
            reset=ints * 0,
            probe_start=torch.zeros(n + 1, dtype=torch.int32),
            probe=torch.zeros(0, dtype=torch.int32),
        )

        def run() -> None:
            self.kernels.write(self.memory, self.key, self.value, batch)
            self.kernels.attend(
                self.memory, self.query, self.key, self.value, self.out, batch, self.scale
            )

        return run

    def sealing(self) -> Callable[[], None]:
        """Return what happens once in as many steps as a block has tokens."""
        block = int(self.table[0, -1])
        seals = self._seals([block])
        return lambda: self.kernels.seal(self.memory, seals)

    def stock(self) -> Callable[[], None]:
        """Return the stock kernel's step, its schedule made beforehand as in a server."""
        from vllm._custom_ops import (
            cpu_attention_with_kv_cache,
            cpu_attn_get_scheduler_metadata,
        )
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        shape, n = self.shape, self.load.batch
        isa = _get_attn_isa(shape.torch_dtype, shape.block_size, shape.head_size)
        starts = torch.arange(n + 1, dtype=torch.int32)
        seq_lens = torch.full((n,), self.load.context, dtype=torch.int32)
        schedule = cpu_attn_get_scheduler_metadata(
            num_reqs=n, num_heads=shape.heads, num_kv_heads=shape.kv_heads,
            head_dim=shape.head_size, seq_lens=seq_lens, dtype=shape.torch_dtype,
            query_start_loc=starts, causal=True, sliding_window_size=-1, isa=isa,
            enable_kv_split=True,
        )  # fmt: skip
        size = (self.table.numel(), shape.kv_heads, 2 * shape.block_size, shape.head_size)
        keys, values = self._random(*size).chunk(2, dim=2)
        return lambda: cpu_attention_with_kv_cache(
            query=self.query, key_cache=keys, value_cache=values, output=self.out,
            query_start_loc=starts, seq_lens=seq_lens, scale=self.scale, causal=True,
            alibi_slopes=None, sliding_window=-1, block_table=self.table, softcap=0.0,
            scheduler_metadata=schedule, s_aux=None,
        )  # fmt: skip
