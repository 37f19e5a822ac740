"""Partial forward: chosen tokens through chosen layers, with the engine's own modules.

The rows of a pass may be scattered over a request. Each maximal run ``[a, b)`` of consecutive
positions is presented to the attention backend's own metadata builder as a *virtual request*: its
queries are the run, its sequence length is ``b``, its block table is the real request's. So every
row attends to exactly the positions up to its own, and no new kernel is needed. Keys and values
of all rows of a pass are written before attention reads them, layer by layer, as in any step.

Passes are cut in order of position. A later row reads what an earlier pass wrote, and an earlier
row never reads a later one, so cutting changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_plugins.errors import PluginError

if TYPE_CHECKING:
    from vllm_plugins.engine.worker_host import RunnerView

# Decoder stacks whose layers take (positions, hidden_states, residual) and whose embeddings, for
# text, need nothing further; each is compared with its own full prefill in the tests.
ARCHITECTURES = frozenset(
    {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3ForCausalLM",
        "Qwen3VLForConditionalGeneration",
    }
)


def check_architecture(where: str, architectures: Sequence[str]) -> None:
    """Refuse a model whose layers cannot be run one by one.

    Raises:
        PluginError: No architecture of the model is a known decoder stack.
    """
    if not ARCHITECTURES.intersection(architectures):
        raise PluginError(
            where,
            f"cannot run the layers of {', '.join(architectures)} one by one",
            f"use a model of type {', '.join(sorted(ARCHITECTURES))}",
        )


@dataclass
class Rows:
    """Tokens of one request that go through some layers; text, with no image before them.

    Attributes:
        positions: Their positions in the request, ascending, int64, shape (n,).
        block_ids: The request's KV blocks from its first token on, int32, shape (blocks,).
        token_ids: int32, shape (n,); read only by a pass that begins with the first layer.
        hidden: Output of the layer before the first one, shape (n, hidden size); None before the
            first layer. A pass replaces it.
        residual: The residual stream beside it, of the same shape.
    """

    positions: np.ndarray
    block_ids: np.ndarray
    token_ids: np.ndarray
    hidden: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    def take(self, chosen: slice | np.ndarray) -> Rows:
        """Return some of the rows, by index, with their hidden states."""
        hidden, residual = self.hidden, self.residual
        if hidden is not None and residual is not None:
            index = chosen
            if isinstance(chosen, np.ndarray):
                index = torch.from_numpy(chosen).to(hidden.device)
            hidden, residual = hidden[index], residual[index]
        return Rows(
            self.positions[chosen], self.block_ids, self.token_ids[chosen], hidden, residual
        )

    def join(self, parts: Sequence[Rows]) -> None:
        """Take over the hidden states of pieces that together are these rows, in order."""
        hidden = [part.hidden for part in parts if part.hidden is not None]
        residual = [part.residual for part in parts if part.residual is not None]
        if hidden:
            self.hidden, self.residual = torch.cat(hidden), torch.cat(residual)


@dataclass(frozen=True)
class VirtualBatch:
    """Rows as the attention backend sees them: one virtual request per run.

    Attributes:
        starts: Row at which each run begins, and the number of rows; int32, shape (runs + 1,).
        ends: Sequence length of each run; int32, shape (runs,).
        tables: Row of ``sources`` that each run's block table is; int64, shape (runs,).
    """

    starts: np.ndarray
    ends: np.ndarray
    tables: np.ndarray

    @property
    def runs(self) -> int:
        """Number of virtual requests."""
        return len(self.ends)


def virtual_batch(parts: Sequence[np.ndarray]) -> VirtualBatch:
    """Split each request's ascending positions into maximal runs.

    Args:
        parts: Positions of each request, int64, each of shape (n_i,) with n_i > 0.
    """
    starts, ends, tables, offset = [], [], [], 0
    for source, positions in enumerate(parts):
        breaks = np.flatnonzero(np.diff(positions) != 1) + 1
        first = np.concatenate(([0], breaks))
        last = np.concatenate((breaks, [len(positions)])) - 1
        starts.append(first + offset)
        ends.append(positions[last] + 1)
        tables.append(np.full(len(first), source, np.int64))
        offset += len(positions)
    return VirtualBatch(
        np.concatenate([*starts, [offset]]).astype(np.int32),
        np.concatenate(ends).astype(np.int32),
        np.concatenate(tables),
    )


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one request that take part in a pass, as a range of its indices."""

    source: int
    begin: int
    end: int


