"""`vllm-plugins train dynamic_llava` on a tiny random LLaVA: rates, gradients, files, refusals."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration
from vision import IMAGE_TOKEN, WIDTH, tiny_llava

from vllm_plugins.cli.main import INTERRUPTED, REFUSED, main
from vllm_plugins.errors import PluginError
from vllm_plugins.training.batches import Collator
from vllm_plugins.training.data import read_samples
from vllm_plugins.training.loop import Trainer
from vllm_plugins.visual_tokens.dynamic_llava.checkpoint import load_predictors
from vllm_plugins.visual_tokens.dynamic_llava.losses import temperature
from vllm_plugins.visual_tokens.dynamic_llava.predictors import Predictors
from vllm_plugins.visual_tokens.dynamic_llava.reference import reference_logits
from vllm_plugins.visual_tokens.dynamic_llava.sparse_config import SparseConfig
from vllm_plugins.visual_tokens.dynamic_llava.student import Student

SIZES = ["--d-model", "32", "--nhead", "4", "--dim-feedforward", "64", "--num-layers", "1"]
SMALL = SparseConfig(d_model=32, nhead=4, dim_feedforward=64, num_layers=1)
LONG, SHORT = 30, 4


@pytest.fixture(scope="module")
def source():
    torch.set_num_threads(1)
    return tiny_llava(layers=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Conversations on noise: half with a long answer, some of two turns, one without an image."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    entries = []
    for i in range(24):
        noise = random.integers(0, 256, (56, 56, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
        words = [f"t{w}" for w in random.integers(4, 64, 3 + LONG + SHORT + 2)]
        answer = words[3 : 3 + (LONG if i % 2 else SHORT)]
        turns = [("human", "<image>\n" + " ".join(words[:3])), ("gpt", " ".join(answer))]
        if i % 3 == 0:
            turns += [("human", words[-1]), ("gpt", " ".join(words[-SHORT:]))]
        spoken = [{"from": who, "value": text} for who, text in turns]
        entries.append({"id": i, "image": f"{i}.png", "conversations": spoken})
    text = [{"from": "human", "value": "t4"}, {"from": "gpt", "value": "t5"}]
    entries.append({"id": "text", "conversations": text})
    (folder / "data.json").write_text(json.dumps(entries))
    return folder


def command(source, data, out, *more):
    paths = ["--data", str(data / "data.json"), "--images", str(data), "--out", str(out)]
    fixed = ["--no-plot", "--batch", "8", "--held-out", "4", "--long-answer", str(LONG), *SIZES]
    return main(["train", "dynamic_llava", str(source), *paths, *fixed, *more])


def batch_of(source, data, count=4):
    samples = read_samples(data / "data.json", data, images_only=True)[:count]
    return Collator(AutoProcessor.from_pretrained(source), IMAGE_TOKEN, 512)(samples)


def make_student(source, **options):
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    return Student(model, Predictors(WIDTH, SMALL), long_answer=LONG, **options)


@pytest.fixture(scope="module")
def trained(source, data, tmp_path_factory):
    """A run long enough for the rates to settle."""
    out = tmp_path_factory.mktemp("run")
    code = command(
        source, data, out, "--steps", "120", "--predictor-lr", "5e-3", "--lr", "1e-4",
        "--image-keep-rate", "0.3", "--text-keep-rate", "0.6",
    )  # fmt: skip
    assert code == 0
    return out


def read_steps(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_rates_settle_at_their_targets(trained, source, data):
    steps = [line for line in read_steps(trained) if "evaluation" not in line]
    kept = np.mean([line["image_kept"] for line in steps[-40:]])
    assert kept == pytest.approx(0.3, abs=0.02)
    assert np.mean([line["image_kept"] for line in steps[:5]]) > 0.4
    model = LlavaForConditionalGeneration.from_pretrained(trained, dtype=torch.float32)
    student = Student(model, load_predictors(trained, WIDTH), long_answer=LONG)
    found = [student.run(batch_of(source, data, 24), temperature(1.0)) for _ in range(10)]
    drawn = torch.cat([one.decisions[one.text_rows] for one in found])
    # Twelve long answers, of which the eight that end a conversation have an end token.
    assert len(drawn) == 10 * (12 * LONG + 8)
    assert drawn.mean().item() == pytest.approx(0.6, abs=0.02)


def test_what_is_seen_besides_counts_for_no_rate(source, data):
    batch, found = batch_of(source, data), []
    for share in (0.0, 1.0):
        student = make_student(source, varied=share)
        torch.manual_seed(1)
        found.append(student.run(batch, temperature(1.0)))
    drawn, besides = (one.decisions[batch.image_mask] for one in found)
    assert torch.equal(drawn, besides)
    assert not torch.allclose(found[0].logits, found[1].logits)


def test_the_model_learns_although_tokens_are_missing(trained):
    steps = [line for line in read_steps(trained) if "evaluation" not in line]
    first, last = (np.mean([line["answers"] for line in part]) for part in (steps[:5], steps[-5:]))
    assert last < 0.8 * first


def test_held_out_figures_are_logged(trained):
    (line,) = [line for line in read_steps(trained) if "evaluation" in line]
    assert line["step"] == 120
    figures = line["evaluation"]
    assert set(figures) == {
        "sparse_cross_entropy", "sparse_right", "dense_cross_entropy", "dense_right", "text_kept",
    }  # fmt: skip
    assert figures["sparse_cross_entropy"] != figures["dense_cross_entropy"]
    assert 0 <= figures["text_kept"] <= 1


@pytest.mark.parametrize("tokens", [20, 26])
def test_answers_that_were_cut_off_are_not_judged(source, data, tmp_path, tokens):
    """Nothing is left of any answer, or of those to the longer questions alone."""
    entries = json.loads((data / "data.json").read_text())
    for number, one in enumerate(entries[:24]):
        one["conversations"][0]["value"] = "<image>\n" + " ".join(["t7"] * (4 + number % 2 * 8))
    (tmp_path / "data.json").write_text(json.dumps(entries))
    out = tmp_path / "out"
    paths = ["--images", str(data), "--steps", "1", "--max-tokens", str(tokens)]
    assert command(source, tmp_path, out, *paths) == 0
    (line,) = [line for line in read_steps(out) if "evaluation" in line]
    assert ("dense_right" in line["evaluation"]) == (tokens == 26)
    assert "NaN" not in (out / "log.jsonl").read_text()


def test_checkpoint_is_a_llava_that_vllm_knows_with_predictors_beside_it(trained, source):
    config = json.loads((trained / "config.json").read_text())
    assert SparseConfig.read(trained) == SparseConfig(
        d_model=32, nhead=4, dim_feedforward=64, num_layers=1,
        image_keep_rate=0.3, text_keep_rate=0.6,
    )  # fmt: skip
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    weights, before = (load_file(f / "model.safetensors") for f in (trained, source))
    assert {n: t.shape for n, t in weights.items()} == {n: t.shape for n, t in before.items()}
    changed = {n for n in before if not torch.equal(before[n], weights[n])}
    frozen = {n for n in before if "vision_tower" in n or "projector" in n}
    assert changed.isdisjoint(frozen) and changed == set(before) - frozen
    predictors = load_file(trained / "predictors" / "model.safetensors")
    assert {n.partition(".")[0] for n in predictors} == {"image_predictor", "text_predictor"}
    copied = {"tokenizer.json", "tokenizer_config.json", "processor_config.json"}
    assert copied <= {path.name for path in trained.iterdir()}
    assert AutoProcessor.from_pretrained(trained).chat_template


def test_checkpoint_of_a_stopped_and_resumed_run_is_the_same(source, data, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command(source, data, whole, "--steps", "6") == 0
    stop = Trainer._advance

    def interrupted(self, *args):
        stop(self, *args)
        self._stop = self.step == 3

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_advance", interrupted)
        assert command(source, data, parts, "--steps", "6") == INTERRUPTED
    assert not (parts / "model.safetensors").exists()
    assert command(source, data, parts, "--steps", "6", "--resume") == 0
    for name in ("model.safetensors", "predictors/model.safetensors"):
        first, second = load_file(whole / name), load_file(parts / name)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_does_not_go_on_with_other_heads(source, data, tmp_path, capsys):
    assert command(source, data, tmp_path, "--steps", "1") == 0
    assert command(source, data, tmp_path, "--steps", "1", "--resume", "--nhead", "1") == REFUSED
    assert "--resume: nhead was" in capsys.readouterr().err


def test_a_frozen_model_is_written_as_it_was(source, data, tmp_path):
    assert command(source, data, tmp_path, "--steps", "2", "--lr", "0") == 0
    weights, before = (load_file(f / "model.safetensors") for f in (tmp_path, source))
    assert all(torch.equal(before[name], weights[name]) for name in before)
    torch.manual_seed(0)
    fresh = Predictors(WIDTH, SMALL).state_dict()
    written = load_file(tmp_path / "predictors" / "model.safetensors")
    name = "image_predictor.head.4.bias"
    assert not torch.equal(written[name], fresh[name])


def test_layers_that_are_computed_again_give_the_same_gradients(source, data):
    batch, found = batch_of(source, data), []
    for recompute in (False, True):
        student = make_student(source).train()
        if recompute:
            student.model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        student(batch, 0.5).total.backward()
        found.append([p.grad for p in student.parameters() if p.requires_grad])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("words", [["--recompute"], ["--dtype", "bfloat16"]])
def test_ways_to_save_memory_train_too(source, data, tmp_path, words):
    assert command(source, data, tmp_path, "--steps", "2", *words) == 0
    weights, before = (load_file(f / "model.safetensors") for f in (tmp_path, source))
    name = "model.language_model.layers.3.self_attn.q_proj.weight"
    assert not torch.equal(weights[name], before[name])
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    frozen = [name for name in before if "vision_tower" in name or "projector" in name]
    assert frozen and all(torch.equal(weights[name], before[name]) for name in frozen)


@pytest.mark.parametrize("weight", [0.0, 100.0])
def test_gradients_reach_both_predictors_and_the_model_but_not_the_eyes(source, data, weight):
    """Predictors learn from the answers too, not only from the keep rates."""
    student = make_student(source, weight=weight).train()
    loss = student(batch_of(source, data), 0.5)
    loss.total.backward()
    without = {n for n, p in student.named_parameters() if p.grad is None or not p.grad.any()}
    assert {n for n in without if "vision_tower" not in n and "projector" not in n} == set()
    frozen = [n for n, p in student.named_parameters() if not p.requires_grad]
    assert frozen and all("vision_tower" in n or "projector" in n for n in frozen)
    assert not student.model.model.vision_tower.training and student.predictors.training


def test_the_loss_is_the_sum_of_its_parts_over_conversations(source, data):
    batch, student = batch_of(source, data), make_student(source, weight=7.0)
    torch.manual_seed(3)
    loss = student(batch, 0.25)
    torch.manual_seed(3)
    found = student.run(batch, temperature(0.25))
    ce = torch.nn.functional.cross_entropy(found.logits, found.targets)
    rows = zip(found.decisions, batch.image_mask, found.text_rows, strict=True)
    means, long = [], []
    for decisions, image, text in rows:
        means.append((0.2 - decisions[image].mean()) ** 2)
        if text.any():
            long.append((0.5 - decisions[text].mean()) ** 2)
    # Two of the four have a long answer.
    assert len(long) == 2
    expected = 4 * ce + 7.0 * (sum(means) + sum(long))
    torch.testing.assert_close(loss.total, expected)
    assert loss.weight == 4
    torch.testing.assert_close(loss.terms["text"], sum(long))
    kept = found.decisions[batch.image_mask].mean()
    torch.testing.assert_close(loss.terms["image_kept"], 4 * kept)
    assert int(batch.answer_mask.sum()) == len(found.targets)


def test_decisions_do_not_depend_on_the_padding_of_a_batch(source, data):
    """A predictor that is certain decides alike whether a conversation is alone or not."""
    student = make_student(source).eval()
    for predictor in (student.predictors.image_predictor, student.predictors.text_predictor):
        with torch.no_grad():
            predictor.head[4].weight.mul_(1e5)
    batch = batch_of(source, data, 2)
    assert batch.attention_mask[0].sum() < batch.attention_mask.shape[1]
    together, alone = student.run(batch, 0.1), student.run(batch_of(source, data, 1), 0.1)
    n = alone.decisions.shape[1]
    assert torch.equal(together.decisions[0, :n], alone.decisions[0])
    count = len(alone.targets)
    torch.testing.assert_close(together.logits[:count], alone.logits, rtol=0, atol=1e-4)


def test_training_computes_what_serving_will_for_the_same_decisions(source, data):
    """The student's masked pass against the reference's removal, predictors certain."""
    student = make_student(source).eval()
    with torch.no_grad():
        student.predictors.text_predictor.head[4].weight.mul_(1e5)
    batch = batch_of(source, data, 2)
    batch = batch.__class__(**{**vars(batch), **{
        name: value[1:] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)
    }, "pixels": {"pixel_values": batch.pixels["pixel_values"][1:]}})  # fmt: skip
    student.predictors.image_predictor = None
    found = student.run(batch, 0.1)
    prompt = int(batch.prompt_lengths[0])
    ids = batch.input_ids[0][: int(batch.attention_mask.sum())]
    reference = reference_logits(
        student.model,
        student.predictors,
        ids,
        sparse_layer=SMALL.sparse_layer,
        keep_rate=1.0,
        pixel_values=batch.pixels["pixel_values"],
        text_keep=True,
        prompt_tokens=prompt,
    )
    decisions = found.decisions[0, prompt : len(ids)]
    assert found.text_rows[0, prompt : len(ids)].all()
    assert 0 < decisions.sum() < len(decisions)
    assert reference.decisions.tolist() == decisions.bool().tolist()
    torch.testing.assert_close(reference.logits[prompt - 1 : -1], found.logits, rtol=0, atol=2e-3)


def test_broken_checkpoints_are_refused(trained, source, tmp_path):
    with pytest.raises(PluginError, match="has no sparse_config; train it"):
        load_predictors(source, WIDTH)
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken, ignore=shutil.ignore_patterns("checkpoint-*"))
    with pytest.raises(PluginError, match="size mismatch"):
        load_predictors(broken, 2 * WIDTH)
    (broken / "predictors" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(PluginError, match="use a folder that training wrote"):
        load_predictors(broken, WIDTH)
    (broken / "predictors" / "model.safetensors").unlink()
    with pytest.raises(PluginError, match="use a folder that training wrote"):
        load_predictors(broken, WIDTH)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image-keep-rate", "0"], "image_keep_rate: Input should be greater than 0"),
        (["--sparse-layer", "4"], "has 4 layers, so none at sparse_layer 4"),
        (["--d-model", "36", "--nhead", "8"], "d_model 36 is not a multiple of nhead 8"),
        (["--varied", "0.3", "--image-keep-rate", "1"], "--varied: image_keep_rate is 1"),
        (["--device", "cuda:0"], "no CUDA device is here"),
        (["--held-out", "24"], "24 of 24 samples leave none"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    source, data, tmp_path, capsys, monkeypatch, words, message
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(source, data, tmp_path / "out", "--steps", "1", *words) == REFUSED
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "out" / "config.json").exists()
