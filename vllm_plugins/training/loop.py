"""The training loop: accumulation to a global batch, schedule, log, checkpoints, a graceful stop.

A technique is a module whose forward turns a :class:`Batch` into a :class:`Loss`; the loop knows
nothing else of it. Every random number of a micro-batch follows from the run's seed and the
micro-batch's number, and so does the order of the data: a run that was interrupted continues bit
for bit as if it had not been, on the same machine and number of processes.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from vllm_plugins.errors import PluginError
from vllm_plugins.training import checkpoints
from vllm_plugins.training.batches import Batch, Collator, Order
from vllm_plugins.training.data import Sample
from vllm_plugins.training.journal import Journal
from vllm_plugins.training.processes import Processes

Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class Loss:
    """What a module returns for a micro-batch.

    Sums, not means, so that micro-batches of unequal weight add up to the mean of the whole batch.

    Attributes:
        total: Sum of the loss over ``weight`` units, such as tokens or samples; has the gradient.
        weight: Number of units; shape ().
        terms: Further sums over the same units, for the log; without gradient.
    """

    total: torch.Tensor
    weight: torch.Tensor
    terms: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LoopOptions:
    """How a run goes.

    Attributes:
        out: Its folder.
        steps: Steps of the optimiser.
        batch: Samples of a step, over all processes.
        micro_batch: Samples of one forward of one process; divides ``batch`` by the processes.
        schedule: Of the learning rate, after the warm-up.
        warmup: Share of the steps in which the rate rises from 0.
        clip: Largest norm of the gradient; 0 does not clip.
        seed: Of order and randomness.
        save_every: Steps between checkpoints.
        eval_every: Steps between evaluations; there is one at the end in any case.
        device: Such as ``cpu`` or ``cuda``.
        dtype: Of matrix products; the trained weights are float32 in any case.
        workers: Processes that prepare batches; 0 prepares them in this one.
        technique: What else a resumed run must have in common with its beginning, as in JSON.
    """

    out: Path
    steps: int
    batch: int
    micro_batch: int
    schedule: Schedule = "constant"
    warmup: float = 0.0
    clip: float = 0.0
    seed: int = 0
    save_every: int = 500
    eval_every: int = 500
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    workers: int = 0
    technique: Mapping[str, Any] = field(default_factory=dict)

    def rate(self, step: int) -> float:
        """Return the share of the learning rate at a step, 0 being the first."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        if self.schedule == "constant":
            return 1.0
        done = (step - warm) / max(1, self.steps - warm)
        return 0.5 * (1 + math.cos(math.pi * done))


Evaluate = Callable[[], Mapping[str, float]]


