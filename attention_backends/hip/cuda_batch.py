"""A batch on CUDA: which of its rows are sparse, and which pruning stages are due for them.

Which rows are sparse is known on the host. Which stages are due is found on the device, and no step
waits for it: see `mask_cache`.

Steps in which every request decodes one token are replayed as CUDA graphs where vLLM captures such.
What the layers read is then described in buffers of fixed shape at fixed places: every row of the
batch has a query block, which is empty where the stock kernel serves the row.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch

from vllm_plugins.attention_backends.hip.batch import BatchPlanner, Rows
from vllm_plugins.attention_backends.hip.mask_cache import UNKNOWN, MaskCache
from vllm_plugins.attention_backends.hip.meter import BatchMeter
from vllm_plugins.attention_backends.hip.query_blocks import DENSE, QueryBlocks, concatenate
from vllm_plugins.attention_backends.hip.triton_kernels.blocks import pack
from vllm_plugins.attention_backends.hip.worker import hip_options
from vllm_plugins.engine.host_copy import HostCopy

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

    from vllm_plugins.attention_backends.hip.plugin import HipOptions


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


def decode_queries(config: VllmConfig) -> int:
    """Return the most tokens of a request in a decode step: one, and the drafts to verify."""
    drafts = config.speculative_config
    return 1 + (drafts.num_speculative_tokens if drafts is not None else 0)


def rows_of_graphs(config: VllmConfig) -> int:
    """Return the most requests of a step that may be replayed as a CUDA graph; 0 without any.

    With drafts to verify, graphs are of steps with several tokens of a request: those stay eager.
    """
    compilation = config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is None or not mode.has_full_cudagraphs() or decode_queries(config) > 1:
        return 0
    # vLLM pads batches up to a size that it has captured.
    return max(config.scheduler_config.max_num_seqs, compilation.max_cudagraph_capture_size or 0)


class DevicePlanner:
    """Finds the sparse rows of each batch, and the stages that are due for them.

    Args:
        config: The engine's configuration.
        layers: Names of the layers that it is for.
        block_size: Tokens of a cache block.
        device: Of the kernels.
    """

    def __init__(
        self, config: VllmConfig, layers: Sequence[str], block_size: int, device: torch.device
    ) -> None:
        self._options: HipOptions = hip_options(config)
        self._block_size, self._device = block_size, device
        self._queries = decode_queries(config)
        rows, graphs = config.scheduler_config.max_num_seqs, rows_of_graphs(config)
        self._cache = MaskCache(rows, self._queries, self._options.refresh, device)
        # What a graph has read once it reads always: of each row its query block, and the length
        # of which the stock kernel is told.
        self._blocks = torch.zeros(
            graphs, len(fields(QueryBlocks)), dtype=torch.int32, device=device
        )
        self._lengths = torch.zeros(graphs, dtype=torch.int32, device=device)
        self._prompts = BatchPlanner(self._options, 1, 1)
        self._meter = _LateMeter(config, layers, len(self._options.stages))

    def plan(
        self, batch: CommonAttentionMetadata, stock: FlashAttentionMetadata, is_counting: bool
    ) -> SparseRows | None:
        """Find a batch's sparse rows.

        Args:
            batch: vLLM's description of it.
            stock: The stock builder's.
            is_counting: Whether metrics count it (`worker.SparseBuilder`).

        Returns:
            The sparse rows, or None if the stock kernel serves all of them.
        """
        host = _host_rows(batch)
        if len(self._blocks) and batch.max_query_len == 1:
            return self._plan_graph(batch, stock, host, is_counting)
        decoding = ~host.prefilling & (host.length > 0) & (host.length <= self._queries)
        sparse = decoding & self._is_sparse(host.position + host.length)
        prompts = self._prompts.plan(_prompts_of(host, decoding))[1]
        served = sparse.clone()
        served[prompts.row[prompts.level != DENSE].long()] = True
        decodes = self._decodes(batch, sparse)
        if is_counting:
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

    def _plan_graph(
        self,
        batch: CommonAttentionMetadata,
        stock: FlashAttentionMetadata,
        host: Rows,
        is_counting: bool,
    ) -> SparseRows | None:
        """Describe a step of single tokens where a graph reads it, in whatever graph that is.

        A prompt's last token may be such a step; it is dense, whatever ``phases`` says.
        """
        n, has_tokens = batch.num_reqs, host.length > 0
        if self._options.phases == "prefill":
            # No row ever is sparse: graphs are stock's, without kernels that find nothing to do.
            if is_counting:
                self._meter.count(None, _whole(host, has_tokens), _nothing(host))
            return None
        sparse = has_tokens & ~host.prefilling & self._is_sparse(host.position + host.length)
        mask = _to_device(sparse, self._device)
        blocks, lengths = self._blocks[:n], self._lengths[:n]
        blocks.copy_(self._query_blocks(batch, torch.arange(n, device=self._device), mask))
        own = batch.query_start_loc[1 : n + 1] - batch.query_start_loc[:n]
        lengths.copy_(torch.where(mask, own, stock.seq_lens[:n]))
        if is_counting:
            self._meter.count(blocks, _whole(host, has_tokens & ~sparse), _nothing(host))
        rest = copy.copy(stock)
        rest.seq_lens, rest.scheduler_metadata = lengths, None
        return SparseRows(decodes=blocks, prompts=None, max_len=stock.max_seq_len, rest=rest)

    def _is_sparse(self, end: torch.Tensor) -> torch.Tensor:
        if self._options.phases not in ("decode", "both"):
            return torch.zeros_like(end, dtype=torch.bool)
        return end > self._options.dense_threshold

    def _decodes(self, batch: CommonAttentionMetadata, chosen: torch.Tensor) -> torch.Tensor | None:
        """Return the query blocks of decodes; only which rows are chosen comes from the host."""
        # Without any, the step still counts: its prompts may write where a request was that ended.
        row = _to_device(chosen.nonzero().flatten(), self._device)
        blocks = self._query_blocks(batch, row, torch.ones_like(row).bool())
        return blocks if len(row) else None

    def _query_blocks(
        self, batch: CommonAttentionMetadata, row: torch.Tensor, sparse: torch.Tensor
    ) -> torch.Tensor:
        """Return the query blocks of rows, empty ones of those that are not sparse."""
        size = self._block_size
        start = batch.query_start_loc[row].to(torch.int32)
        length = batch.query_start_loc[row + 1].to(torch.int32) - start
        position = batch.seq_lens[row].to(torch.int32) - length
        last = (position - 1).clamp(min=0)
        before = batch.block_table_tensor[row, last // size].long() * size + last % size
        # Of padding there is no token before, nor of a sequence's first.
        before = torch.where((length > 0) & (position > 0), before, UNKNOWN)
        offset = torch.arange(self._queries, device=self._device)
        token = (start[:, None] + offset).clamp(max=len(batch.slot_mapping) - 1)
        slots = torch.where(offset < length[:, None], batch.slot_mapping[token], UNKNOWN)
        kept_row, level = self._cache.step(before, slots, position, sparse, batch.slot_mapping)
        length = torch.where(sparse, length, 0)
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
    prefilling = length > 1
    if batch.is_prefilling is not None:
        # The second model runner says nothing of the rows that pad a graph's batch.
        prefilling = torch.zeros_like(prefilling)
        prefilling[: len(batch.is_prefilling)] = batch.is_prefilling[:n]
    assert batch.seq_lens_cpu_upper_bound is not None
    return Rows(
        start=start[:-1],
        length=length,
        position=batch.seq_lens_cpu_upper_bound[:n].to(torch.int32) - length,
        prefilling=prefilling,
        # Both are on the device.
        block_table=torch.empty((n, 1), dtype=torch.int32),
        slots=torch.empty(1, dtype=torch.int64),
        block_size=1,
    )


def _prompts_of(rows: Rows, decoding: torch.Tensor) -> Rows:
    length = rows.length.masked_fill(decoding, 0)
    return replace(rows, length=length, prefilling=torch.ones_like(decoding))


def _nothing(rows: Rows) -> QueryBlocks:
    return _whole(rows, torch.zeros_like(rows.prefilling))


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
        layers: Names of the layers whose batches these are.
        num_stages: The level at which no stage runs.
    """

    def __init__(self, config: VllmConfig, layers: Sequence[str], num_stages: int) -> None:
        self._meter, self._num_stages = BatchMeter(config, layers), num_stages
        self._waiting: deque[tuple[HostCopy | None, QueryBlocks, QueryBlocks]] = deque()

    def count(self, decodes: torch.Tensor | None, dense: QueryBlocks, prompts: QueryBlocks) -> None:
        """Count a batch, now or later: its sparse decodes, its dense ones and its prompts."""
        here = HostCopy(decodes) if decodes is not None else None
        self._waiting.append((here, dense, prompts))
        while self._waiting and (self._waiting[0][0] is None or self._waiting[0][0].is_here()):
            copied, dense, prompts = self._waiting.popleft()
            parts = [dense]
            if copied is not None:
                found = torch.from_numpy(copied.arrays()[0])
                # The second column is the length: rows of a graph may be empty.
                parts.append(QueryBlocks(*found[found[:, 1] > 0].unbind(dim=1)))
            self._meter.count(concatenate(parts), prompts, self._num_stages)
