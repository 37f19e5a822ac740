"""ZipCache on CUDA: packed pages with Triton kernels; skipped layers stay FlashAttention's.

Nothing that a step does to blocks is asked of the device. The builder says how many tokens the rows
of a batch have, which the host knows; which request a row is, where its blocks are and what becomes
of them the kernels read from tables (`block_tables`). So decode steps are captured in graphs, whose
replays find each step's lengths and states where they were.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_plugins.attention_backends.cuda import CausalCudaBackend
from vllm_plugins.attention_backends.zipcache.batch import RAW, LayerMemory, Seals
from vllm_plugins.attention_backends.zipcache.block_tables import BlockTables, to_device
from vllm_plugins.attention_backends.zipcache.blocks import BlockLife
from vllm_plugins.attention_backends.zipcache.packed import PackedPages, packed_backend
from vllm_plugins.attention_backends.zipcache.triton_kernels import ops
from vllm_plugins.attention_backends.zipcache.triton_kernels.batches import DeviceBatch, Workspace
from vllm_plugins.attention_backends.zipcache.triton_kernels.decode import num_splits
from vllm_plugins.attention_backends.zipcache.triton_kernels.prefill import tile_tokens
from vllm_plugins.attention_backends.zipcache.worker import PackedLayer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.config import VllmConfig
    from vllm.platforms.interface import DeviceCapability


class ZipCacheCudaBackend(CausalCudaBackend):
    """FlashAttention, until a layer is packed."""

    @staticmethod
    def get_impl_cls() -> type[ZipCacheCudaImpl]:
        """Return the layers' part."""
        return ZipCacheCudaImpl

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        """The kernels' matrix products in bfloat16 need Ampere."""
        return capability.major >= 8

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Blocks that are not sealed yet lie where a connector does not look."""
        return False


class PackedCudaBackend(PackedPages, ZipCacheCudaBackend):
    """The backend of packed layers."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return the layout in which a KV head's page is one record of bytes."""
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """Return what describes a batch to the layers."""
        return ZipCacheCudaMetadataBuilder


@dataclass(frozen=True)
class ZipCacheCudaMetadata:
    """A batch, as the packed layers' kernels are told of it."""

    batch: DeviceBatch


