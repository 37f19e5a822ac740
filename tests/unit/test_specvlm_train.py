"""`vllm-plugins train specvlm` on a tiny random LLaVA: it learns, stops, resumes, refuses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vision import tiny_llava

from tests.specvlm_models import drafter, target
from tests.training_samples import write_samples
from vllm_plugins.cli.main import REFUSED, main
from vllm_plugins.spec_decode.specvlm.acceptance import AcceptanceEstimate, answer
from vllm_plugins.spec_decode.specvlm.checkpoint import load_drafter, save_drafter
from vllm_plugins.training.journal import read_log


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    # Divides by every batch below: an epoch is then the same however it is shared out.
    write_samples(folder, 36, 6)
    return folder


def words(data: Path, out: Path, *more: str, model: Path | None = None) -> list[str]:
    return [
        "train", "specvlm", str(model or tiny_llava()), "--data", str(data / "samples.json"),
        "--images", str(data / "images"), "--out", str(out), "--batch", "8", "--micro-batch", "4",
        "--held-out", "4", "--lr", "2e-3", "--block-size", "4", "--prune-ratio", "4",
        "--pool-ratio", "4", "--no-plot", *more,
    ]  # fmt: skip


def train(data: Path, out: Path, *more: str, **options) -> int:
    return main(words(data, out, *more, **options))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    steps = ("--steps", "60", "--eval-every", "30", "--save-dtype", "float16")
    command = [word for word in words(data, out, *steps) if word != "--no-plot"]
    assert main(command) == 0
    return out


def test_the_loss_falls_and_drafts_agree_more(trained):
    steps = [line for line in read_log(trained) if "loss" in line]
    first, last = steps[:10], steps[-10:]
    for name, factor in (("loss", 0.8), ("feature", 0.6)):
        before, after = (sum(line[name] for line in part) / 10 for part in (first, last))
        assert after < factor * before, name
    before, after = (sum(line["agreement"] for line in part) / 10 for part in (first, last))
    assert after > before + 0.1


def test_a_run_leaves_a_drafter_its_log_and_the_curves(trained):
    assert load_drafter(trained).settings.block_size == 4
    weights = load_file(trained / "model.safetensors")
    assert all(value.dtype == torch.float16 for value in weights.values())
    assert (trained / "curves.png").stat().st_size > 10_000
    evaluations = [line["evaluation"] for line in read_log(trained) if "evaluation" in line]
    assert len(evaluations) == 2
    for figures in evaluations:
        assert 1 <= figures["tokens_per_round"] <= 6
        used = [value for name, value in figures.items() if name.startswith("used_")]
        assert sum(used) == pytest.approx(1)


def test_training_accepts_more_than_no_training(data, trained):
    from vllm_plugins.spec_decode.specvlm.train import load_collator
    from vllm_plugins.training.data import read_samples

    class Options:
        max_tokens = 128
        target = str(tiny_llava())

    samples = read_samples(data / "samples.json", data / "images")[:12]
    model = target(torch.float32)
    answered = answer(model, load_collator(Options, model), samples, "cpu", torch.float32, 32)
    estimate = AcceptanceEstimate(model, answered, 5)
    untrained = drafter(torch.float32)
    before, after = (estimate.figures(d) for d in (untrained, load_drafter(trained)))
    assert after["tokens_per_round"] > before["tokens_per_round"]


def test_an_interrupted_run_goes_on_bit_for_bit(data, tmp_path, monkeypatch, capsys):
    steps = ("--steps", "6", "--eval-every", "3", "--unroll", "2")
    assert train(data, tmp_path / "whole", *steps) == 0
    figures = AcceptanceEstimate.figures

    def interrupted(self, model):
        os.kill(os.getpid(), signal.SIGINT)
        return figures(self, model)

    with monkeypatch.context() as patch:
        patch.setattr(AcceptanceEstimate, "figures", interrupted)
        assert train(data, tmp_path / "parts", *steps) == 130
    assert "stopped after step 3; add --resume to go on" in capsys.readouterr().out
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    assert train(data, tmp_path / "parts", *steps, "--resume") == 0
    whole, parts = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    ("changed", "value"),
    [("prune_ratio", "5"), ("pool_ratio", "5"), ("conv_ratio", "2.8"), ("block_size", "5")],
)
def test_a_run_does_not_go_on_with_another_compression(data, tmp_path, capsys, changed, value):
    steps = ("--steps", "1", "--batch", "4", "--held-out", "0")
    assert train(data, tmp_path, *steps) == 0
    option = f"--{changed.replace('_', '-')}"
    assert train(data, tmp_path, *steps, "--resume", option, value) == REFUSED
    assert f"--resume: {changed} was" in capsys.readouterr().err


def test_two_processes_train_as_one_does(data, tmp_path):
    """Under torchrun with Gloo: the same micro-batches, so the same weights but for rounding."""
    steps = ("--steps", "3", "--held-out", "4", "--micro-batch", "2")
    assert train(data, tmp_path / "one", *steps) == 0
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "vllm_plugins.cli.main", *words(data, tmp_path / "two", *steps),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("drafter written") == 1
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=2e-5), name
    lines = [list(read_log(tmp_path / name)) for name in ("one", "two")]
    for a, b in zip(*lines, strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-4)


@pytest.mark.parametrize("mode", ["off", "static", "weighted", "concat"])
def test_every_mode_trains(data, tmp_path, mode):
    more = ("--steps", "2", "--mode", mode, "--default-operator", "resample")
    assert train(data, tmp_path, *more) == 0
    assert json.loads((tmp_path / "config.json").read_text())["specvlm"]["mode"] == mode


def test_low_precision_trains_weights_of_float32(data, tmp_path):
    more = ("--steps", "1", "--batch", "4", "--held-out", "1", "--longest-answer", "8")
    assert train(data, tmp_path, *more, "--dtype", "bfloat16") == 0
    assert all(line.get("loss", 1) < 3 for line in read_log(tmp_path))
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    kept = load_file(checkpoint / "weights.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in kept.values()} == {torch.float32}
    assert {value.dtype for value in written.values()} == {torch.bfloat16}


def refused(capsys) -> str:
    text = capsys.readouterr().err
    return [line for line in text.splitlines() if line.startswith("vllm-plugins: ")][-1]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--conv-ratio", "6"), "train: specvlm.conv_ratio: Input should be less than or equal"),
        (("--select-from", "pool,best"), "train: specvlm.select_from.1: Input should be 'prune'"),
        (("--queries", "0"), "train: specvlm.queries"),
        (("--held-out", "36"), "--held-out: 36 of 36 samples leave none"),
        (("--resume",), "has no checkpoint"),
        (("--batch", "6"), "--batch: 6 is not a multiple of 4"),
        (("--max-tokens", "10"), "its image does not fit into 10 tokens"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(data, tmp_path, capsys, more, reason):
    assert train(data, tmp_path / "run", "--steps", "2", *more) == 2
    assert reason in refused(capsys)


def test_a_device_that_is_not_here_is_refused(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train(data, tmp_path, "--device", "cuda") == 2
    assert "--device: no CUDA device is here" in refused(capsys)


def test_another_run_is_not_trained_over(data, trained, capsys):
    assert train(data, trained, "--steps", "2") == 2
    assert "holds a run; add --resume or name another folder" in refused(capsys)


def test_a_target_without_images_is_refused(data, tmp_path, capsys, tiny_llama):
    assert train(data, tmp_path, model=tiny_llama) == 2
    line = refused(capsys)
    assert "cannot be loaded" in line and line.endswith("name a LLaVA")


def test_weights_to_begin_with_must_be_of_this_target(data, tmp_path, capsys):
    own = tmp_path / "own"
    save_drafter(own, drafter(torch.float32), target().text_config, torch.float32)
    more = ("--steps", "1", "--init", str(own), "--gate-width", "16")
    assert train(data, tmp_path / "run", *more) == 0
    assert train(data, tmp_path / "b", *more, "--queries", "3") == 2
    assert "--init: compressor.resampler.queries has another shape" in refused(capsys)
    assert train(data, tmp_path / "c", *more, model=tiny_llava(width=64)) == 2
    assert "hidden_size is 128 and the target's is 64" in refused(capsys)


def test_the_help_names_both_techniques(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert "specvlm" in text and "dynamic_llava" in text


def test_help_imports_neither_torch_nor_vllm():
    code = (
        "import sys; from vllm_plugins.cli.main import main\n"
        "try: main(['train', 'specvlm', '--help'])\n"
        "except SystemExit: pass\n"
        "print([n for n in ('torch', 'vllm', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "--lambda-logit" in done.stdout
