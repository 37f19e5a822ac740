"""Metrics of Dynamic-LLaVA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_plugins.metrics import ACTIVE, Metrics, MetricSpec, engine_labels

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_plugins.engine.block_holes.plan import StepPlan

IMAGE_TOKENS = MetricSpec(
    "dynamic_llava_image_tokens_total",
    "counter",
    "Image tokens of which some were chosen, by what became of them in the upper layers: kept or "
    "dropped.",
    (),
    "fate",
)
HIDDEN_BLOCKS = MetricSpec(
    "dynamic_llava_hidden_blocks_total",
    "counter",
    "Cache blocks that were hidden from the upper layers.",
)
STEPS = MetricSpec(
    "dynamic_llava_pruned_steps_total",
    "counter",
    "Model steps in which image tokens were dropped.",
)
RECHOSEN = MetricSpec(
    "dynamic_llava_partial_choices_total",
    "counter",
    "Images whose beginning was in the prefix cache, so that only the rest could be chosen from.",
)
FREED = MetricSpec(
    "dynamic_llava_freed_blocks",
    "gauge",
    "Cache blocks that the upper layers give back or will, of the requests that the engine holds.",
)
FORGOTTEN = MetricSpec(
    "dynamic_llava_forgotten_tokens",
    "gauge",
    "Answer tokens that the upper layers are known to have forgotten and that take no slots there, "
    "of the requests that hold blocks.",
)

ALL = (IMAGE_TOKENS, HIDDEN_BLOCKS, STEPS, RECHOSEN)
FATES = ("kept", "dropped")


@dataclass
class Tally:
    """What a worker has dropped so far.

    Attributes:
        kept: Image tokens that went on, of images from which some were chosen.
        dropped: Those that did not.
        hidden: Cache blocks hidden from the upper layers.
        steps: Steps with one of them.
        partial: Images of which only a part was in the step.
    """

    kept: int = 0
    dropped: int = 0
    hidden: int = 0
    steps: int = 0
    partial: int = 0

    def add(self, plan: StepPlan) -> None:
        """Count a step's plan."""
        for choice in plan.choices:
            dropped = choice.candidates - choice.selected
            self.dropped += dropped
            self.kept += choice.present - dropped
            self.partial += choice.hole.end - choice.hole.start > choice.present
        self.hidden += plan.hidden.shape[1]
        self.steps += 1


class Meter:
    """Writes a tally as metrics, once in an engine: its ranks all do the same.

    Args:
        config: The engine's configuration.
    """

    def __init__(self, config: VllmConfig) -> None:
        from vllm.distributed import get_tp_group

        self._metrics: Metrics | None = None
        self._before = Tally()
        if get_tp_group().is_first_rank:
            self._metrics = Metrics([ACTIVE, *ALL], engine_labels(config))
            self._metrics.set(ACTIVE.name, 1, "dynamic_llava")
            for fate in FATES:
                self._metrics.inc(IMAGE_TOKENS.name, 0, fate)

    def write(self, tally: Tally) -> None:
        """Add what was dropped since the last call."""
        before, metrics = self._before, self._metrics
        if metrics is None or tally == before:
            return
        metrics.inc(IMAGE_TOKENS.name, tally.kept - before.kept, "kept")
        metrics.inc(IMAGE_TOKENS.name, tally.dropped - before.dropped, "dropped")
        metrics.inc(HIDDEN_BLOCKS.name, tally.hidden - before.hidden)
        metrics.inc(STEPS.name, tally.steps - before.steps)
        metrics.inc(RECHOSEN.name, tally.partial - before.partial)
        self._before = Tally(**vars(tally))