class ZipCacheCudaMetadataBuilder(AttentionMetadataBuilder[ZipCacheCudaMetadata]):
    """Describes batches; the listener sets `tables`, until then no block is anybody's."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    life: BlockLife | None = None

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        scheduler = vllm_config.scheduler_config
        self._rows = torch.arange(scheduler.max_num_seqs, dtype=torch.int32, device=device)
        self._block_size = kv_cache_spec.block_size
        layers = vllm_config.compilation_config.static_forward_context
        impl = layers[layer_names[0]].impl
        self._tile = tile_tokens(impl.num_heads // impl.num_kv_heads)
        # Measuring memory captures graphs before there is a cache; they read the block of padding.
        self.tables = BlockTables(1, 1, torch.device(device))

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ZipCacheCudaMetadata:
        """Describe a batch; nothing is asked of the device."""
        return ZipCacheCudaMetadata(
            make_batch(common_attn_metadata, self.tables, self._rows, self._tile, self._block_size)
        )


def make_batch(
    common: CommonAttentionMetadata,
    tables: BlockTables,
    rows: torch.Tensor,
    tile: int,
    block_size: int,
) -> DeviceBatch:
    """Return what the kernels are told about a batch.

    Args:
        common: vLLM's description.
        tables: The blocks, in this step.
        rows: int32, 0 to the most rows of a batch, on the device.
        tile: Queries of a tile of a prompt.
        block_size: Tokens of a block.
    """
    n = common.num_reqs
    length = common.query_start_loc_cpu[: n + 1].diff()
    prompts = (length > 1).nonzero().flatten()
    has_prompts, device = len(prompts) > 0, tables.device
    return DeviceBatch(
        query_start=common.query_start_loc[: n + 1],
        seq_lens=common.seq_lens[:n],
        block_table=common.block_table_tensor,
        slots=common.slot_mapping,
        state=tables.state,
        parts=tables.parts,
        probes=tables.probes,
        rows=rows,
        prompts=to_device(prompts.to(torch.int32), device) if has_prompts else None,
        tiles=to_device(_tiles(prompts, length, tile), device) if has_prompts else None,
        longest=common.max_query_len,
        blocks=-(-common.max_seq_len // block_size),
        single=bool((length == 1).any()),
    )


def _tiles(prompts: torch.Tensor, length: torch.Tensor, tokens: int) -> torch.Tensor:
    """Cut rows into tiles, the last of each first: they see most keys.

    Args:
        prompts: Rows.
        length: Tokens of all rows.
        tokens: Of a tile.

    Returns:
        Row and first token of each tile, int32, shape (tiles, 2).
    """
    counts = (length[prompts] + tokens - 1) // tokens
    row = prompts.repeat_interleave(counts)
    before = (counts.cumsum(0) - counts).repeat_interleave(counts)
    number = torch.arange(len(row)) - before
    order = number.argsort(descending=True, stable=True)
    return torch.stack([row, number * tokens], dim=1)[order].to(torch.int32)


class ZipCacheCudaImpl(PackedLayer, FlashAttentionImpl):
    """One layer; stock until `pack`."""

    memory: LayerMemory | None = None
    space: Workspace

    def pack(self, memory: LayerMemory) -> None:
        """Keep packed pages from now on."""
        self.memory = memory

    @staticmethod
    def share(layers: Sequence[Any], config: VllmConfig) -> int:
        """Take what layers of one shape use one after the other."""
        spaces: dict[tuple[int, int, int], Workspace] = {}
        scheduler = config.scheduler_config
        for layer in layers:
            shape = layer.num_heads, layer.num_kv_heads, layer.head_size
            if shape not in spaces:
                splits = num_splits(layer.num_kv_heads, config.model_config.max_model_len)
                spaces[shape] = Workspace.take(
                    scheduler.max_num_seqs, scheduler.max_num_batched_tokens, *shape, splits,
                    layer.memory.residual.device,
                )  # fmt: skip
            layer.space = spaces[shape]
        return sum(space.bytes for space in spaces.values())

    @staticmethod
    def tables(num_blocks: int, config: VllmConfig, device: torch.device) -> BlockTables:
        """Make what the kernels read of blocks."""
        return BlockTables(num_blocks, config.scheduler_config.max_num_batched_tokens, device)

    @staticmethod
    def backend(
        bits: str, salient_ratio: float, key_salient_ratio: float | None
    ) -> type[PackedPages]:
        """Return the backend that asks vLLM for such pages."""
        return packed_backend(PackedCudaBackend, bits, salient_ratio, key_salient_ratio)

    def use_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the layer's pages, uint8, shape (blocks, kv heads, N, bytes of a token)."""
        assert self.memory is not None
        self.memory.cache = kv_cache.view(*kv_cache.shape[:2], -1)

    def warm_up(self) -> None:
        """Launch every kernel on nothing, so that no request waits for a compiler."""
        memory, space = self.memory, self.space
        assert memory is not None
        device = memory.cache.device
        nothing = torch.zeros(2, dtype=torch.int32, device=device)
        tables = BlockTables(1, 1, device)
        batch = DeviceBatch(
            query_start=nothing,
            seq_lens=nothing[:1],
            block_table=nothing.view(1, 2),
            slots=nothing.long() - 1,
            state=tables.state,
            parts=tables.parts,
            probes=tables.probes,
            rows=nothing,
            prompts=nothing[:1],
            tiles=nothing.view(1, 2),
            longest=1,
            blocks=1,
            single=True,
        )
        query, key = (
            torch.zeros(1, n, self.head_size, dtype=memory.residual.dtype, device=device)
            for n in (self.num_heads, self.num_kv_heads)
        )
        if memory.transform is not None:
            query, key = ops.zipcache_transform(memory.transform, query, key)
        ops.zipcache_write(memory, key, key, batch)
        ops.zipcache_attend(memory, query, key, key, query, batch, space, self.scale)
        if memory.page.chooses:
            ops.zipcache_score(memory, query, key, batch, space, self.scale)
        # The block is that of padding, in which nobody reads anything.
        block, source = nothing[:1], nothing[:1] + RAW
        weight = torch.ones(1, memory.page.block_size, device=device)
        ops.zipcache_seal(memory, Seals(block, source, block, weight))

    def seal(self, seals: Seals) -> None:
        """Apply blocks' quotas."""
        assert self.memory is not None
        ops.zipcache_seal(self.memory, seals)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write, attend and score; arguments are those of the stock layer."""
        if self.memory is None or attn_metadata is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
                output_block_scale,
            )  # fmt: skip
        batch = attn_metadata.batch
        # While memory is measured the cache is another one.
        pages = dataclasses.replace(self.memory, cache=kv_cache.view(*kv_cache.shape[:2], -1))
        if pages.transform is not None:
            query, key = ops.zipcache_transform(pages.transform, query, key)
        ops.zipcache_write(pages, key, value, batch)
        ops.zipcache_attend(pages, query, key, value, output, batch, self.space, self.scale)
        if pages.page.chooses:
            ops.zipcache_score(pages, query, key, batch, self.space, self.scale)
        return output
