"""HiP on CUDA: vLLM's FlashAttention, with other kernels for the rows that are sparse.

In a sparse layer the stock kernel still serves the rows of a batch that are dense. Rows that HiP
serves are shown to it as sequences of nothing but their own queries, which cost it next to nothing,
and are then written over: so rows may come in any order, and nothing is gathered or scattered.

Which rows are sparse is known on the host. Which pruning stages are due is found on the device, and
no step waits for it: see `mask_cache`.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from vllm_plugins.attention_backends.hip.batch import BatchPlanner, Rows
from vllm_plugins.attention_backends.hip.mask_cache import UNKNOWN, MaskCache
from vllm_plugins.attention_backends.hip.meter import BatchMeter
from vllm_plugins.attention_backends.hip.plan import QUERY_BLOCK, LayerPlan
from vllm_plugins.attention_backends.hip.query_blocks import DENSE, QueryBlocks, concatenate
from vllm_plugins.attention_backends.hip.selection import NONE
from vllm_plugins.attention_backends.hip.triton_kernels import ops
from vllm_plugins.attention_backends.hip.triton_kernels.blocks import Batch, pack
from vllm_plugins.attention_backends.hip.triton_kernels.decode import num_splits
from vllm_plugins.attention_backends.hip.worker import SparseLayer, hip_options
from vllm_plugins.engine.host_copy import HostCopy

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_plugins.attention_backends.hip.plugin import HipOptions


class HipCudaBackend(FlashAttentionBackend):
    """Is vLLM's ``CUSTOM`` attention backend."""

    @staticmethod
    def get_name() -> str:
        """Return vLLM's name for backends from outside."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[HipCudaImpl]:
        """Return the layers' part."""
        return HipCudaImpl

    @staticmethod
    def get_builder_cls() -> type[HipCudaMetadataBuilder]:
        """Return what describes a batch to the layers."""
        return HipCudaMetadataBuilder

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Selections are causal."""
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Selections are causal."""
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        """Selections know one window."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """The stock kernel's settings for it are not tested with sparse rows."""
        return False


@dataclass(frozen=True)
class SparseRows:
    """The rows of a batch that are sparse in sparse layers.

    Attributes:
        decodes: Query blocks of decodes on the device, as of `blocks.pack`, or None.
        prompts: Those of prompts, some of which may be dense, or None; each has a list row of its
            own.
        max_len: Upper bound of the sequences' lengths.
        rest: What the stock kernel is told about the other rows, or None if there are none.
    """

    decodes: torch.Tensor | None
    prompts: torch.Tensor | None
    max_len: int
    rest: FlashAttentionMetadata | None


@dataclass
class HipCudaMetadata(FlashAttentionMetadata):
    """A batch, and its sparse rows, if it has any."""

    sparse: SparseRows | None = None


def decode_queries(config: VllmConfig) -> int:
    """Return the most tokens of a request in a decode step: one, and the drafts to verify."""
    drafts = config.speculative_config
    return 1 + (drafts.num_speculative_tokens if drafts is not None else 0)


