"""What ``vllm-plugins bench --kernel zipcache`` times on CUDA: one layer's decode, in graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from vllm_plugins.attention_backends.zipcache.batch import RAW, SEALED, LayerMemory, Seals
from vllm_plugins.attention_backends.zipcache.block_tables import BlockTables
from vllm_plugins.attention_backends.zipcache.triton_kernels import ops
from vllm_plugins.attention_backends.zipcache.triton_kernels.batches import DeviceBatch, Workspace
from vllm_plugins.attention_backends.zipcache.triton_kernels.decode import num_splits

if TYPE_CHECKING:
    from vllm_plugins.attention_backends.zipcache.page import PageFormat
    from vllm_plugins.bench.kernels import KernelShape, Load


class CudaLayer:
    """One layer's cache of random keys and values, packed and plain.

    Args:
        shape: The layer.
        load: Context and batch.
        page: Format of its pages.
        in_graph: Whether steps are captured, as a server's are: launching costs more than many of
            the kernels.
    """

    def __init__(
        self, shape: KernelShape, load: Load, page: PageFormat, in_graph: bool = True
    ) -> None:
        self.shape, self.load, self.page, self._in_graph = shape, load, page, in_graph
        self.scale, self.device = shape.head_size**-0.5, torch.device(shape.device)
        per_row, rows = -(-load.context // shape.block_size), load.batch
        order = torch.randperm(per_row * rows, device=self.device, dtype=torch.int32)
        self.table = order.view(rows, per_row)
        self.query = self._random(rows, shape.heads, shape.head_size)
        self.key = self._random(rows, shape.kv_heads, shape.head_size)
        self.value, self.out = torch.randn_like(self.key), torch.empty_like(self.query)
        self.memory = LayerMemory.take(
            page, shape.kv_heads, rows, 0, shape.torch_dtype, device=self.device
        )
        self.memory.residual.copy_(self._random(*self.memory.residual.shape))
        self.memory.cache = torch.zeros(
            (order.numel(), shape.kv_heads, page.bytes), dtype=torch.uint8, device=self.device
        )
        self.space = Workspace.take(
            rows, rows, shape.heads, shape.kv_heads, shape.head_size,
            num_splits(shape.kv_heads, load.context), self.device,
        )  # fmt: skip
        self.tables = BlockTables(order.numel(), 1, self.device)
        self._fill()

    def _random(self, *size: int) -> torch.Tensor:
        return torch.randn(size, device=self.device, dtype=self.shape.torch_dtype)

    def _fill(self) -> None:
        """Seal all blocks, and leave the last one of each sequence raw."""
        ops.zipcache_seal(self.memory, self._seals(self.table.flatten()))
        rows = torch.arange(self.load.batch, dtype=torch.int32, device=self.device)
        last = self.table[:, -1].long()
        self.tables.state.fill_(SEALED)
        self.tables.state[last] = RAW - rows
        self.tables.parts[last, 0] = rows

    def _seals(self, blocks: torch.Tensor) -> Seals:
        self.memory.residual_sums.uniform_()
        rows = torch.arange(len(blocks), dtype=torch.int32, device=self.device) % self.load.batch
        weight = torch.ones(len(blocks), self.page.block_size, device=self.device)
        return Seals(blocks, RAW - rows, torch.zeros_like(rows), weight)

    def _batch(self) -> DeviceBatch:
        n, context, tables = self.load.batch, self.load.context, self.tables
        size = self.page.block_size
        rows = torch.arange(n + 1, dtype=torch.int32, device=self.device)
        return DeviceBatch(
            query_start=rows,
            seq_lens=torch.full_like(rows[:n], context),
            block_table=self.table,
            slots=self.table[:, -1].long() * size + (context - 1) % size,
            state=tables.state,
            parts=tables.parts,
            probes=tables.probes,
            rows=rows[:n],
            prompts=None,
            tiles=None,
            longest=1,
            blocks=self.table.shape[1],
            single=True,
        )

    def packed(self) -> Callable[[], None]:
        """Return a decode step over packed pages and an unfilled block, without probes."""
        batch = self._batch()

        def run() -> None:
            ops.zipcache_write(self.memory, self.key, self.value, batch)
            ops.zipcache_attend(
                self.memory, self.query, self.key, self.value, self.out, batch, self.space,
                self.scale,
            )  # fmt: skip
            if self.page.chooses:
                ops.zipcache_score(self.memory, self.query, self.key, batch, self.space, self.scale)

        return self._captured(run)

    def sealing(self) -> Callable[[], None]:
        """Return what happens once in as many steps as a block has tokens."""
        seals = self._seals(self.table[:1, -1].contiguous())
        return lambda: ops.zipcache_seal(self.memory, seals)

    def stock(self) -> Callable[[], None]:
        """Return FlashAttention's step."""
        from vllm.v1.attention.backends.fa_utils import (
            flash_attn_varlen_func,
            get_flash_attn_version,
        )

        shape, n = self.shape, self.load.batch
        size = (self.table.numel(), shape.block_size, shape.kv_heads, shape.head_size)
        keys, values = self._random(*size), self._random(*size)
        starts = torch.arange(n + 1, dtype=torch.int32, device=self.device)
        lengths = torch.full_like(starts[:n], self.load.context)
        version = get_flash_attn_version(head_size=shape.head_size)
        return self._captured(
            lambda: flash_attn_varlen_func(
                q=self.query, k=keys, v=values, out=self.out, cu_seqlens_q=starts, max_seqlen_q=1,
                seqused_k=lengths, max_seqlen_k=self.load.context, softmax_scale=self.scale,
                causal=True, block_table=self.table, fa_version=version,
            )
        )  # fmt: skip

    def _captured(self, run: Callable[[], None]) -> Callable[[], None]:
        if not self._in_graph:
            return run
        graph = torch.cuda.CUDAGraph()
        # Kernels are compiled and loaded before.
        run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run()
        return graph.replay
