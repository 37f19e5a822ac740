"""Answer tokens that the upper layers forget after their own step (section 3.3, equation 6).

A token is always attended to by itself: it is written behind the last token that was kept, and if
the text predictor does not keep it, the next one is written over it. So all that there is of a
request is the number of tokens it has forgotten. It lies on the device under the id of the
request's first block, which no other request has, because prefix caching is refused. Where the
upper layers have several block tables, it lies under the first block of each.

The counters go to the scheduler with each step's result where it is to give no blocks for tokens
that are forgotten (`block_holes.forgotten`).

Lower layers forget nothing. A request that is computed anew after preemption therefore has the
same hidden states at layer l, and the predictor forgets the same tokens again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context

from vllm_plugins.engine.block_holes.plan import without_rows
from vllm_plugins.engine.block_holes.view import HoleBuilder, HoleView
from vllm_plugins.engine.host_copy import HostCopy
from vllm_plugins.visual_tokens.dynamic_llava.predictors import keeps

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.outputs import ModelRunnerOutput

    from vllm_plugins.engine.block_holes.plan import StepPlan
    from vllm_plugins.engine.step_reports import Report
    from vllm_plugins.engine.worker_host import RunnerView


@dataclass
class TextView(HoleView):
    """What the upper layers' builders share where answer tokens are forgotten.

    Attributes:
        leader: Name of an upper layer's attention, whose builder tells who is in a step.
        forgotten: Answer tokens that a request has forgotten, by its first block in each table that
            these layers have of it; int32, shape (blocks,).
        latest: Position of the answer token that it forgot last, likewise; int64, shape (blocks,).
        reach: Position behind its last hole, likewise; int32, shape (blocks,).
        prompts: Reads the length of each prompt of a step's batch.
        batch: The step's requests, as the leader's builder left them.
    """

    leader: str = ""
    forgotten: torch.Tensor | None = None
    latest: torch.Tensor | None = None
    reach: torch.Tensor | None = None
    prompts: Callable[[CommonAttentionMetadata], np.ndarray] | None = None
    batch: Batch | None = None

    def on_kv_cache_ready(self, runner: RunnerView) -> None:
        """Make the flags and counters."""
        super().on_kv_cache_ready(runner)
        self.prompts = runner.prompt_lengths
        [(_, flags)] = self.flags.items()
        self.forgotten = torch.zeros(len(flags), dtype=torch.int32, device=flags.device)
        self.reach = torch.zeros_like(self.forgotten)
        self.latest = torch.full((len(flags),), -1, dtype=torch.int64, device=flags.device)


@dataclass
class Batch:
    """Prompts of a step's requests, in a persistent tensor that a captured graph finds again.

    Attributes:
        prompts: Length of each prompt; int64, shape (requests,).
        lengths: The same on the host, int64, of the step's requests without padding.
    """

    prompts: torch.Tensor
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass(frozen=True)
class TableRows:
    """Persistent tensors of the layers that share a block table.

    Attributes:
        firsts: Id of each request's first block, int64, shape (requests,).
        slots: Of the step's rows, int64, shape (rows,).
        rows: 0, 1, 2, ..., int64, shape (rows,).
    """

    firsts: torch.Tensor
    slots: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def empty(cls, requests: int, rows: int, device: torch.device) -> TableRows:
        """Allocate for so many requests and rows."""
        integers: dict[str, Any] = {"dtype": torch.int64, "device": device}
        return cls(
            torch.zeros(requests, **integers),
            torch.full((rows,), -1, **integers),
            torch.arange(rows, **integers),
        )


class TextBuilder(HoleBuilder):
    """Mixed in before a metadata builder: holes, and sequences shorter by what is forgotten."""

    hole_view: TextView
    text_rows: TableRows | None = None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Build the metadata of a step, whose new requests have forgotten nothing."""
        if self.hole_view.forgotten is not None:
            if self.hole_view.leader in self.layer_names:
                self._text_lead(common_attn_metadata)
            self._text_enter(common_attn_metadata)
        return super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)

    def _text_most(self, requests: int) -> int:
        """Return how many requests to allocate for, where a step has so many."""
        scheduler = self.vllm_config.scheduler_config  # type: ignore[attr-defined]
        return max(requests, int(scheduler.max_num_seqs))

    def _text_lead(self, common: CommonAttentionMetadata) -> None:
        """Remember who is in the step."""
        view, requests = self.hole_view, common.num_reqs
        if view.batch is None:
            most = self._text_most(requests)
            view.batch = Batch(torch.zeros(most, dtype=torch.int64, device=self.device))
        assert view.prompts is not None
        lengths = view.prompts(common)[:requests].astype(np.int64)
        view.batch.lengths = lengths
        view.batch.prompts[: len(lengths)].copy_(torch.from_numpy(lengths), non_blocking=True)

    def _text_enter(self, common: CommonAttentionMetadata) -> None:
        """Remember where the step's requests are counted, and begin with those that begin.

        A streaming session takes back the token that ended its turn. Where steps are scheduled
        ahead that token's row may have been computed, and forgotten, by then.
        """
        requests, view = common.num_reqs, self.hole_view
        forgotten, latest, reach = view.forgotten, view.latest, view.reach
        assert forgotten is not None and latest is not None and reach is not None
        if self.text_rows is None:
            scheduler = self.vllm_config.scheduler_config  # type: ignore[attr-defined]
            rows = max(len(common.slot_mapping), scheduler.max_num_batched_tokens)
            self.text_rows = TableRows.empty(self._text_most(requests), rows, self.device)
        firsts = self.text_rows.firsts[:requests].copy_(common.block_table_tensor[:requests, 0])
        begins = common.seq_lens[:requests] - common.query_start_loc[: requests + 1].diff()
        taken_back = latest[firsts] >= begins
        forgotten[firsts] = (forgotten[firsts] - taken_back.int()).masked_fill_(begins == 0, 0)
        latest[firsts] = latest[firsts].masked_fill_(taken_back, -1)
        reach[firsts] = reach[firsts].masked_fill_(begins == 0, 0)

    def hole_hide(self, plan: StepPlan) -> tuple[Any, torch.Tensor]:
        """Make holes in the middle of a step, and remember how far they reach."""
        reach, own = self.hole_view.reach, self.text_rows
        assert reach is not None and own is not None
        # Requests follow one another, and the columns of each ascend.
        last = plan.hidden[:, np.diff(plan.hidden[0], append=-1) != 0]
        requests, columns = torch.from_numpy(last).to(self.device, non_blocking=True)
        reach[own.firsts[requests]] = ((columns + 1) * plan.block_size).int()
        return super().hole_hide(plan)

    def hole_compact(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """Return a step's metadata with the tables, lengths and slots that these layers see."""
        own, forgotten, reach = self.text_rows, self.hole_view.forgotten, self.hole_view.reach
        assert own is not None and forgotten is not None and reach is not None
        held, firsts = copy(common), own.firsts[: common.num_reqs]
        # Behind what is held a table may have nothing, or what another request has left there.
        lengths = common.seq_lens - forgotten[firsts]
        # Unless a hole is there, behind answers of which more is forgotten than follows the hole.
        beyond = (reach[firsts] - lengths).clamp_min_(0)
        held.seq_lens = lengths + beyond
        seen = super().hole_compact(held)
        seen.seq_lens.sub_(beyond)
        slots = own.slots[: len(common.slot_mapping)]
        mine = self._text_slots(seen, own.rows[: len(slots)])
        # Padding has no slot.
        slots.copy_(torch.where(common.slot_mapping < 0, common.slot_mapping, mine))
        seen.slot_mapping = slots
        return seen

    def _text_slots(self, seen: CommonAttentionMetadata, rows: torch.Tensor) -> torch.Tensor:
        """Return the slots of rows, which are the last that their requests see.

        Args:
            seen: Tables, lengths and where each request's rows end.
            rows: 0, 1, 2, ..., int64, shape (rows,).
        """
        size = self.kv_cache_spec.block_size
        ends = seen.query_start_loc[1 : seen.num_reqs + 1].long()
        request = torch.searchsorted(ends, rows, right=True).clamp_(max=seen.num_reqs - 1)
        place = (seen.seq_lens[request] - ends[request] + rows).clamp_min_(0)
        blocks = seen.block_table_tensor[request, place // size]
        return blocks.long() * size + place % size

    def hole_slots(
        self, common: CommonAttentionMetadata, seen: CommonAttentionMetadata, rows: torch.Tensor
    ) -> torch.Tensor:
        """Return the slots of the rows that are left, shape (m,)."""
        assert self.text_rows is not None
        return self._text_slots(seen, self.text_rows.rows[: len(rows)])


class TextCache:
    """Decides on answer tokens and keeps the counters.

    Args:
        view: The upper layers'.
        layers: Names of their attentions.
        predictor: P_OT: from (..., h) to logits (..., 2).
    """

    def __init__(self, view: TextView, layers: Sequence[str], predictor: nn.Module) -> None:
        self._view = view
        self._layers = layers
        self._predictor = predictor

    @property
    def step(self) -> CommonAttentionMetadata | None:
        """Metadata of the step whose forward pass is running, or None without a KV cache."""
        context, name = get_forward_context(), self._layers[0]
        if self._view.forgotten is None or not isinstance(context.attn_metadata, dict):
            return None
        if name not in context.attn_metadata:
            return None
        step: CommonAttentionMetadata | None = self._view.builder_of(name).hole_step
        return step

    @contextmanager
    def own_slots(self) -> Iterator[None]:
        """Let the upper layers write behind what they have kept, where all rows go on."""
        context = get_forward_context()
        if self.step is None:
            yield
            return
        before = context.slot_mapping
        mine: dict[str, Any] = dict(before)
        for name in self._layers:
            mine[name] = self._view.builder_of(name).text_rows.slots[: len(mine[name])]
        context.slot_mapping = mine
        try:
            yield
        finally:
            context.slot_mapping = before

    def forget_again(self, plan: StepPlan | None, hidden: torch.Tensor) -> StepPlan | None:
        """Leave out answer tokens that a request computed anew had forgotten before.

        Only after preemption does a step have answer tokens that are not their request's last row;
        the number that is left out is not known on the host, which waits for it.

        Args:
            plan: Of the step so far.
            hidden: Input of layer l, shape (tokens, h).

        Returns:
            The plan without those rows, whose requests have forgotten them.
        """
        step = self.step
        if step is None or step.max_query_len == 1:
            return plan
        rows, request, starts = self._answers_computed_anew(step)
        if not len(rows):
            return plan
        device = hidden.device
        on_device = torch.from_numpy(rows).to(device)
        kept = self._keeps(hidden[on_device]).cpu().numpy()
        dropped, owner = rows[~kept], request[~kept]
        if not len(dropped):
            return plan
        counts = np.bincount(owner, minlength=step.num_reqs).astype(np.int32)
        self._forget(torch.from_numpy(counts).to(device))
        return without_rows(plan, starts, dropped)

    def _answers_computed_anew(
        self, step: CommonAttentionMetadata
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return rows of answer tokens besides each request's last, their requests, and starts."""
        batch = self._view.batch
        assert batch is not None and step.seq_lens_cpu_upper_bound is not None
        prompts = batch.lengths
        requests = len(prompts)
        starts = step.query_start_loc_cpu.numpy()[: requests + 1]
        ends = step.seq_lens_cpu_upper_bound.numpy()[:requests]
        rows = np.arange(int(starts[-1]))
        request = np.searchsorted(starts[1:], rows, side="right")
        position = rows - starts[1:][request] + ends[request]
        chosen = (position >= prompts[request]) & (position < ends[request] - 1)
        return rows[chosen], request[chosen], starts

    def forget(self, positions: torch.Tensor, hidden: torch.Tensor) -> None:
        """Decide on each request's last row, if it is an answer token.

        Args:
            positions: Of the step's rows, int64, shape (tokens,).
            hidden: Input of layer l, shape (tokens, h).
        """
        step, batch = self.step, self._view.batch
        if step is None or batch is None:
            return
        requests = step.num_reqs
        last = (step.query_start_loc[1 : requests + 1] - 1).clamp_min(0).long()
        at = positions[last]
        forgets = (at >= batch.prompts[:requests]) & ~self._keeps(hidden[last])
        self._forget(forgets.int(), torch.where(forgets, at, -1))

    def _keeps(self, hidden: torch.Tensor) -> torch.Tensor:
        kept = keeps(self._predictor(hidden))
        group = get_tp_group()
        if group.world_size > 1:
            # Ranks may differ by rounding, and their caches would then be of different lengths.
            kept = group.broadcast(kept.int(), src=0).bool()
        return kept

    def _forget(self, counts: torch.Tensor, latest: torch.Tensor | None = None) -> None:
        """Add to the counters of the step's requests.

        Args:
            counts: Tokens that each forgets; int32, shape (requests,).
            latest: Position of its last row, if that is forgotten, else -1; int64, (requests,).
        """
        view = self._view
        assert view.forgotten is not None and view.latest is not None
        builders = {id(found): found for found in map(view.builder_of, self._layers)}
        for builder in builders.values():
            firsts = builder.text_rows.firsts[: len(counts)]
            view.forgotten.index_add_(0, firsts, counts)
            if latest is not None:
                view.latest.index_copy_(0, firsts, latest)

    def report(self) -> Report | None:
        """Begin to tell how many tokens each request of the last step has forgotten by now.

        Returns:
            What waits for the counters and reads them, by the names of a result's requests; None
            if there was no step yet.
        """
        view = self._view
        if view.forgotten is None or view.batch is None:
            return None
        firsts = view.builder_of(self._layers[0]).text_rows.firsts[: len(view.batch.lengths)]
        counters = HostCopy(view.forgotten[firsts])

        def read(output: ModelRunnerOutput) -> dict[str, int]:
            counters.wait()
            [counts] = counters.arrays()
            return dict(zip(output.req_ids, counts.tolist(), strict=True))

        return read
