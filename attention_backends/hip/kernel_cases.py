"""What ``vllm-plugins bench --kernel hip`` times: one layer, beside the platform's own kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm_plugins.attention_backends.hip import cpu_kernels, torch_attention
from vllm_plugins.attention_backends.hip.batch import BatchPlanner, Rows
from vllm_plugins.attention_backends.hip.plan import LayerPlan
from vllm_plugins.attention_backends.hip.plugin import HipOptions
from vllm_plugins.attention_backends.hip.query_blocks import DENSE, QueryBlocks
from vllm_plugins.attention_backends.hip.selection import NONE
from vllm_plugins.bench.kernels import STOCK, KernelCase
from vllm_plugins.errors import PluginError

if TYPE_CHECKING:
    from vllm_plugins.bench.kernels import KernelShape, Load

# Tokens of a prompt that are computed at once.
PREFILL_CHUNK = 2048
# A layer in the middle: sparse with the default options.
LAYER, LAYERS = 8, 16


def kernel_cases(shape: KernelShape, load: Load, options: dict[str, Any]) -> Sequence[KernelCase]:
    """Return the stock kernel and HiP's, on the same random keys.

    Args:
        shape: The layer.
        load: Phase, context and batch.
        options: The plug-in's, validated.

    Raises:
        PluginError: There is nothing to time here with these options.
    """
    if shape.device != "cpu":
        raise PluginError("--kernel hip", f"times no kernels on '{shape.device}' yet", "use a CPU")
    chosen = HipOptions.model_validate(options)
    plan = chosen.plan(LAYER, LAYERS)
    if plan is None:
        raise PluginError("--kernel hip: dense_layers", f"layer {LAYER} is dense", "drop it")
    layer = _CpuLayer(shape, load, plan, chosen)
    return layer.decode_cases() if load.phase == "decode" else layer.prefill_cases()


def selection_keys(plan: LayerPlan, context: int, refresh: Sequence[int]) -> float:
    """Return the keys that selecting reads in a decode step, on average.

    Two representatives in each halving of each chunk of each stage; a stage that has no more
    chunks than it keeps reads none.
    """
    keys, candidates = 0.0, max(context - plan.window + plan.overlap - plan.sink, 0)
    for stage, every in zip(plan.stages, refresh, strict=True):
        if candidates > stage.keep:
            keys += candidates / stage.chunk * 2 * max(stage.chunk.bit_length() - 1, 1) / every
        candidates = min(candidates, stage.keep)
    return keys


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


class _CpuLayer:
    """One layer's cache, filled twice: in the stock kernel's order and in plain rows."""

    def __init__(
        self, shape: KernelShape, load: Load, plan: LayerPlan, options: HipOptions
    ) -> None:
        self.shape, self.load, self.plan, self.options = shape, load, plan, options
        self.scale = shape.head_size**-0.5
        per_row = -(-(load.context + options.refresh[0]) // shape.block_size)
        generator = torch.Generator().manual_seed(0)
        table = torch.randperm(per_row * load.batch, generator=generator, dtype=torch.int32)
        self.table = table.view(load.batch, per_row)
        dtype, size = shape.torch_dtype, shape.block_size
        blocks = (per_row * load.batch, shape.kv_heads, 2 * size, shape.head_size)
        self.plain = torch.randn(blocks, generator=generator).to(dtype)
        self.stock = torch.empty_like(self.plain)
        self._fill_stock()
        queries = load.batch if load.phase == "decode" else PREFILL_CHUNK
        width = (queries, shape.heads, shape.head_size)
        self.query = torch.randn(width, generator=generator).to(dtype)
        self.out = torch.empty_like(self.query)

    def _fill_stock(self) -> None:
        from vllm._custom_ops import cpu_attn_reshape_and_cache

        size = self.shape.block_size
        for block in range(len(self.plain)):
            rows = self.plain[block].transpose(0, 1)
            slots = torch.arange(block * size, (block + 1) * size)
            keys, values = self.stock.chunk(2, dim=2)
            cpu_attn_reshape_and_cache(
                rows[:size].contiguous(), rows[size:].contiguous(), keys, values, slots, self._isa,
                k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto",
            )  # fmt: skip

    @property
    def _isa(self) -> str:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        shape = self.shape
        return _get_attn_isa(shape.torch_dtype, shape.block_size, shape.head_size)

    def _stock_call(self, starts: torch.Tensor, seq_lens: torch.Tensor) -> Callable[[], None]:
        """Return the stock kernel's call, its schedule made beforehand as in a server."""
        from vllm._custom_ops import (
            cpu_attention_with_kv_cache,
            cpu_attn_get_scheduler_metadata,
        )

        shape = self.shape
        schedule = cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens), num_heads=shape.heads, num_kv_heads=shape.kv_heads,
            head_dim=shape.head_size, seq_lens=seq_lens, dtype=shape.torch_dtype,
            query_start_loc=starts, causal=True, sliding_window_size=-1, isa=self._isa,
            enable_kv_split=True,
        )  # fmt: skip
        keys, values = self.stock.chunk(2, dim=2)
        return lambda: cpu_attention_with_kv_cache(
            query=self.query, key_cache=keys, value_cache=values, output=self.out,
            query_start_loc=starts, seq_lens=seq_lens, scale=self.scale, causal=True,
            alibi_slopes=None, sliding_window=-1, block_table=self.table, softcap=0.0,
            scheduler_metadata=schedule, s_aux=None,
        )  # fmt: skip

    def _hip(self, blocks: QueryBlocks, kept: list[torch.Tensor]) -> None:
        path = cpu_kernels if cpu_kernels.library() is not None else torch_attention
        paged = cpu_kernels.Paged(self.plain, self.table)
        path.attention(self.query, self.out, paged, blocks, self.plan, kept, self.scale)

    def _kept(self) -> list[torch.Tensor]:
        rows = self.load.batch
        return [
            torch.full((rows, stage.keep_chunks), NONE, dtype=torch.int32)
            for stage in self.plan.stages
        ]

    def decode_cases(self) -> list[KernelCase]:
        """Return stock, dense rows, a step that selects anew, one that does not, and the mean."""
        n, context, token = self.load.batch, self.load.context, self.shape.token_bytes
        stock = self._stock_call(
            torch.arange(n + 1, dtype=torch.int32), torch.full((n,), context, dtype=torch.int32)
        )
        cycle, kept = self._cycle(), self._kept()
        first = cycle[0]
        dense, anew, again = (
            QueryBlocks(**{**vars(first), "level": torch.full_like(first.level, level)})
            for level in (DENSE, 0, len(self.plan.stages))
        )
        attended = min(context, self.plan.sink + self.plan.window + self.plan.top_k) * token
        select = selection_keys(self.plan, context, [1] * len(self.plan.stages)) * token / 2
        mean = selection_keys(self.plan, context, self.options.refresh) * token / 2
        return [
            KernelCase(STOCK, stock, n * context * token),
            KernelCase("hip dense", lambda: self._hip(dense, kept), n * context * token),
            KernelCase("hip, all stages", lambda: self._hip(anew, kept), n * (attended + select)),
            KernelCase("hip, selection kept", lambda: self._hip(again, kept), n * attended),
            KernelCase("hip", lambda: self._run(cycle, kept), n * (attended + mean), len(cycle)),
        ]

    def _run(self, cycle: list[QueryBlocks], kept: list[torch.Tensor]) -> None:
        for blocks in cycle:
            self._hip(blocks, kept)

    def _cycle(self) -> list[QueryBlocks]:
        """Return the query blocks of the steps until the first stage is due again."""
        n, size = self.load.batch, self.shape.block_size
        options = self.options.model_copy(update={"dense_threshold": 0, "phases": "decode"})
        planner = BatchPlanner(options, n, 1)
        found = []
        for step in range(self.options.refresh[0]):
            position = torch.full((n,), self.load.context - 1 + step, dtype=torch.int32)
            block = self.table[:, int(position[0]) // size].long()
            rows = Rows(
                start=torch.arange(n, dtype=torch.int32),
                length=torch.ones(n, dtype=torch.int32),
                position=position,
                prefilling=torch.zeros(n, dtype=torch.bool),
                block_table=self.table,
                slots=block * size + position % size,
                block_size=size,
            )
            found.append(planner.plan(rows)[0])
        return found

    def prefill_cases(self) -> list[KernelCase]:
        """Return a prompt, computed in chunks: stock, HiP's dense rows, and sparse ones."""
        n, context, token = self.load.batch, self.load.context, self.shape.token_bytes
        if n != 1 or context % PREFILL_CHUNK:
            raise PluginError(
                f"--contexts {context} --batches {n}",
                f"prefill is timed at batch 1, in multiples of {PREFILL_CHUNK} tokens",
                "choose such",
            )
        ends = range(PREFILL_CHUNK, context + 1, PREFILL_CHUNK)
        starts = torch.tensor([0, PREFILL_CHUNK], dtype=torch.int32)
        stock = [self._stock_call(starts, torch.tensor([x], dtype=torch.int32)) for x in ends]
        dense, sparse = (
            [self._chunk(end, options) for end in ends]
            for options in (
                self.options.model_copy(update={"phases": "decode"}),
                self.options.model_copy(update={"phases": "prefill"}),
            )
        )
        # Keys are read again for every block of queries, from a cache as a rule.
        least = context * token
        return [
            KernelCase(STOCK, lambda: _call_all(stock), least),
            KernelCase("hip dense", lambda: self._run(dense, self._kept()), least),
            KernelCase("hip", lambda: self._run(sparse, self._kept()), least),
        ]

    def _chunk(self, end: int, options: HipOptions) -> QueryBlocks:
        planner = BatchPlanner(options, 1, 1)
        one = torch.tensor([PREFILL_CHUNK], dtype=torch.int32)
        rows = Rows(
            start=torch.zeros(1, dtype=torch.int32),
            length=one,
            position=end - one,
            prefilling=torch.ones(1, dtype=torch.bool),
            block_table=self.table,
            slots=torch.zeros(PREFILL_CHUNK, dtype=torch.int64),
            block_size=self.shape.block_size,
        )
        return planner.plan(rows)[1]
