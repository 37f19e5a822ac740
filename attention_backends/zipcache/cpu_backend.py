"""ZipCache on CPU: stands in for vLLM's own CPU backend, with packed pages and own kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from vllm_plugins.attention_backends.zipcache import cpu_kernels, torch_kernels
from vllm_plugins.attention_backends.zipcache.batch import Batch, LayerMemory, Seals
from vllm_plugins.attention_backends.zipcache.blocks import BlockLife, Part
from vllm_plugins.attention_backends.zipcache.packed import PackedPages, packed_backend
from vllm_plugins.attention_backends.zipcache.worker import PackedLayer


class ZipCacheCpuBackend(CPUAttentionBackend):
    """Stands in for ``CPU_ATTN``: the stock backend, until a layer is packed."""

    @staticmethod
    def get_impl_cls() -> type[ZipCacheCpuImpl]:
        """Return the layers' part."""
        return ZipCacheCpuImpl

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Blocks are sealed in the order of their tokens."""
        return False


class PackedCpuBackend(PackedPages, ZipCacheCpuBackend):
    """The backend of packed layers."""

    @staticmethod
    def get_builder_cls() -> type[ZipCacheCpuMetadataBuilder]:
        """Return what describes a batch to the layers."""
        return ZipCacheCpuMetadataBuilder


@dataclass(frozen=True)
class ZipCacheCpuMetadata:
    """A batch, as the packed layers' kernels are told of it; None for one of no requests."""

    batch: Batch | None


class ZipCacheCpuMetadataBuilder(AttentionMetadataBuilder[ZipCacheCpuMetadata]):
    """Describes batches; what becomes of blocks stands in `life`, which the listener sets."""

    life: BlockLife | None = None
    tables: None = None

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ZipCacheCpuMetadata:
        """Describe a batch with the state of its blocks."""
        # What a rank runs that has nothing to do while others have (V2).
        if common_attn_metadata.slot_mapping[0] < 0:
            return ZipCacheCpuMetadata(None)
        assert self.life is not None, "the listener makes the blocks' life with the KV cache"
        return ZipCacheCpuMetadata(make_batch(common_attn_metadata, self.life))


def make_batch(common: CommonAttentionMetadata, life: BlockLife) -> Batch:
    """Return what the kernels are told about a batch.

    Args:
        common: vLLM's description.
        life: The blocks, in this step.
    """
    n = common.num_reqs
    start = common.query_start_loc[: n + 1].to(torch.int32)
    ends, table = common.seq_lens[:n].long(), common.block_table_tensor
    # A block that is written belongs to one request: it tells which one a row is.
    last = table[torch.arange(n), (ends - 1) // life.options.block_size].tolist()
    parts = [life.part(block) for block in last]
    probes = [torch.from_numpy(part.probes) for part in parts]
    return Batch(
        start=start[:-1],
        length=start.diff(),
        position=_ints(parts, "position"),
        block_table=table,
        state=life.state,
        residual_row=_ints(parts, "row"),
        score_from=_ints(parts, "score_from"),
        reset=_ints(parts, "reset"),
        probe_start=torch.tensor([0, *map(len, probes)]).cumsum(0).to(torch.int32),
        probe=torch.cat(probes).to(torch.int32),
    )


def _ints(parts: list[Part], name: str) -> torch.Tensor:
    return torch.tensor([int(getattr(part, name)) for part in parts], dtype=torch.int32)


class ZipCacheCpuImpl(PackedLayer, CPUAttentionBackendImpl):
    """One layer; stock until `pack`."""

    memory: LayerMemory | None = None

    def pack(self, memory: LayerMemory) -> None:
        """Keep packed pages from now on."""
        self.memory = memory

    @staticmethod
    def backend(
        bits: str, salient_ratio: float, key_salient_ratio: float | None
    ) -> type[PackedPages]:
        """Return the backend that asks vLLM for such pages."""
        return packed_backend(PackedCpuBackend, bits, salient_ratio, key_salient_ratio)

    def use_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the layer's pages, uint8, shape (blocks, kv heads, N, bytes of a token)."""
        assert self.memory is not None
        self.memory.cache = kv_cache.view(*kv_cache.shape[:2], -1)

    def seal(self, seals: Seals) -> None:
        """Apply blocks' quotas."""
        assert self.memory is not None
        _kernels().seal(self.memory, seals)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: ZipCacheCpuMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write and attend; arguments are those of the stock layer."""
        if self.memory is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
                output_block_scale,
            )  # fmt: skip
        batch, kernels = attn_metadata.batch if attn_metadata is not None else None, _kernels()
        if batch is None:
            # Not what memory held: a model may choose experts by it.
            return output.fill_(0)
        if self.memory.transform is not None:
            query, key = self.memory.transform.apply(query, key)
        kernels.write(self.memory, key, value, batch)
        kernels.attend(self.memory, query, key, value, output, batch, self.scale)
        return output


def _kernels() -> Any:
    """Return the compiled kernels, or where none were built the same in torch."""
    return cpu_kernels if cpu_kernels.library() is not None else torch_kernels
