"""The training loop on a module of a few weights: what a step is, stopping, resuming, refusals."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vllm_plugins.errors import PluginError
from vllm_plugins.training import checkpoints
from vllm_plugins.training.batches import Batch
from vllm_plugins.training.curves import draw_curves
from vllm_plugins.training.data import Sample, Turn
from vllm_plugins.training.journal import read_log
from vllm_plugins.training.loop import LoopOptions, Loss, Trainer

SAMPLES = [Sample(f"sample {i}", None, True, (Turn("q", "a" * (1 + i % 7)),)) for i in range(24)]


def collate(samples) -> Batch:
    """Rows whose only content is the number of the sample, repeated."""
    numbers = torch.tensor([[int(sample.where.split()[1])] for sample in samples])
    ids = numbers.expand(-1, 3).clone()
    ones = torch.ones_like(ids)
    return Batch(ids, ones, ones.bool(), ids < 0, ids[:, 0], ids[:, 0], {}, cut=1)


class Noisy(nn.Module):
    """A regression with dropout-like noise, and a weight that some batches do not use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 1)
        self.sometimes = nn.Parameter(torch.ones(()))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.seen: list[list[int]] = []

    def forward(self, batch: Batch, progress: float) -> Loss:
        self.seen.append(batch.input_ids[:, 0].tolist())
        rows = batch.input_ids.float() / 24
        out = self.second(torch.tanh(self.first(rows + 0.1 * torch.randn_like(rows))))[:, 0]
        if int(batch.input_ids[0, 0]) % 2:
            out = out * self.sometimes
        weight = (batch.input_ids[:, 0] + 1).float()
        loss = (weight * (out - rows[:, 0] ** 2).square()).sum()
        return Loss(loss, weight.sum(), {"progress": weight.sum() * progress})


def options(out: Path, **changes) -> LoopOptions:
    return replace(LoopOptions(out, 12, 6, 3, save_every=5, eval_every=4, seed=3), **changes)


def trainer(out: Path, module: nn.Module | None = None, evaluate=None, **changes) -> Trainer:
    module = module or Noisy()
    group = {"params": [p for p in module.parameters() if p.requires_grad], "lr": 0.01}
    return Trainer(module, [group], SAMPLES, collate, options(out, **changes), evaluate=evaluate)


def log(folder: Path, drop=("seconds",)) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in drop} for line in read_log(folder)]


def test_a_step_is_adamw_on_the_mean_over_the_whole_batch(tmp_path):
    """Micro-batches of unequal weight, and clipping, against one gradient over all of them."""
    module = Noisy()
    trainer(tmp_path, module, steps=1, clip=0.05).run()
    again = Noisy()
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=0.01)
    total, weight = 0, 0
    for number, ids in enumerate(module.seen):
        seed = np.random.SeedSequence((3, number)).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(seed))
        loss = again(collate([SAMPLES[i] for i in ids]), 0.0)
        total, weight = total + loss.total, weight + loss.weight
    (total / weight).backward()
    norm = nn.utils.clip_grad_norm_(again.parameters(), 0.05)
    optimizer.step()
    for name, value in again.state_dict().items():
        assert torch.allclose(module.state_dict()[name], value, atol=1e-7), name
    (line, *_) = log(tmp_path)
    assert line["loss"] == pytest.approx((total / weight).item(), rel=1e-5)
    assert line["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert line["weight"] == float(weight) and line["cut"] == 2


def test_an_epoch_sees_every_sample_once(tmp_path):
    module = Noisy()
    trainer(tmp_path, module, steps=4).run()
    assert sorted(i for ids in module.seen for i in ids) == list(range(24))


@pytest.mark.parametrize("stop_after", [2, 4, 10])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, stop_after):
    whole, parts = Noisy(), Noisy()
    assert trainer(tmp_path / "whole", whole, evaluate=lambda: {"one": 1.0}).run()
    interrupted = trainer(tmp_path / "parts", parts, Interrupt(stop_after), eval_every=1)
    assert not interrupted.run() and interrupted.step == stop_after
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    fresh = Noisy()
    resumed = trainer(tmp_path / "parts", fresh, evaluate=lambda: {"one": 1.0})
    resumed.resume()
    assert resumed.step == stop_after and resumed.run()
    assert torch.equal(parts.frozen, fresh.frozen)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name
    steps = [[x for x in log(tmp_path / name) if "loss" in x] for name in ("whole", "parts")]
    assert steps[0] == steps[1]


