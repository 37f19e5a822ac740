"""Memory mode: blocks that are holes are given back to the pool, in the layers that see holes.

These layers get a KV cache spec of their own, and with it block tables of their own, whose manager
runs in the engine's core. It is told token counts only, so a scheduler policy tells it where each
request's media lie. The worker is not told at all: it writes the null block into its own tables
where it makes holes, and the view takes the null block for a hole
(`view.HoleView.null_is_hole`), for a block that is freed may soon be another request's.

Where these layers forget tokens too (`forgotten.Forgotten`), they use the first slots of a table
and no more, and get blocks for the tokens that are not known to be forgotten. Their tables are then
shorter than the sequences; what the runner makes of the positions behind is not read.

Prefix caching has to be off: a later request would find blocks of the lower layers without those
of the upper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from vllm_plugins.engine.block_holes.forgotten import Forgotten, write
from vllm_plugins.engine.policy import SchedulerPolicy

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from vllm_plugins.engine.block_holes.plan import Hole, Span, StepPlan
    from vllm_plugins.engine.policy import SchedulerFacts, Step
    from vllm_plugins.engine.policy import StepPlan as NextStep
    from vllm_plugins.engine.worker_host import RunnerView
    from vllm_plugins.metrics import Metrics, MetricSpec

# vLLM registers its own kinds on first use and takes a list that is not empty for theirs.
KVCacheSpecRegistry._ensure_registered()  # noqa: SLF001


CELLS = "forgotten"
"""Under which a step's notes have the cells of its requests."""