def plan_passes(parts: Sequence[np.ndarray], max_runs: int, max_rows: int) -> Iterator[list[Piece]]:
    """Pack the rows of several requests into passes, each request's in order of position.

    Args:
        parts: Ascending positions of each request, int64, each of shape (n_i,).
        max_runs: Most virtual requests of a pass; backends size buffers by ``max_num_seqs``.
        max_rows: Most rows of a pass.
    """
    current: list[Piece] = []
    runs, rows = max_runs, max_rows
    for source, positions in enumerate(parts):
        begin, breaks = 0, np.flatnonzero(np.diff(positions) != 1) + 1
        while begin < len(positions):
            if runs == 0 or rows == 0:
                yield current
                current, runs, rows = [], max_runs, max_rows
            first = int(np.searchsorted(breaks, begin, side="right"))
            end = min(begin + rows, len(positions))
            if first + runs - 1 < len(breaks):
                end = min(end, int(breaks[first + runs - 1]))
            current.append(Piece(source, begin, end))
            runs -= 1 + int(np.searchsorted(breaks, end, side="left")) - first
            rows -= end - begin
            # The rest of this request reads what this pass writes.
            begin, rows = end, rows if end == len(positions) else 0
    if current:
        yield current


class PartialForward:
    """Runs rows through a range of the model's decoder layers.

    Args:
        runner: The worker's model and KV cache.
        max_rows: Most rows of one pass.

    Raises:
        PluginError: The model is not a known decoder stack with full attention in every layer.
    """

    def __init__(self, runner: RunnerView, max_rows: int) -> None:
        config = runner.config
        check_architecture("partial forward", config.model_config.architectures)
        groups = runner.kv_cache_config.kv_cache_groups
        spec = groups[0].kv_cache_spec
        if len(groups) != 1 or not isinstance(spec, FullAttentionSpec) or spec.sliding_window:
            raise PluginError(
                "partial forward", "needs full attention in every layer", "use such a model"
            )
        self._runner = runner
        model: Any = runner.model
        if config.model_config.is_multimodal_model:
            model = model.get_language_model()
        self._stack: Any = model.model
        # A model with M-RoPE is given time, height and width of each token.
        mrope = config.model_config.uses_mrope
        self._axes = config.model_config.mrope_num_dims if mrope else 0
        self._block_size = spec.block_size
        self._max_runs = config.scheduler_config.max_num_seqs
        self._max_rows = max_rows
        self._running = False

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self._stack.layers)

    def attention_name(self, layer: int) -> str:
        """Return the name under which vLLM knows the attention of a decoder layer."""
        return str(self._stack.layers[layer].self_attn.attn.layer_name)

    def rotary_embedding(self) -> Any:
        """Return the position embedding module, the same in every layer."""
        return self._stack.layers[0].self_attn.rotary_emb

    def split(self, rows: Rows) -> Iterator[Rows]:
        """Yield the rows in pieces of one pass each, in order of position."""
        for pieces in plan_passes([rows.positions], self._max_runs, self._max_rows):
            yield rows.take(slice(pieces[0].begin, pieces[0].end))

    @contextmanager
    def queries_of(self, layers: Sequence[int]) -> Iterator[list[torch.Tensor]]:
        """Collect the queries of some layers while passes run, as attention gets them.

        Yields:
            A list that each pass adds to, layer by layer: shape (rows, heads * head size).
        """
        queries: list[torch.Tensor] = []

        def keep(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            queries.append(inputs[0].detach().clone())

        # Only here: layers inside vLLM's own compiled or captured step never see a hook.
        hooks = [
            self._stack.layers[index].self_attn.attn.register_forward_pre_hook(keep)
            for index in layers
        ]
        try:
            yield queries
        finally:
            for hook in hooks:
                hook.remove()

    def sum_over_ranks(self, *values: torch.Tensor) -> list[torch.Tensor]:
        """Return sums over the tensor-parallel ranks, which hold different heads."""
        return [tensor_model_parallel_all_reduce(value) for value in values]

    @torch.inference_mode()
    def run(self, parts: Sequence[Rows], layers: range) -> None:
        """Run rows of several requests through consecutive layers, in place.

        The KV of the rows in these layers is overwritten in the paged cache, and each of ``parts``
        gets the hidden states after the last layer.

        Raises:
            RuntimeError: It was called from inside one of its own passes.
        """
        if self._running:
            raise RuntimeError("a partial forward cannot run inside another")
        self._running = True
        try:
            self._run(parts, layers)
        finally:
            self._running = False

    def _run(self, parts: Sequence[Rows], layers: range) -> None:
        done: list[list[Rows]] = [[] for _ in parts]
        positions = [part.positions for part in parts]
        for pieces in plan_passes(positions, self._max_runs, self._max_rows):
            taken = [parts[p.source].take(slice(p.begin, p.end)) for p in pieces]
            self._pass(taken, layers)
            for piece, rows in zip(pieces, taken, strict=True):
                done[piece.source].append(rows)
        for part, rows_of_part in zip(parts, done, strict=True):
            part.join(rows_of_part)

    def _pass(self, taken: Sequence[Rows], layers: range) -> None:
        positions = self._positions(taken)
        state = self._inputs(taken)
        with self._context(taken):
            for index in layers:
                state = self._stack.layers[index](positions, *state)
        hidden, residual = state
        assert residual is not None
        sizes = [len(part.positions) for part in taken]
        states = zip(hidden.split(sizes), residual.split(sizes), strict=True)
        for part, (own_hidden, own_residual) in zip(taken, states, strict=True):
            part.hidden, part.residual = own_hidden, own_residual

    def _positions(self, taken: Sequence[Rows]) -> torch.Tensor:
        """Return positions as the layers take them, shape (rows,) or with M-RoPE (axes, rows)."""
        positions = self._tensor(np.concatenate([part.positions for part in taken]))
        # Up to a request's first image all axes count its tokens.
        return positions.expand(self._axes, -1) if self._axes else positions

    def _inputs(self, taken: Sequence[Rows]) -> tuple[torch.Tensor, torch.Tensor | None]:
        if taken[0].hidden is None:
            token_ids = self._tensor(np.concatenate([part.token_ids for part in taken]))
            return self._stack.embed_input_ids(token_ids), None
        hidden = [part.hidden for part in taken if part.hidden is not None]
        residual = [part.residual for part in taken if part.residual is not None]
        # Layers normalise in place: what is kept for a later pass must not change.
        return torch.cat(hidden).clone(), torch.cat(residual).clone()

    @contextmanager
    def _context(self, taken: Sequence[Rows]) -> Iterator[None]:
        batch = virtual_batch([part.positions for part in taken])
        metadata, slots = {}, {}
        for group in self._runner.attention_groups[0]:
            builder = group.get_metadata_builder()
            common = self._common_metadata(taken, batch, builder.kv_cache_spec.block_size)
            built = builder.build(common_prefix_len=0, common_attn_metadata=common)
            for name in group.layer_names:
                metadata[name], slots[name] = built, common.slot_mapping
        with set_forward_context(
            metadata,
            self._runner.config,
            num_tokens=int(batch.starts[-1]),
            slot_mapping=slots,
        ):
            yield

    def _common_metadata(
        self, taken: Sequence[Rows], batch: VirtualBatch, kernel_block: int
    ) -> CommonAttentionMetadata:
        tables = [kernel_blocks(part.block_ids, self._block_size, kernel_block) for part in taken]
        slots = [
            slot_mapping(table, part.positions, kernel_block)
            for table, part in zip(tables, taken, strict=True)
        ]
        width = max(len(table) for table in tables)
        padded = np.stack([np.pad(table, (0, width - len(table))) for table in tables])
        starts = torch.from_numpy(batch.starts)
        ends = torch.from_numpy(batch.ends)
        return CommonAttentionMetadata(
            query_start_loc=self._tensor(batch.starts),
            query_start_loc_cpu=starts,
            seq_lens=self._tensor(batch.ends),
            num_reqs=batch.runs,
            num_actual_tokens=int(batch.starts[-1]),
            max_query_len=int(np.diff(batch.starts).max()),
            max_seq_len=int(batch.ends.max()),
            block_table_tensor=self._tensor(padded[batch.tables]),
            slot_mapping=self._tensor(np.concatenate(slots)),
            # These rows are prefill even where a run is a single token.
            is_prefilling=torch.ones(batch.runs, dtype=torch.bool),
            seq_lens_cpu_upper_bound=ends,
        )

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._runner.device, non_blocking=True)


def kernel_blocks(block_ids: np.ndarray, block_size: int, kernel_block: int) -> np.ndarray:
    """Return a request's blocks as the kernel counts them, where it splits the manager's blocks.

    Args:
        block_ids: int32, shape (blocks,).
        block_size: Tokens of a block of the KV cache manager.
        kernel_block: Tokens of a block of the attention kernel; divides ``block_size``.
    """
    split = block_size // kernel_block
    return (block_ids[:, None] * split + np.arange(split, dtype=block_ids.dtype)).ravel()


def slot_mapping(table: np.ndarray, positions: np.ndarray, block_size: int) -> np.ndarray:
    """Return the cache slots of positions, int64, shape (n,).

    Args:
        table: The request's blocks from its first token on, int32, shape (blocks,).
        positions: int64, shape (n,).
        block_size: Tokens of one of these blocks.
    """
    return table[positions // block_size].astype(np.int64) * block_size + positions % block_size
