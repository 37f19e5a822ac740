"""The block table that some layers see: the engine's own, without the blocks that are holes.

A hole is a flag on a physical block, on the device. It is set where tokens are dropped and cleared
by the next regular write to the block. So a prefix that requests share carries its holes with it,
and preemption, resumption and reallocation need no care of their own.

Layers get the view by an attention backend whose metadata builder is the original one with a
smaller table before it. The engine gives layers with a backend class of their own a builder of
their own, within the same KV cache group and on both model runners.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.attention.backend import subclass_attention_backend

from vllm_plugins.engine.block_holes.plan import Span, StepPlan

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata

    from vllm_plugins.engine.worker_host import RunnerView


@dataclass
class HoleView:
    """What the metadata builders of a set of layers share.

    Attributes:
        spans: Reads the media spans of each request of a step's batch, in its order; set once the
            KV cache exists.
        builders: All of these layers. A draft model's layers have two: the runner's, and one that
            its drafter made.
        built: By the name of a layer's attention, the builder that built for it last.
        flags: Whether each block is a hole, on the device, by the size of these blocks in tokens;
            bool, shape (blocks,). The builders share them.
        null_is_hole: Whether an entry of the engine's own table that is the null block is a hole:
            a block that is given back to the pool may be written by another request.
    """

    spans: Callable[[CommonAttentionMetadata], Sequence[Sequence[Span]]] | None = None
    builders: list[Any] = field(default_factory=list)
    built: dict[str, Any] = field(default_factory=dict)
    flags: dict[int, torch.Tensor] = field(default_factory=dict)
    null_is_hole: bool = False

    def on_kv_cache_ready(self, runner: RunnerView) -> None:
        """Make the flags; until then the layers see the engine's own tables."""
        self.spans = runner.media_spans
        blocks = runner.kv_cache_config.num_blocks
        for builder in self.builders:
            builder.hole_make_flags(blocks)

    def builder_of(self, layer: str) -> Any:
        """Return the builder that built for a layer last, by the name of its attention.

        Raises:
            KeyError: None has; the layer may have no view.
        """
        return self.built[layer]

    def step_of(self, layer: str) -> CommonAttentionMetadata:
        """Return the metadata of the step that was built for a layer last, no block left out.

        Raises:
            KeyError: None was; the layer may have no view.
        """
        step: CommonAttentionMetadata = self.builder_of(layer).hole_step
        return step