class Interrupt:
    """An evaluation that sends this process what Ctrl-C sends."""

    def __init__(self, step: int) -> None:
        self.left = step

    def __call__(self) -> dict[str, float]:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return {"one": 1.0}


def test_a_second_interrupt_ends_at_once(tmp_path):
    def twice() -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, evaluate=twice, eval_every=2, save_every=1).run()
    assert checkpoints.latest(tmp_path).name == "checkpoint-1"


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    class KilledError(Exception):
        pass

    def die() -> dict[str, float]:
        raise KilledError

    whole, fresh = Noisy(), Noisy()
    trainer(tmp_path / "whole", whole).run()
    with pytest.raises(KilledError):
        trainer(tmp_path / "parts", evaluate=die, eval_every=8).run()
    with (tmp_path / "parts" / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "los')
    resumed = trainer(tmp_path / "parts", fresh)
    resumed.resume()
    assert resumed.step == 5 and resumed.run()
    assert torch.equal(whole.first.weight, fresh.first.weight)
    assert log(tmp_path / "whole") == log(tmp_path / "parts")


def test_one_checkpoint_is_kept_and_it_is_the_last(tmp_path):
    trainer(tmp_path).run()
    assert [p.name for p in tmp_path.glob("*checkpoint*")] == ["checkpoint-12"]
    state = checkpoints.read_state(tmp_path / "checkpoint-12")
    assert (state.step, state.batches) == (12, 24)
    kinds = {p.suffix for p in (tmp_path / "checkpoint-12").iterdir()}
    assert kinds == {".safetensors", ".json"}


def test_a_save_that_was_cut_short_is_no_checkpoint(tmp_path):
    trainer(tmp_path, steps=2).run()
    (tmp_path / ".checkpoint-9.new").mkdir()
    assert checkpoints.latest(tmp_path).name == "checkpoint-2"
    resumed = trainer(tmp_path, steps=2)
    resumed.resume()
    resumed.save()
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]