class Trainer:
    """Runs one training.

    Args:
        module: Takes a batch and the share of training that is done, and returns a ``Loss``.
            Parameters that are to be trained require a gradient, the others do not.
        groups: Parameter groups of AdamW, with their learning rates.
        samples: What is trained on.
        collator: Makes batches of them.
        options: How the run goes.
        ranks: The processes that train together.
        evaluate: Figures of the module as it is; given to the first process alone, for which the
            others wait in the next step.

    Raises:
        PluginError: The batch is not a multiple of what one forward of all processes takes.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[dict[str, Any]],
        samples: Sequence[Sample],
        collator: Collator,
        options: LoopOptions,
        ranks: Processes | None = None,
        evaluate: Evaluate | None = None,
    ) -> None:
        self._options, self._ranks = options, ranks or Processes()
        self._evaluate = evaluate
        together = options.micro_batch * self._ranks.count
        if options.batch % together:
            raise PluginError(
                "--batch",
                f"{options.batch} is not a multiple of {together}, one forward of all processes",
                "change --batch or --micro-batch",
            )
        self._forwards = options.batch // together
        letters = tuple(sample.letters for sample in samples)
        self._order = Order(letters, options.micro_batch, options.seed, self._ranks.count)
        self._samples, self._collator = samples, collator
        self._module = module
        self._trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._groups = [dict(group, base=group["lr"]) for group in groups]
        self._optimizer = torch.optim.AdamW(self._groups)
        self._parallel = self._wrap(module)
        self._step, self._stop, self._saved = 0, False, True

    def _wrap(self, module: nn.Module) -> nn.Module:
        if self._ranks.count == 1:
            return module
        devices = [torch.cuda.current_device()] if self._options.device.startswith("cuda") else None
        # A micro-batch may leave parameters unused, such as those of an operator nobody picked.
        # Gradients lie in the buckets that are exchanged, not beside them.
        return DistributedDataParallel(
            module,
            device_ids=devices,
            find_unused_parameters=True,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self._step

    def resume(self) -> None:
        """Continue from the newest checkpoint in the run's folder.

        Raises:
            PluginError: There is none, or it is of another run.
        """
        path = checkpoints.latest(self._options.out)
        if path is None:
            raise PluginError(
                "--resume", f"{self._options.out} has no checkpoint", "start without --resume"
            )
        state = checkpoints.read_state(path)
        for name, value in self._settings().items():
            if state.settings.get(name) != value:
                raise PluginError(
                    "--resume",
                    f"{name} was {state.settings.get(name)} and is {value}",
                    "resume with the options of that run",
                )
        weights = checkpoints.load_tensors(path / "weights.safetensors", self._trained)
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(weights[name])
        file = path / "optimizer.safetensors"
        checkpoints.load_optimizer_state(self._optimizer, self._trained, file)
        self._step = state.step

    def _settings(self) -> dict[str, Any]:
        options = self._options
        return {
            "seed": options.seed,
            "batch": options.batch,
            "micro_batch": options.micro_batch,
            "processes": self._ranks.count,
            "samples": len(self._samples),
            "steps": options.steps,
            "schedule": options.schedule,
            "warmup": options.warmup,
            "clip": options.clip,
            **options.technique,
        }

    def run(self) -> bool:
        """Train to the last step; return whether it was reached.

        The first interrupt saves a checkpoint after the step it falls in and stops.
        """
        self._options.out.mkdir(parents=True, exist_ok=True)
        batches = self._batches()
        journal = Journal(self._options.out, self._step, self._options.steps, self._ranks.first)
        with self._interruptible(), journal:
            while self._step < self._options.steps and not self._stopped():
                self._advance(batches, journal)
        if not self._saved:
            self.save()
        return self._step == self._options.steps

    def _advance(self, batches: Iterator[Batch], journal: Journal) -> None:
        began = time.perf_counter()
        figures = self._train_step(batches)
        self._step += 1
        self._saved = False
        journal.step(self._step, figures, time.perf_counter() - began)
        last = self._step == self._options.steps
        if self._evaluate and (last or self._step % self._options.eval_every == 0):
            journal.evaluation(self._step, self._evaluated())
        if last or self._step % self._options.save_every == 0:
            self.save()

    def _evaluated(self) -> Mapping[str, float]:
        assert self._evaluate is not None
        self._module.eval()
        try:
            with torch.no_grad():
                return self._evaluate()
        finally:
            self._module.train()

    def _train_step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Do one step of the optimiser and return its figures, means over all processes."""
        options = self._options
        for group in self._optimizer.param_groups:
            group["lr"] = group["base"] * options.rate(self._step)
        self._optimizer.zero_grad(set_to_none=True)
        sums: dict[str, torch.Tensor] = {}
        for index in range(self._forwards):
            batch = next(batches)
            loss = self._backward(batch, index)
            cut = loss.weight.new_tensor(batch.cut)
            all_sums = {"loss": loss.total, "weight": loss.weight, "cut": cut, **loss.terms}
            for name, value in all_sums.items():
                sums[name] = sums.get(name, 0) + value.detach().double()
        names = sorted(sums)
        totals = self._ranks.sum(torch.stack([sums[name] for name in names]))
        weight = totals[names.index("weight")].clamp(min=1)
        means = dict(zip(names, (totals / weight).tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            raise PluginError(
                "training",
                f"the loss is {means['loss']} at step {self._step}",
                "resume from the last checkpoint with a lower --lr",
            )
        norm, lr = self._apply(weight), self._optimizer.param_groups[0]["lr"]
        counts = {name: float(totals[names.index(name)]) for name in ("weight", "cut")}
        return means | counts | {"gradient_norm": float(norm), "lr": lr}

    def _backward(self, batch: Batch, index: int) -> Loss:
        options = self._options
        number = (self._step * self._forwards + index) * self._ranks.count + self._ranks.rank
        mixed = np.random.SeedSequence((options.seed, number)).generate_state(1, np.uint64)
        torch.manual_seed(int(mixed[0]))
        gathers = self._ranks.count == 1 or index + 1 == self._forwards
        quiet = nullcontext() if gathers else self._parallel.no_sync()
        device = torch.device(options.device)
        low = torch.autocast(device.type, options.dtype, options.dtype != torch.float32)
        with quiet:
            with low:
                moved = batch.to(device, options.dtype)
                loss: Loss = self._parallel(moved, self._step / options.steps)
            loss.total.backward()
        return loss

    def _apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Turn sums of gradients into the mean over the batch, clip it and step."""
        parameters = [p for p in self._trained.values() if p.grad is not None]
        # Processes have averaged their sums, of which the mean wants the total.
        scale = self._ranks.count / weight
        for parameter in parameters:
            parameter.grad.mul_(scale.to(parameter.grad.dtype))
        norm = nn.utils.clip_grad_norm_(parameters, self._options.clip or math.inf)
        self._optimizer.step()
        return norm

    def save(self) -> None:
        """Write a checkpoint of the steps done so far."""
        if self._ranks.first:
            names = {parameter: name for name, parameter in self._trained.items()}
            batches = self._step * self._forwards * self._ranks.count
            checkpoints.save(
                self._options.out,
                self._trained,
                checkpoints.optimizer_state(self._optimizer, names),
                checkpoints.State(self._step, batches, self._settings()),
            )
        self._saved = True
        self._ranks.wait()

    def _batches(self) -> Iterator[Batch]:
        indices = self._order.follow(self._step * self._forwards, self._ranks.rank)
        loader: Any = DataLoader(
            self._samples,
            batch_sampler=_Stream(indices),
            collate_fn=partial(_collated, self._collator),
            num_workers=self._options.workers,
            pin_memory=self._options.device.startswith("cuda"),
        )
        for made in loader:
            if isinstance(made, PluginError):
                raise made
            yield made

    def _stopped(self) -> bool:
        """Whether any process was interrupted; they stop together or none could go on."""
        if self._ranks.count == 1:
            return self._stop
        return bool(self._ranks.sum(torch.tensor(int(self._stop), device=self._options.device)))

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let the first SIGINT end the run after its step; a second one ends it at once."""

        def stop(number: int, frame: Any) -> None:
            self._stop = True
            signal.signal(signal.SIGINT, before)

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _collated(collator: Collator, samples: list[Sample]) -> Batch | PluginError:
    """Return a refusal as it is: raised in a worker, it would arrive as an error of torch's."""
    try:
        return collator(samples)
    except PluginError as error:
        return error


class _Stream:
    """Batches of indices as a DataLoader wants them: an iterable, here without an end."""

    def __init__(self, indices: Iterator[Any]) -> None:
        self._indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self._indices)