class HoleBuilder:
    """Mixed in before a backend's metadata builder; its own attributes start with ``hole_``."""

    # Either would hand these layers a table that another group's builder made.
    supports_update_block_table = False
    supports_draft_decode_metadata_update = False
    hole_view: HoleView
    layer_names: list[str]
    kv_cache_spec: Any
    device: torch.device

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Some builders set it on the instance.
        self.supports_draft_decode_metadata_update = False
        self.hole_flags: torch.Tensor | None = None
        # Blocks of the attention kernel in one of the KV cache manager's.
        self.hole_split = 1
        self.hole_buffers: CompactTables | None = None
        self.hole_step: CommonAttentionMetadata | None = None
        self.hole_view.builders.append(self)

    def hole_make_flags(self, blocks: int) -> None:
        """Take one flag for each block of the attention kernel.

        Args:
            blocks: Blocks of the KV cache manager.
        """
        layers = self.vllm_config.compilation_config.static_forward_context  # type: ignore[attr-defined]
        managed = layers[self.layer_names[0]].get_kv_cache_spec(self.vllm_config).block_size  # type: ignore[attr-defined]
        size = self.kv_cache_spec.block_size
        self.hole_split = managed // size
        if size not in self.hole_view.flags:
            flags = torch.zeros(blocks * managed // size, dtype=torch.bool, device=self.device)
            self.hole_view.flags[size] = flags
        self.hole_flags = self.hole_view.flags[size]

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Build the metadata of these layers from the table without holes.

        Blocks that the step writes are holes no more, unless `hole_hide` says so later in the step.
        """
        self.hole_step = common_attn_metadata
        self.hole_view.built.update(dict.fromkeys(self.layer_names, self))
        if self.hole_flags is None:
            return self._hole_build(common_attn_metadata, fast_build, **kwargs)
        if self.hole_view.null_is_hole:
            # What an earlier step has hidden is the null block by now.
            self.hole_flags.zero_()
            self.hole_flags[: self.hole_split] = True
        else:
            # Padding has slot -1, which stands for the null block.
            slots = common_attn_metadata.slot_mapping.clamp_min(0)
            self.hole_flags[slots // self.kv_cache_spec.block_size] = False
        return self._hole_build(self.hole_compact(common_attn_metadata), fast_build, **kwargs)

    def _hole_build(self, common: CommonAttentionMetadata, fast: bool, **kwargs: Any) -> Any:
        return super().build(  # type: ignore[misc]
            common_prefix_len=0, common_attn_metadata=common, fast_build=fast, **kwargs
        )

    def hole_compact(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """Return a step's metadata with the tables that these layers see."""
        assert self.hole_flags is not None
        if self.hole_buffers is None:
            rows, width = common.block_table_tensor.shape
            most = self.vllm_config.scheduler_config.max_num_seqs  # type: ignore[attr-defined]
            self.hole_buffers = CompactTables.empty(max(rows, most), width, self.device)
        seen = copy(common)
        seen.block_table_tensor, seen.seq_lens = self.hole_buffers.fill(
            self.hole_flags, common, self.kv_cache_spec.block_size
        )
        # Derived from the sequence lengths of all tokens.
        seen._num_computed_tokens_cache = None  # noqa: SLF001
        return seen

    def hole_hide(self, plan: StepPlan) -> tuple[Any, torch.Tensor]:
        """Make holes in the middle of a step and build the metadata of the rows that are left.

        Args:
            plan: Of the step that `build` was called for last.

        Returns:
            The backend's metadata, and the slots of the rows, shape (m,).
        """
        common, flags = self.hole_step, self.hole_flags
        assert common is not None and flags is not None
        hidden = torch.from_numpy(plan.hidden).to(self.device, non_blocking=True)
        flags[common.block_table_tensor[hidden[0], hidden[1]].long()] = True
        seen = self.hole_compact(common)
        rows = torch.from_numpy(plan.rows).to(self.device, non_blocking=True)
        # A batch may be padded with requests that have no rows.
        starts = torch.from_numpy(
            np.pad(plan.starts, (0, common.num_reqs + 1 - len(plan.starts)), mode="edge")
        )
        seen.query_start_loc_cpu = starts
        seen.query_start_loc = starts.to(self.device, non_blocking=True)
        seen.num_actual_tokens, seen.max_query_len = len(plan.rows), plan.longest
        seen.slot_mapping = self.hole_slots(common, seen, rows)
        seen.positions = None
        return self._hole_build(seen, False), seen.slot_mapping

    def hole_slots(
        self, common: CommonAttentionMetadata, seen: CommonAttentionMetadata, rows: torch.Tensor
    ) -> torch.Tensor:
        """Return the slots that rows of a step write.

        Args:
            common: The step's metadata.
            seen: Of the rows that are left.
            rows: These rows, int64, shape (m,).

        Returns:
            int64, shape (m,): the tokens' own, for all tokens behind a hole have kept theirs.
        """
        return common.slot_mapping[rows]


@dataclass(frozen=True)
class CompactTables:
    """Persistent tables and lengths, so that a captured graph finds them where they were.

    Attributes:
        tables: int32, shape (requests, blocks + 1); the last column takes what is left out.
        lengths: int32, shape (requests,).
        offsets: Of blocks from a sequence's first, int32, shape (blocks,).
    """

    tables: torch.Tensor
    lengths: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def empty(cls, requests: int, width: int, device: torch.device) -> CompactTables:
        """Allocate for so many requests with block tables of a width."""
        return cls(
            torch.zeros(requests, width + 1, dtype=torch.int32, device=device),
            torch.zeros(requests, dtype=torch.int32, device=device),
            torch.arange(width, dtype=torch.int32, device=device),
        )

    def fill(
        self, flags: torch.Tensor, common: CommonAttentionMetadata, block_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Leave flagged blocks out of a step's block tables.

        Args:
            flags: Whether each block is a hole; bool, shape (blocks,).
            common: The step's tables, shape (requests, width), and sequence lengths.
            block_size: Tokens of a block.

        Returns:
            Tables and lengths as views of these buffers, in the shapes of ``common``.
        """
        source = common.block_table_tensor
        requests, width = source.shape
        # Tokens in each block; a row holds what earlier requests left there behind its last one.
        tokens = (common.seq_lens.unsqueeze(1) - self.offsets[:width] * block_size).clamp_(
            0, block_size
        )
        tokens.masked_fill_(flags[source.long()], 0)
        kept = tokens > 0
        places = torch.where(kept, kept.cumsum(1) - 1, width)
        tables = self.tables[:requests]
        tables.zero_().scatter_(1, places, source)
        seen = self.lengths[:requests]
        torch.sum(tokens, 1, dtype=torch.int32, out=seen)
        return tables[:, :width], seen


def with_holes(
    backend: type[AttentionBackend], view: HoleView, mixin: type[HoleBuilder] = HoleBuilder
) -> type[AttentionBackend]:
    """Return an attention backend whose layers see the blocks of a view.

    Args:
        backend: The layers' own backend.
        view: Shared by all layers that are given the returned class.
        mixin: What is put before the backend's metadata builder.
    """
    builder = backend.get_builder_cls()
    members = {"hole_view": view, "__module__": __name__}
    hole_builder = type(f"Hole{builder.__name__}", (mixin, builder), members)
    return subclass_attention_backend("Hole", backend, hole_builder)
