"""HiP on CUDA: vLLM's FlashAttention, with other kernels for the rows that are sparse.

In a sparse layer the stock kernel still serves the rows of a batch that are dense. Rows that HiP
serves are shown to it as sequences of nothing but their own queries, which cost it next to nothing,
and are then written over: so rows may come in any order, and nothing is gathered or scattered.

What a batch's rows are told is found in `cuda_batch`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from vllm_plugins.attention_backends.cuda import CausalCudaBackend
from vllm_plugins.attention_backends.hip.cuda_batch import (
    DevicePlanner,
    SparseRows,
    decode_queries,
)
from vllm_plugins.attention_backends.hip.plan import QUERY_BLOCK, LayerPlan
from vllm_plugins.attention_backends.hip.selection import NONE
from vllm_plugins.attention_backends.hip.triton_kernels import ops
from vllm_plugins.attention_backends.hip.triton_kernels.blocks import Batch
from vllm_plugins.attention_backends.hip.triton_kernels.decode import num_splits
from vllm_plugins.attention_backends.hip.worker import SparseBuilder, SparseLayer, sparse_layers


class HipCudaBackend(CausalCudaBackend):
    """FlashAttention, with sparse layers."""

    @staticmethod
    def get_impl_cls() -> type[HipCudaImpl]:
        """Return the layers' part."""
        return HipCudaImpl

    @staticmethod
    def get_builder_cls() -> type[HipCudaMetadataBuilder]:
        """Return what describes a batch to the layers."""
        return HipCudaMetadataBuilder


@dataclass
class HipCudaMetadata(FlashAttentionMetadata):
    """A batch, and its sparse rows, if it has any."""

    sparse: SparseRows | None = None


class HipCudaMetadataBuilder(SparseBuilder, FlashAttentionMetadataBuilder):
    """Describes batches; remembers how old what is kept of each request is."""

    # Of other steps different kernels run from batch to batch; graphs are captured around those.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    # What is kept of a request is found by its slots, which differ between groups of layers.
    supports_update_block_table = False

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.is_counting, self._planner = False, None
        if set(layer_names) & set(sparse_layers(vllm_config)):
            self._planner = DevicePlanner(
                vllm_config, layer_names, self.block_size, torch.device(device)
            )
            # Selections of drafting steps would not follow.
            self.supports_draft_decode_metadata_update = False

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> HipCudaMetadata:
        """Describe a batch as the stock builder does, and find its sparse rows."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        values = {f.name: getattr(stock, f.name) for f in fields(stock)}
        sparse = None
        if self._planner is not None:
            sparse = self._planner.plan(common_attn_metadata, stock, self.is_counting)
        return HipCudaMetadata(**values, sparse=sparse)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> HipCudaMetadata:
        """Describe a batch whose graph serves sequences of every length."""
        built = self.build(0, common_attn_metadata)
        if built.sparse is not None and built.sparse.rest is not None:
            longest = self.model_config.max_model_len
            built.sparse.rest.max_seq_len = longest
            built.sparse = replace(built.sparse, max_len=longest)
        return built

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Tell vLLM up to 0.31 that all rows attend to their whole sequence by themselves."""
        return False


class HipCudaImpl(SparseLayer, FlashAttentionImpl):
    """One layer; stock until `make_sparse`."""

    plan: LayerPlan | None = None
    _kept: list[torch.Tensor]
    _max_num_seqs: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._queries = decode_queries(get_current_vllm_config())

    def make_sparse(self, plan: LayerPlan, max_num_seqs: int) -> None:
        """Attend sparsely from now on, and take the memory for what is kept of requests."""
        self.plan, self._max_num_seqs = plan, max_num_seqs
        device = current_platform.device_type
        self._kept = [
            torch.full((max_num_seqs, x.keep_chunks), NONE, dtype=torch.int32, device=device)
            for x in plan.stages
        ]

    def warm_up(self, kv_cache: torch.Tensor, max_len: int, phases: str) -> None:
        """Launch every kernel on an empty query block, so that no request waits for a compiler."""
        plan, device = self.plan, kv_cache.device
        assert plan is not None
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        query = keys.new_zeros(1, self.num_heads, self.head_size)
        # Not parts of one: kernels are compiled for how pointers are aligned.
        table, blocks = (torch.zeros(1, n, dtype=torch.int32, device=device) for n in (1, 6))
        lists = [blocks.new_empty(1, x.keep_chunks) for x in plan.stages]
        if phases != "prefill":
            batch = Batch(query, keys, table, blocks, self._queries, max_len)
            ops.hip_select(batch, plan, plan.overlap, lists)
            ops.hip_decode(batch, values, lists[-1], plan, self.scale, 0, query)
        if phases != "decode":
            batch = Batch(query, keys, table, blocks, QUERY_BLOCK, max_len)
            ops.hip_select(batch, plan, 0, lists)
            ops.hip_prefill(batch, values, lists[-1], plan, self.scale, query)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: HipCudaMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; arguments are those of the stock layer, which knows no scales of outputs."""
        plan = self.plan
        if plan is not None and attn_metadata is None:
            self._show_memory(plan, query)
        sparse = attn_metadata.sparse if attn_metadata is not None else None
        if plan is None or attn_metadata is None or sparse is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
                output_block_scale,
            )  # fmt: skip
        if sparse.rest is not None:
            super().forward(layer, query, key, value, kv_cache, sparse.rest, output)
        self._attend(plan, sparse, query, kv_cache, attn_metadata.block_table, output)
        return output

    def _attend(
        self,
        plan: LayerPlan,
        sparse: SparseRows,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        if sparse.decodes is not None:
            batch = Batch(query, keys, block_table, sparse.decodes, self._queries, sparse.max_len)
            ops.hip_select(batch, plan, plan.overlap, self._kept)
            ops.hip_decode(batch, values, self._kept[-1], plan, self.scale, 0, output)
        if sparse.prompts is not None:
            # Nothing is kept of prompts: the lists live as long as this call.
            lists = [
                sparse.prompts.new_empty(len(sparse.prompts), x.keep_chunks) for x in plan.stages
            ]
            batch = Batch(query, keys, block_table, sparse.prompts, QUERY_BLOCK, sparse.max_len)
            ops.hip_select(batch, plan, 0, lists)
            ops.hip_prefill(batch, values, lists[-1], plan, self.scale, output)

    def _show_memory(self, plan: LayerPlan, query: torch.Tensor) -> None:
        """Let vLLM see, when it measures memory, what the largest decode batch needs."""
        states = self._max_num_seqs * self._queries * self.num_heads
        splits = num_splits(plan, self._queries, 0)
        query.new_empty(states * splits * (self.head_size + 1), dtype=torch.float32)