class HipCudaMetadataBuilder(FlashAttentionMetadataBuilder):
    """Describes batches; remembers how old what is kept of each request is."""

    # Which kernels run differs from batch to batch; graphs are captured around attention.
    _cudagraph_support = AttentionCGSupport.NEVER
    # What is kept of a request is found by its slots, which differ between groups of layers.
    supports_update_block_table = False

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        plans = (getattr(layers[name].impl, "plan", None) for name in layer_names)
        self._planner = None
        if any(plan is not None for plan in plans):
            self._planner = DevicePlanner(vllm_config, self.block_size, torch.device(device))
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
            sparse = self._planner.plan(common_attn_metadata, stock)
        return HipCudaMetadata(**values, sparse=sparse)

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Tell vLLM up to 0.31 that all rows attend to their whole sequence by themselves."""
        return False


class DevicePlanner:
    """Finds the sparse rows of each batch, and the stages that are due for them.

    Args:
        config: The engine's configuration.
        block_size: Tokens of a cache block.
        device: Of the kernels.
    """

    def __init__(self, config: VllmConfig, block_size: int, device: torch.device) -> None:
        self._options: HipOptions = hip_options(config)
        self._block_size, self._device = block_size, device
        self._queries = decode_queries(config)
        self._cache = MaskCache(
            config.scheduler_config.max_num_seqs, self._queries, self._options.refresh, device
        )
        self._prompts = BatchPlanner(self._options, 1, 1)
        self._meter = _LateMeter(config, len(self._options.stages))

    def plan(
        self, batch: CommonAttentionMetadata, stock: FlashAttentionMetadata
    ) -> SparseRows | None:
        """Find a batch's sparse rows.

        Args:
            batch: vLLM's description of it.
            stock: The stock builder's.

        Returns:
            The sparse rows, or None if the stock kernel serves all of them.
        """
        host = _host_rows(batch)
        decoding = ~host.prefilling & (host.length > 0) & (host.length <= self._queries)
        sparse = decoding & self._is_sparse(host.position + host.length)
        prompts = self._prompts.plan(_prompts_of(host, decoding))[1]
        served = sparse.clone()
        served[prompts.row[prompts.level != DENSE].long()] = True
        decodes = self._decodes(batch, sparse)
        self._meter.count(decodes, _whole(host, decoding & ~sparse), prompts)
        if not served.any():
            return None
        mine = QueryBlocks(*(x[served[prompts.row.long()]] for x in vars(prompts).values()))
        mine = replace(mine, kept_row=torch.arange(len(mine), dtype=torch.int32))
        return SparseRows(
            decodes=decodes,
            prompts=_to_device(pack(mine), self._device) if len(mine) else None,
            max_len=stock.max_seq_len,
            rest=self._rest(batch, stock, host, served),
        )

    def _is_sparse(self, end: torch.Tensor) -> torch.Tensor:
        if self._options.phases not in ("decode", "both"):
            return torch.zeros_like(end, dtype=torch.bool)
        return end > self._options.dense_threshold

    def _decodes(self, batch: CommonAttentionMetadata, chosen: torch.Tensor) -> torch.Tensor | None:
        """Return the query blocks of decodes; only which rows are chosen comes from the host."""
        # Without any, the step still counts: nothing is kept of requests that are not in a batch.
        row, size = _to_device(chosen.nonzero().flatten(), self._device), self._block_size
        start = batch.query_start_loc[row].to(torch.int32)
        length = batch.query_start_loc[row + 1].to(torch.int32) - start
        position = batch.seq_lens[row].to(torch.int32) - length
        last = position - 1
        before = batch.block_table_tensor[row, last // size].long() * size + last % size
        offset = torch.arange(self._queries, device=self._device)
        token = (start[:, None] + offset).clamp(max=len(batch.slot_mapping) - 1)
        slots = torch.where(offset < length[:, None], batch.slot_mapping[token], UNKNOWN)
        kept_row, level = self._cache.step(before, slots, position, torch.ones_like(row).bool())
        if len(row) == 0:
            return None
        return pack(QueryBlocks(start, length, row.to(torch.int32), position, level, kept_row))

    def _rest(
        self,
        batch: CommonAttentionMetadata,
        stock: FlashAttentionMetadata,
        host: Rows,
        served: torch.Tensor,
    ) -> FlashAttentionMetadata | None:
        """Return what the stock kernel is told: of rows that are served elsewhere, nothing."""
        others = ~served & (host.length > 0)
        if not others.any():
            return None
        rest, n = copy.copy(stock), len(served)
        own = batch.query_start_loc[1 : n + 1] - batch.query_start_loc[:n]
        mask = _to_device(served, self._device)
        rest.seq_lens = torch.where(mask, own, stock.seq_lens[:n]).to(stock.seq_lens.dtype)
        longest = torch.where(served, host.length, host.position + host.length)
        rest.max_seq_len = int(longest.max())
        # It was made for other lengths; without it the kernel makes its own.
        rest.scheduler_metadata = None
        return rest


def _host_rows(batch: CommonAttentionMetadata) -> Rows:
    """Return a batch's rows; the lengths of decodes are bounds while drafts are being judged."""
    n = batch.num_reqs
    start = batch.query_start_loc_cpu[: n + 1].to(torch.int32)
    length = start.diff()
    prefilling = batch.is_prefilling
    assert batch.seq_lens_cpu_upper_bound is not None
    return Rows(
        start=start[:-1],
        length=length,
        position=batch.seq_lens_cpu_upper_bound[:n].to(torch.int32) - length,
        prefilling=length > 1 if prefilling is None else prefilling[:n],
        # Both are on the device.
        block_table=torch.empty((n, 1), dtype=torch.int32),
        slots=torch.empty(1, dtype=torch.int64),
        block_size=1,
    )


def _prompts_of(rows: Rows, decoding: torch.Tensor) -> Rows:
    length = rows.length.masked_fill(decoding, 0)
    return replace(rows, length=length, prefilling=torch.ones_like(decoding))


def _whole(rows: Rows, chosen: torch.Tensor) -> QueryBlocks:
    """Return dense rows as one query block each."""
    row = chosen.nonzero().flatten().to(torch.int32)
    dense = torch.full_like(row, DENSE)
    return QueryBlocks(
        rows.start[chosen], rows.length[chosen], row, rows.position[chosen], dense, dense
    )


def _to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Send values to the device without waiting."""
    pinned = values.pin_memory() if device.type == "cuda" else values
    return pinned.to(device, non_blocking=True)


class _LateMeter:
    """Counts batches once the device's part of them has arrived.

    Args:
        config: The engine's configuration.
        num_stages: The level at which no stage runs.
    """

    def __init__(self, config: VllmConfig, num_stages: int) -> None:
        self._meter, self._num_stages = BatchMeter(config), num_stages
        self._waiting: deque[tuple[HostCopy | None, QueryBlocks, QueryBlocks]] = deque()

    def count(self, decodes: torch.Tensor | None, dense: QueryBlocks, prompts: QueryBlocks) -> None:
        """Count a batch, now or later: its sparse decodes, its dense ones and its prompts."""
        here = HostCopy(decodes) if decodes is not None else None
        self._waiting.append((here, dense, prompts))
        while self._waiting and (self._waiting[0][0] is None or self._waiting[0][0].is_here()):
            copied, dense, prompts = self._waiting.popleft()
            parts = [dense]
            if copied is not None:
                columns = torch.from_numpy(copied.arrays()[0]).unbind(dim=1)
                parts.append(QueryBlocks(*columns))
            self._meter.count(concatenate(parts), prompts, self._num_stages)


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
