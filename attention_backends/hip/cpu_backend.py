"""HiP on CPU: vLLM's own CPU backend with other keys in its sparse layers.

Dense layers are the stock ones. A sparse layer keeps its keys in plain rows: the stock kernel's
order within a cache block would make every key that is read alone cost sixteen.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_plugins.attention_backends.hip import cpu_kernels, torch_attention
from vllm_plugins.attention_backends.hip.batch import BatchPlanner, Rows
from vllm_plugins.attention_backends.hip.meter import BatchMeter
from vllm_plugins.attention_backends.hip.plan import LayerPlan
from vllm_plugins.attention_backends.hip.query_blocks import QueryBlocks, concatenate
from vllm_plugins.attention_backends.hip.selection import NONE
from vllm_plugins.attention_backends.hip.worker import (
    SparseBuilder,
    SparseLayer,
    hip_options,
    sparse_layers,
)


class HipCpuBackend(CPUAttentionBackend):
    """Stands in for ``CPU_ATTN``."""

    @staticmethod
    def get_impl_cls() -> type[HipCpuImpl]:
        """Return the layers' part."""
        return HipCpuImpl

    @staticmethod
    def get_builder_cls() -> type[HipCpuMetadataBuilder]:
        """Return what describes a batch to the layers."""
        return HipCpuMetadataBuilder

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Selections are causal."""
        return False


@dataclass
class HipCpuMetadata(CPUAttentionMetadata):
    """A batch, and its query blocks, where a layer of the group is sparse."""

    query_blocks: QueryBlocks | None = None


class HipCpuMetadataBuilder(SparseBuilder, CPUAttentionMetadataBuilder):
    """Describes batches; remembers how old what is kept of each request is."""

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.is_counting, self._planner = False, None
        if set(layer_names) & set(sparse_layers(vllm_config)):
            drafts = vllm_config.speculative_config
            options = hip_options(vllm_config)
            self._num_stages = len(options.stages)
            self._meter = BatchMeter(vllm_config, layer_names)
            self._planner = BatchPlanner(
                options,
                vllm_config.scheduler_config.max_num_seqs,
                1 + (drafts.num_speculative_tokens if drafts is not None else 0),
            )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> HipCpuMetadata:
        """Describe a batch as the stock builder does, and cut it into query blocks."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        values = {f.name: getattr(stock, f.name) for f in fields(stock)}
        if self._planner is None:
            return HipCpuMetadata(**values)
        decodes, prompts = self._planner.plan(_rows(common_attn_metadata, self.block_size))
        if self.is_counting:
            self._meter.count(decodes, prompts, self._num_stages)
        return HipCpuMetadata(**values, query_blocks=concatenate([decodes, prompts]))


def _rows(batch: CommonAttentionMetadata, block_size: int) -> Rows:
    n = batch.num_reqs
    start = batch.query_start_loc[: n + 1].to(torch.int32)
    length = start.diff()
    prefilling = batch.is_prefilling
    return Rows(
        start=start[:-1],
        length=length,
        position=batch.seq_lens[:n].to(torch.int32) - length,
        prefilling=length > 1 if prefilling is None else prefilling[:n],
        block_table=batch.block_table_tensor,
        slots=batch.slot_mapping,
        block_size=block_size,
    )


class HipCpuImpl(SparseLayer, CPUAttentionBackendImpl):
    """One layer; stock until `make_sparse`."""

    plan: LayerPlan | None = None
    _kept: list[torch.Tensor]

    def make_sparse(self, plan: LayerPlan, max_num_seqs: int) -> None:
        """Attend sparsely from now on, and take the memory for what is kept of requests."""
        self.plan = plan
        shape = [(max_num_seqs, stage.keep_chunks) for stage in plan.stages]
        self._kept = [torch.full(x, NONE, dtype=torch.int32) for x in shape]

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: HipCpuMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; arguments are those of the stock layer."""
        if self.plan is None or attn_metadata is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
                output_block_scale,
            )  # fmt: skip
        assert attn_metadata.query_blocks is not None
        # Without kernels built, the same in torch.
        path = cpu_kernels if cpu_kernels.library() is not None else torch_attention
        path.attention(
            query,
            output,
            cpu_kernels.Paged(_rows_of_blocks(kv_cache), attn_metadata.block_table),
            attn_metadata.query_blocks,
            self.plan,
            self._kept,
            self.scale,
        )
        return output

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write keys and values; a sparse layer keeps both in plain rows."""
        if self.plan is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        cache = _rows_of_blocks(kv_cache)
        size = cache.shape[2] // 2
        n = slot_mapping.shape[0]
        key, value, real = key[:n], value[:n], slot_mapping >= 0
        # A batch that stands in for no request's writes nowhere.
        if not real.all():
            key, value, slot_mapping = key[real], value[real], slot_mapping[real]
        block, offset = slot_mapping // size, slot_mapping % size
        cache[block, :, offset] = key
        cache[block, :, offset + size] = value


def _rows_of_blocks(kv_cache: torch.Tensor) -> torch.Tensor:
    """View a layer's cache as keys, then values, of each block and head."""
    blocks, heads, size, width = kv_cache.shape
    return kv_cache.view(blocks, heads, size * 2, width // 2)
