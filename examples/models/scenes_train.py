"""Training of the scenes model, in five stages.

1. `tower`: the tower alone learns from the truth of every patch, through a linear probe that is
   thrown away.
2. `names`: the projector learns to put patches near the embeddings of the words that they are
   called by; the tower learns on.
3. `words`: all but the tower learns questions and descriptions, from the patches of things and a
   few of the others, which is several times faster than from all.
4. `whole`: the same from all patches, as the model is used.
5. `again`: a second, lower cosine of the same.

Every stage has a warm-up and a cosine of its own, and keeps the losses of the stages before it;
while the tower stands still in `words`, so does the probe.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from scenes_batches import Batch, Scenes, collate
from scenes_forward import patch_states, read_image, row_logits
from scenes_model import PATCHES, Shape, make_model, save
from scenes_patches import FIELDS, Names, Probe
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

CLIP, WARM_UP, DECAY, BETAS = 1.0, 50, 0.01, (0.9, 0.98)
# Each run draws scenes of its own, below the held-out ones.
_SEEDS_OF_A_RUN = 10_000_000


@dataclass(frozen=True)
class Stage:
    """One stage of the training.

    Attributes:
        name: what the progress bar calls it.
        steps: of the committed model's run; others have as many in proportion.
        share: of the minutes that a run may take.
        batches: images of a step, in multiples of the run's batch.
        kept: patches computed of each image.
        rate: the largest learning rate.
        tower: the tower's learning rate as a share of the others'; at 0 neither it nor the probe
            learns. What it has learnt is soon lost at the rate of the others.
        names: whether patches learn their names.
        words: whether questions are learnt.
        head: whether the output starts as a copy of the embeddings, so that what a patch is called
            is likely said.
    """

    name: str
    steps: int
    share: float
    batches: int
    kept: int
    rate: float
    tower: float = 1.0
    names: bool = True
    words: bool = True
    head: bool = False


STAGES = (
    Stage("tower", 900, 0.11, 4, 80, 2e-3, names=False, words=False),
    Stage("names", 700, 0.09, 4, 80, 2e-3, words=False),
    Stage("words", 1200, 0.23, 1, 80, 1.5e-3, tower=0.0, head=True),
    Stage("whole", 1000, 0.43, 1, PATCHES, 1.2e-3, tower=0.1),
    Stage("again", 320, 0.14, 1, PATCHES, 8e-4, tower=0.1),
)
STEPS = sum(stage.steps for stage in STAGES)


@dataclass(frozen=True)
class Run:
    """What a training run is given.

    Attributes:
        shape: of the language model.
        steps: of all stages together.
        minutes: stop then at the latest; a run that they end is not reproducible.
        batch: images of a step; the stages without words take four times as many.
        seed: of the weights and the scenes.
        device: where to train.
        workers: processes that draw scenes; 0 draws them in this one.
    """

    shape: Shape
    steps: int
    minutes: float
    batch: int
    seed: int
    device: torch.device
    workers: int


class Trainer:
    """A model in training, its probe and what the last steps got right."""

    def __init__(self, run: Run) -> None:
        torch.manual_seed(run.seed)
        self.model = make_model(run.shape).to(run.device).train()
        self.right: dict[str, float] = {}
        self._run = run
        self._probe = Probe().to(run.device)
        self._first = run.seed * _SEEDS_OF_A_RUN

    def train(self, out: Path) -> LlavaForConditionalGeneration:
        """Run all stages; each leaves its result in `out`."""
        from rich.progress import Progress, TimeElapsedColumn

        with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as bar:
            for stage in STAGES:
                steps = max(1, round(stage.steps * self._run.steps / STEPS))
                task = bar.add_task(stage.name, total=steps)
                for _ in self._stage(stage, steps):
                    bar.update(task, advance=1, description=f"{stage.name}: {self._summary()}")
                save(self.model, out)
        return self.model

    def _summary(self) -> str:
        return ", ".join(f"{name} {share:.1%}" for name, share in self.right.items())

    def _stage(self, stage: Stage, steps: int) -> Iterator[None]:
        optimizer = self._optimizer(stage)
        start, seconds = time.monotonic(), 60 * stage.share * self._run.minutes
        self.right = {}
        if stage.head:
            llava = self.model
            llava.lm_head.weight.data.copy_(llava.model.language_model.embed_tokens.weight)
        for step, batch in enumerate(self._batches(stage, steps)):
            gone = max(step / steps, (time.monotonic() - start) / seconds)
            if gone >= 1:
                break
            rate = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * gone))
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * stage.rate * rate
            self._step(stage, batch.to(self._run.device), optimizer)
            yield

    def _optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        llava = self.model.model
        rest = (llava.multi_modal_projector, llava.language_model, self.model.lm_head, self._probe)
        groups = [
            {"params": list(llava.vision_tower.parameters()), "share": stage.tower},
            {"params": [p for module in rest for p in module.parameters()], "share": 1.0},
        ]
        return torch.optim.AdamW(groups, betas=BETAS, weight_decay=DECAY)

    def _batches(self, stage: Stage, steps: int) -> Iterator[Batch]:
        batch = stage.batches * self._run.batch
        count = steps * batch
        scenes = Scenes(self._first, count, stage.kept)
        self._first += count
        return iter(
            torch.utils.data.DataLoader(
                scenes, batch, num_workers=self._run.workers, collate_fn=collate
            )
        )

    def _step(self, stage: Stage, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
        with torch.autocast(self._run.device.type, torch.bfloat16):
            loss, right = self._losses(stage, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        optimizer.step()
        for name, share in right.items():
            self.right[name] = 0.95 * self.right.get(name, share) + 0.05 * share

    def _losses(self, stage: Stage, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        with torch.set_grad_enabled(stage.tower > 0):
            states = patch_states(self.model, batch.images, batch.kept)
        truth = batch.truth.gather(1, batch.kept[..., None].expand(-1, -1, len(FIELDS)))
        loss, right = states.new_zeros(()), {}
        if stage.tower > 0:
            loss, right = self._probe.loss(states, truth)
        if stage.names:
            embedded = self.model.model.multi_modal_projector(states)
            words = self.model.model.language_model.embed_tokens.weight
            named, right["names"] = Names.loss(embedded, words, truth)
            loss = loss + named
        if not stage.words:
            return loss, right
        read = read_image(self.model, states, batch.kept)
        for name, ids, wanted in (
            ("answers", batch.asked, batch.asked_wanted),
            ("talk", batch.talk, batch.talk_wanted),
        ):
            logits = row_logits(self.model, read, ids).float()
            counts = wanted >= 0
            logits, told = logits[counts], wanted[counts]
            loss = loss + torch.nn.functional.cross_entropy(logits, told)
            right[name] = (logits.argmax(-1) == told).float().mean().item()
        return loss, right
