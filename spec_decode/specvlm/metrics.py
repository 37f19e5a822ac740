"""Metrics of SpecVLM. vLLM's own counters tell how many drafts were accepted."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from vllm_plugins.metrics import ACTIVE, Metrics, MetricSpec, engine_labels
from vllm_plugins.spec_decode.specvlm.settings import Choice, Operator

if TYPE_CHECKING:
    from vllm.config import VllmConfig

IMAGES = MetricSpec(
    "specvlm_images_total",
    "counter",
    "Images that were compressed for the drafter, by what made their rows.",
    (),
    "operator",
)
ROWS = MetricSpec(
    "specvlm_draft_rows_total",
    "counter",
    "Rows of the draft passes over prompts with images that were compressed: kept, or dropped.",
    (),
    "state",
)
ALL = (IMAGES, ROWS)
STATES = ("kept", "dropped")


class DraftTally:
    """Counts on the device and the host what becomes of images.

    Args:
        select_from: Operators that the gate picks from.
    """

    def __init__(self, select_from: tuple[Operator, ...]) -> None:
        self._select_from = select_from
        self._host: Counter[str] = Counter()
        self._device: torch.Tensor | None = None
        self._copy = torch.zeros(len(select_from), dtype=torch.int64)
        self.rows = dict.fromkeys(STATES, 0)

    def count(self, choice: Choice, images: int) -> None:
        """Count images of which the host knows what makes their rows."""
        self._host[choice] += images

    def count_picks(self, picks: torch.Tensor) -> None:
        """Count what the gate picked, without waiting for it.

        Args:
            picks: Index in ``select_from`` for each image, int64, shape (images,).
        """
        if self._device is None:
            self._device = torch.zeros_like(self._copy, device=picks.device)
            if picks.is_cuda:
                self._copy = self._copy.pin_memory()
        self._device.index_add_(0, picks, torch.ones_like(picks))
        # What is read is a step or more behind, which a counter may be.
        self._copy.copy_(self._device, non_blocking=True)

    def count_rows(self, kept: int, total: int) -> None:
        """Count the rows of a pass that compresses images."""
        self.rows["kept"] += kept
        self.rows["dropped"] += total - kept

    def images(self) -> Counter[str]:
        """Return how many images each operator or combination has made rows of so far."""
        total = self._host.copy()
        total.update(dict(zip(self._select_from, self._copy.tolist(), strict=True)))
        return total


class DraftMeter:
    """Publishes a tally, once in an engine: its ranks all do the same.

    Args:
        config: The engine's configuration.
        tally: Of this rank's drafter.
    """

    def __init__(self, config: VllmConfig, tally: DraftTally) -> None:
        from vllm.distributed import get_tp_group

        self._tally = tally
        self._metrics: Metrics | None = None
        self._before: Counter[tuple[str, str]] = Counter()
        if get_tp_group().is_first_rank:
            self._metrics = Metrics([ACTIVE, *ALL], engine_labels(config))
            self._metrics.set(ACTIVE.name, 1, "specvlm")
            for state in STATES:
                self._metrics.inc(ROWS.name, 0, state)

    def step(self) -> None:
        """Publish what has been counted since the last time."""
        if self._metrics is None:
            return
        now = {(IMAGES.name, label): value for label, value in self._tally.images().items()}
        now |= {(ROWS.name, label): value for label, value in self._tally.rows.items()}
        for key, value in now.items():
            if value != self._before[key]:
                self._metrics.inc(key[0], value - self._before[key], key[1])
                self._before[key] = value
