"""Fills the slots that a step leaves an image with the rows that an operator makes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from vllm.distributed import get_tp_group

from vllm_plugins.engine.block_holes.plan import Span
from vllm_plugins.spec_decode.specvlm.compressor import VisualCompressor, prune_seed
from vllm_plugins.spec_decode.specvlm.gate import QuestionGate, mixture
from vllm_plugins.spec_decode.specvlm.settings import OPERATORS, Choice, SpecVLMSettings

if TYPE_CHECKING:
    from vllm_plugins.engine.block_holes.plan import Choice as Slots
    from vllm_plugins.engine.block_holes.plan import StepPlan
    from vllm_plugins.spec_decode.specvlm.draft_rows import StepImages
    from vllm_plugins.spec_decode.specvlm.metrics import DraftTally

Made = tuple[torch.Tensor, torch.Tensor]
"""Rows, shape (images, selected, hidden), and their offsets, int64, shape (images, selected)."""


class Alike(NamedTuple):
    """What images have in common that are compressed at once.

    Attributes:
        candidates: Rows to compress.
        selected: Rows to make.
        asked: Whether the gate can see the question.
    """

    candidates: int
    selected: int
    asked: bool


class ImageRows:
    """Compresses the images of a step. Nothing that the gate decides is read on the host.

    Args:
        compressor: The operators.
        gate: Picks among them.
        settings: Mode and ratios.
        tally: Counts what was done.
    """

    def __init__(
        self,
        compressor: VisualCompressor,
        gate: QuestionGate,
        settings: SpecVLMSettings,
        tally: DraftTally,
    ) -> None:
        self._compressor, self._gate = compressor, gate
        self._settings, self._tally = settings, tally
        self.images: StepImages | None = None

    def fill(
        self,
        plan: StepPlan,
        own: torch.Tensor,
        places: torch.Tensor,
        fused: torch.Tensor,
        positions: torch.Tensor,
        features: torch.Tensor,
    ) -> None:
        """Write the images' rows and positions over those that stand for them.

        Args:
            plan: Of the step.
            own: The rows that go on, shape (m, hidden); changed.
            places: Their positions, int64, shape (m,); changed.
            fused: All rows of the step, shape (n, hidden).
            positions: Theirs, int64, shape (n,).
            features: The target's, shape (n, hidden).
        """
        assert self.images is not None
        self._tally.count_rows(len(plan.rows), self.images.total_rows)
        groups: dict[Alike, list[tuple[Slots, Span | None]]] = defaultdict(list)
        for slots in plan.choices:
            question = self.images.question(slots)
            alike = Alike(slots.candidates, slots.selected, question is not None)
            groups[alike].append((slots, question))
        for alike, group in groups.items():
            images = [slots for slots, _ in group]
            rows = torch.stack([fused[x.first_row :][: alike.candidates] for x in images])
            questions = [question for _, question in group if question is not None]
            made, offsets = self._compress(alike, images, rows, questions, features)
            for slots, out, offset in zip(images, made, offsets, strict=True):
                here = slice(slots.at, slots.at + slots.selected)
                own[here] = out
                places[here] = positions[slots.first_row + offset]

    def _compress(
        self,
        alike: Alike,
        images: Sequence[Slots],
        rows: torch.Tensor,
        questions: Sequence[Span],
        features: torch.Tensor,
    ) -> Made:
        assert self.images is not None
        settings, count = self._settings, alike.selected
        seeds = [prune_seed(self.images.content(x), settings.seed) for x in images]
        if settings.mode == "select" and alike.asked:
            picks = self._pick(self._logits(questions, features))
            return self._select(picks, rows, count, seeds)
        if settings.mode == "weighted" and alike.asked:
            weights = mixture(self._logits(questions, features))
            self._tally.count("weighted", len(images))
            return self._compressor.compress("weighted", rows, count, seeds, weights)
        # Without the question nothing weighs the parts of a sum, or picks one.
        choice: Choice = "concat" if settings.mode == "concat" else settings.default_operator
        self._tally.count(choice, len(images))
        return self._compressor.compress(choice, rows, count, seeds)

    def _logits(self, questions: Sequence[Span], features: torch.Tensor) -> torch.Tensor:
        last = torch.stack([features[end - 1] for _, end in questions])
        mean = torch.stack([features[start:end].mean(0) for start, end in questions])
        return cast(torch.Tensor, self._gate(last, mean))

    def _pick(self, logits: torch.Tensor) -> torch.Tensor:
        """Return for each image which of ``select_from`` it gets; int64, shape (images,)."""
        allowed = [logits[:, OPERATORS.index(x)] for x in self._settings.select_from]
        picks = torch.stack(allowed, 1).argmax(1)
        group = get_tp_group()
        # A tie must not fall differently on another rank, whose keys would not fit ours.
        return group.broadcast(picks) if group.world_size > 1 else picks

    def _select(
        self, picks: torch.Tensor, rows: torch.Tensor, count: int, seeds: Sequence[int]
    ) -> Made:
        operators = self._settings.select_from
        self._tally.count_picks(picks)
        made = [self._compressor.compress(x, rows, count, seeds) for x in operators]
        image = torch.arange(len(rows), device=rows.device)
        # Every operator runs, on one image's rows each: reading the pick would stall the device.
        return (
            torch.stack([out for out, _ in made])[picks, image],
            torch.stack([offsets for _, offsets in made])[picks, image],
        )