class HoleManager(FullAttentionManager):
    """Full attention whose holes are freed once their media item is computed.

    Attributes:
        holes: Of the requests that the engine's core holds; its policy's own.
        forgotten: Tokens that need no slot; its policy's own.
    """

    holes: Mapping[str, Sequence[Hole]] = MappingProxyType({})
    forgotten: Forgotten = Forgotten()

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """Return how many blocks a request needs besides those that it has.

        Args:
            request_id: The request.
            num_tokens: Its tokens after the step, of which forgotten ones need no slot.
            *args: vLLM's own.
            **kwargs: vLLM's own.
        """
        needed = num_tokens - self.forgotten.of(request_id)
        return int(super().get_num_blocks_to_allocate(request_id, needed, *args, **kwargs))

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Give a request the blocks that it needs, and return them.

        Args:
            request_id: The request.
            num_tokens: Its tokens after the step, of which forgotten ones need no slot.
            num_tokens_main_model: Unused.
        """
        needed = num_tokens - self.forgotten.of(request_id)
        new: list[KVCacheBlock] = super().allocate_new_blocks(
            request_id, needed, num_tokens_main_model
        )
        return new

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Let a request give its blocks back; computed anew, it has forgotten nothing."""
        self.forgotten.leave(request_id)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return blocks

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Give a request's holes back to the pool.

        Args:
            request_id: The request.
            processed_computed_tokens: Tokens whose steps are done, or fewer: of a session that has
                taken a token back, whose step is under way, the last of those that it kept is
                taken off in its place.
            num_prompt_tokens: Unused.
        """
        for hole in self.holes.get(request_id, ()):
            # Media come whole, so that this is all of the item.
            if processed_computed_tokens >= hole.behind:
                first = hole.first_block
                self._remove_blocks_in_range(request_id, first, first + hole.blocks)


@register_kv_cache_spec(manager_class=HoleManager)
@dataclasses.dataclass(frozen=True, kw_only=True)
class HoleSpec(AttentionSpec):
    """Full attention of layers that see holes; no kin of the other layers', so tables differ."""

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Return what a request of full length takes without holes, in bytes."""
        length = vllm_config.model_config.max_model_len
        return int(cdiv(length, self.block_size) * self.page_size_bytes)


def give_hole_spec(attention: Any) -> None:
    """Have a layer ask for a KV cache of its own kind; before the engine sizes the cache.

    Args:
        attention: vLLM's attention layer.
    """
    attention.get_kv_cache_spec = partial(_hole_spec, attention.get_kv_cache_spec)


def _hole_spec(stock: Callable[[VllmConfig], Any], config: VllmConfig) -> HoleSpec:
    spec = stock(config)
    fields = (field.name for field in dataclasses.fields(HoleSpec) if field.init)
    return HoleSpec(**{name: getattr(spec, name) for name in fields})


class HolePolicy(SchedulerPolicy):
    """Tells the manager where each request's holes are, and has media come whole.

    Of an item in two steps the worker would hide less than the manager gives back.

    Args:
        plan_span: Plans the hole of a span, as the worker does.
        held: Gauge of blocks that requests would hold, but that are holes.
        reporter: Plug-in whose workers report, by request, how many tokens are forgotten.
        forgotten: Gauge of these tokens, where there is a reporter.
    """

    whole_media = True

    def __init__(
        self,
        plan_span: Callable[[Span], Hole],
        held: MetricSpec,
        reporter: str | None = None,
        forgotten: MetricSpec | None = None,
    ) -> None:
        self._plan_span = plan_span
        self._held = held
        self._reporter = reporter
        self._holes: dict[str, Sequence[Hole]] = {}
        # With the number of their media whose holes are planned.
        self._sessions: dict[str, tuple[Request, int]] = {}
        self._forgotten = Forgotten()
        self._gauge = forgotten
        self.metrics = (held,) if forgotten is None else (held, forgotten)

    def bind(self, facts: SchedulerFacts, metrics: Metrics) -> None:
        """Let the managers of this engine, and of no other one in the process, see the holes."""
        super().bind(facts, metrics)
        every = facts.kv_cache_manager.coordinator.single_type_managers
        managers = [manager for manager in every if isinstance(manager, HoleManager)]
        for manager in managers:
            manager.holes = self._holes
            manager.forgotten = self._forgotten
        # Layers that see holes are as many groups as the others' number makes of them.
        self._groups = len(managers)

    def added(self, request: Request, arrived: float) -> None:
        """Plan the holes of a new request.

        What is added to a session under its name counts positions from its own first token, and
        vLLM puts it behind the session's tokens when it is that one's turn.
        """
        if self._is_open(request.request_id):
            return
        if request.resumable:
            self._sessions[request.request_id] = request, len(request.mm_features)
        self._plan_holes(request)

    def plan(self, plan: NextStep) -> None:
        """Plan the holes of what sessions have gained."""
        for name, (request, planned) in self._sessions.items():
            if len(request.mm_features) > planned:
                self._sessions[name] = request, len(request.mm_features)
                self._plan_holes(request)

    def _is_open(self, request_id: str) -> bool:
        """Whether a session has this name and goes on."""
        known = self._sessions.get(request_id)
        return known is not None and not known[0].is_finished()

    def _plan_holes(self, request: Request) -> None:
        spans = [
            (first, last + 1)
            for feature in request.mm_features
            for first, last in feature.mm_position.extract_embeds_range()
        ]
        holes = tuple(hole for hole in map(self._plan_span, spans) if hole.blocks)
        if holes != self._holes.get(request.request_id, ()):
            self._holes[request.request_id] = holes
            self._count()

    def scheduled(self, step: Step) -> None:
        """Remember for whom the step's report will be.

        Sessions are not told of: what is known of their tokens is no lower bound, for they may
        take back the last one.
        """
        if self._reporter is not None:
            names = [n for n in step.output.num_scheduled_tokens if n not in self._sessions]
            step.notes[CELLS] = self._forgotten.take(names)

    def completed(self, step: Step) -> None:
        """Learn how many tokens are forgotten."""
        if self._reporter is not None and self._reporter in step.reports:
            write(step.notes[CELLS], step.reports[self._reporter])
            self._count_forgotten()

    def forget(self, request_ids: Collection[str]) -> None:
        """Drop the holes of requests that are gone."""
        for name in request_ids:
            # It may have come again by now, under the name of one that had ended.
            if not self._is_open(name):
                self._holes.pop(name, None)
                self._sessions.pop(name, None)
        self._count()
        self._count_forgotten()

    def _count(self) -> None:
        blocks = sum(hole.blocks for holes in self._holes.values() for hole in holes)
        self.metric.set(self._held.name, blocks * self._groups)

    def _count_forgotten(self) -> None:
        if self._gauge is not None:
            self.metric.set(self._gauge.name, self._forgotten.total)


class FreedBlocks:
    """Takes holes out of a worker's own tables.

    Model runner V1 keeps them on the host and copies them before each step. V2 keeps them on the
    device, under the row of a request's state, and adds to a row only behind its last block; a
    request that was preempted is a new one, with all of its blocks.

    Args:
        runner: The worker's.
        layers: Names of the attentions that see holes.
    """

    def __init__(self, runner: RunnerView, layers: Sequence[str]) -> None:
        self._runner = runner.runner
        groups = runner.kv_cache_config.kv_cache_groups
        wanted = set(layers)
        # By the size of their blocks.
        self._groups: dict[int, list[int]] = {}
        for index, group in enumerate(groups):
            if wanted & set(group.layer_names):
                self._groups.setdefault(group.kv_cache_spec.block_size, []).append(index)

    def take_out(self, plan: StepPlan, common: CommonAttentionMetadata) -> None:
        """Write the null block where a step makes holes; it takes effect in the next step.

        Args:
            plan: Of the step, perhaps in an attention kernel's smaller blocks.
            common: The step's metadata.
        """
        for size, groups in self._groups.items():
            split = size // plan.block_size
            rows, columns = plan.hidden[0, ::split], plan.hidden[1, ::split] // split
            # Only V2's metadata say under which row the state of each request lies.
            if common.req_idx is None:
                self._on_host(groups, rows, columns)
            else:
                self._on_device(groups, common.req_idx[rows], columns)

    def _on_host(self, groups: Sequence[int], rows: np.ndarray, columns: np.ndarray) -> None:
        """Change entries at rows of the batch."""
        batch, requests = self._runner.input_batch, self._runner.requests
        for group in groups:
            batch.block_table[group].block_table.np[rows, columns] = 0
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
                # A request that leaves the batch for a while comes back with what is kept here.
                requests[batch.req_ids[row]].block_ids[group][column] = 0

    def _on_device(self, groups: Sequence[int], rows: np.ndarray, columns: np.ndarray) -> None:
        """Change entries at rows of the requests' states."""
        tables = [self._runner.block_tables.block_tables[group].gpu for group in groups]
        where = torch.from_numpy(np.stack((rows, columns)).astype(np.int64))
        where = where.to(tables[0].device, non_blocking=True)
        for table in tables:
            table[where[0], where[1]] = 0