def test_the_learning_rate_rises_and_falls(tmp_path):
    cosine = options(tmp_path, steps=20, schedule="cosine", warmup=0.2)
    rates = [cosine.rate(step) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[12] == pytest.approx(0.5) and rates[19] == pytest.approx(0.0096, abs=1e-4)
    assert options(tmp_path).rate(0) == options(tmp_path).rate(11) == 1
    trainer(tmp_path, steps=4, schedule="cosine", warmup=0.5).run()
    logged = [line["lr"] for line in log(tmp_path)]
    assert logged == pytest.approx([0.01 * r for r in (1 / 3, 2 / 3, 1, 0.5)])


def test_groups_keep_their_own_rate(tmp_path):
    module = Noisy()
    before = module.second.weight.detach().clone()
    groups = [
        {"params": list(module.first.parameters()), "lr": 0.01},
        {"params": list(module.second.parameters()), "lr": 0.0},
    ]
    Trainer(module, groups, SAMPLES, collate, options(tmp_path)).run()
    assert torch.equal(before, module.second.weight)
    assert not torch.equal(Noisy().first.weight, module.first.weight)


def test_an_evaluation_is_logged_without_gradient_and_in_evaluation_mode(tmp_path):
    module, modes = Noisy(), []

    def evaluate() -> dict[str, float]:
        modes.append((module.training, torch.is_grad_enabled()))
        return {"score": float(len(modes))}

    trainer(tmp_path, module, evaluate=evaluate, steps=9).run()
    assert modes == [(False, False)] * 3 and module.training
    found = [(x["step"], x["evaluation"]) for x in log(tmp_path) if "evaluation" in x]
    assert found == [(4, {"score": 1.0}), (8, {"score": 2.0}), (9, {"score": 3.0})]


def test_what_is_logged_can_be_drawn(tmp_path):
    trainer(tmp_path, evaluate=lambda: {"used_a": 0.5, "used_b": 0.5, "score": 2.0}).run()
    path = draw_curves(tmp_path, "a run")
    assert path.read_bytes()[1:4] == b"PNG" and path.stat().st_size > 10_000


def test_other_options_or_weights_are_not_resumed(tmp_path):
    trainer(tmp_path, steps=2).run()
    with pytest.raises(PluginError, match=r"--resume: seed was 3 and is 4"):
        trainer(tmp_path, steps=2, seed=4).resume()
    with pytest.raises(PluginError, match=r"--resume: schedule was constant and is cosine"):
        trainer(tmp_path, steps=2, schedule="cosine").resume()
    with pytest.raises(PluginError, match=r"--resume: clip was 0.0 and is 1.0"):
        trainer(tmp_path, steps=2, clip=1.0).resume()
    with pytest.raises(PluginError, match=r"--resume: share was None and is 0.5"):
        trainer(tmp_path, steps=2, technique={"share": 0.5}).resume()
    with pytest.raises(PluginError, match=r"--resume: .* has no checkpoint"):
        trainer(tmp_path / "elsewhere").resume()
    other = Noisy()
    other.first = nn.Linear(3, 5)
    with pytest.raises(PluginError, match=r"first.bias has shape \(4,\), not \(5,\)"):
        trainer(tmp_path, other, steps=2).resume()


def test_a_broken_checkpoint_is_refused(tmp_path):
    trainer(tmp_path, steps=2).run()
    state = tmp_path / "checkpoint-2" / "state.json"
    text = state.read_text()
    for broken in ("{", json.dumps(json.loads(text) | {"format": 9}), "[]", '{"format": 1}'):
        state.write_text(broken)
        with pytest.raises(PluginError, match=r"state.json: cannot be read"):
            trainer(tmp_path, steps=2).resume()
    state.write_text(text)
    weights = tmp_path / "checkpoint-2" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(PluginError, match=r"weights.safetensors: cannot be read"):
        trainer(tmp_path, steps=2).resume()


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(PluginError, match=r"--batch: 7 is not a multiple of 3"):
        trainer(tmp_path, batch=7)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_spoils_the_weights(tmp_path):
    class Exploding(Noisy):
        def forward(self, batch: Batch, progress: float) -> Loss:
            loss = super().forward(batch, progress)
            return replace(loss, total=loss.total * (torch.inf if progress > 0.4 else 1))

    module = Exploding()
    with pytest.raises(PluginError, match="the loss is inf at step 5"):
        trainer(tmp_path, module).run()
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert checkpoints.latest(tmp_path).name == "checkpoint-5"


def test_workers_prepare_the_same_batches(tmp_path):
    alone, helped = Noisy(), Noisy()
    trainer(tmp_path / "a", alone, steps=4).run()
    trainer(tmp_path / "b", helped, steps=4, workers=2).run()
    assert alone.seen == helped.seen
    assert torch.equal(alone.first.weight, helped.first.weight)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_refused_sample_is_told_in_one_line(tmp_path, workers):
    def refuse(samples) -> Batch:
        if any(sample.where == "sample 7" for sample in samples):
            raise PluginError("sample 7", "image cannot be decoded", "replace the picture")
        return collate(samples)

    begun = trainer(tmp_path, workers=workers)
    begun._collator = refuse
    with pytest.raises(PluginError, match=r"^sample 7: image cannot be decoded; replace") as error:
        begun.run()
    assert "\n" not in str(error.value)
