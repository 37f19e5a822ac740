"""Scenes with fewer tokens: a Dynamic-LLaVA of the scenes model, and what its answers lose.

    python examples/models/scenes_dynamic.py train --out FOLDER [--images 4000] [--steps 600]
    python examples/models/scenes_dynamic.py evaluate FOLDER [--images 50] [--block-size 32]

`train` draws scenes, calls `vllm-plugins train dynamic_llava` on them and leaves the folder that
`--plugin dynamic_llava` serves. `evaluate` drops image tokens by the trained predictor, by the
attention that the question pays them, or at random, and prints the share of right answers.

The committed fixture holds only what training changed; `scenes_dynamic` puts it together with the
scenes model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from build_once import CACHE, build_once
from scenes import scenes, write_data
from scenes_data import DESCRIBE, ID, Scene
from scenes_evaluate import held_out, pixels_of, prompt_ids
from scenes_model import EOS, IMAGE_TOKEN, load
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from vllm_plugins.training.batches import Batch
from vllm_plugins.visual_tokens.dynamic_llava.checkpoint import load_predictors
from vllm_plugins.visual_tokens.dynamic_llava.evaluation import (
    Answers,
    Dropping,
    answer,
    summary,
)
from vllm_plugins.visual_tokens.dynamic_llava.predictors import Predictors

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "scenes-dynamic"
WEIGHTS = "model.safetensors"
RATES = (1.0, 0.5, 0.25, 0.1)
QUESTIONS_TOGETHER = 64
# What the fixture is trained with; all else is the command's default. The tiny model's answers lose
# far less by a wrong choice than a real one's, so the keep rates' terms weigh less against them.
OPTIONS = {
    "--batch": "16",
    "--lr": "2e-4",
    "--predictor-lr": "5e-3",
    "--lambda": "10",
    "--image-keep-rate": "0.1",
    "--text-keep-rate": "0.5",
    "--d-model": "64",
    "--nhead": "2",
    "--dim-feedforward": "128",
    "--num-layers": "2",
    "--eval-every": "100",
}


def scenes_dynamic() -> Path:
    """Return the folder of the committed Dynamic-LLaVA, put together on first use."""
    parts = [*sorted(scenes().iterdir()), *sorted(FOLDER.rglob("*.*"))]
    made_from = {
        str(part.relative_to(FOLDER.parent)): hashlib.sha256(part.read_bytes()).hexdigest()
        for part in parts
        if part.is_file()
    }
    return build_once(CACHE / "scenes-dynamic", made_from, _join)


def _join(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(scenes(), folder, dirs_exist_ok=True)
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    weights = load_file(scenes() / WEIGHTS) | load_file(FOLDER / WEIGHTS)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def keep_changes(trained: Path, out: Path) -> None:
    """Write of a trained folder only what the scenes model does not have."""
    from safetensors.torch import load_file, save_file

    before = load_file(scenes() / WEIGHTS)
    changed = {
        name: tensor.to(before[name].dtype)
        for name, tensor in load_file(trained / WEIGHTS).items()
        if not torch.equal(tensor.to(before[name].dtype), before[name])
    }
    (out / "predictors").mkdir(parents=True, exist_ok=True)
    save_file(changed, out / WEIGHTS, metadata={"format": "pt"})
    shutil.copyfile(trained / "config.json", out / "config.json")
    shutil.copyfile(trained / "predictors" / WEIGHTS, out / "predictors" / WEIGHTS)


def alone(data: Path) -> Path:
    """Make every turn of the samples in a file a sample of its own, and return the file.

    The scenes model was trained on questions that do not see one another.
    """
    samples = []
    for sample in json.loads(data.read_text()):
        turns = sample["conversations"]
        for index in range(0, len(turns), 2):
            question = turns[index]["value"].removeprefix("<image>\n")
            spoken = [{"from": "human", "value": f"<image>\n{question}"}, turns[index + 1]]
            samples.append({**sample, "conversations": spoken})
    data.write_text(json.dumps(samples))
    return data


def train(out: Path, images: int, steps: int, long_share: float, words: Sequence[str]) -> int:
    """Draw scenes and train on them; return the command's exit status."""
    from vllm_plugins.cli.main import main as command

    with tempfile.TemporaryDirectory() as drawn:
        data = alone(write_data(Path(drawn), images, 0, long_share))
        options = [part for option in OPTIONS.items() for part in option]
        where = ["--data", str(data), "--images", drawn, "--out", str(out)]
        called = ["train", "dynamic_llava", str(scenes()), *where, "--steps", str(steps)]
        return command([*called, *options, *words])


def conversation(scene: Scene, question: str, wanted: str) -> Batch:
    """Return one question on a scene with its right answer."""
    prompt = prompt_ids(question)
    row = [*prompt, *(ID[word] for word in wanted.split()), EOS]
    ids = torch.tensor([row])
    return Batch(
        ids,
        torch.ones_like(ids),
        torch.arange(len(row))[None] >= len(prompt),
        ids == IMAGE_TOKEN,
        torch.tensor([len(prompt)]),
        torch.zeros(1, dtype=torch.int64),
        {"pixel_values": pixels_of([scene.image])},
    )


class Attended:
    """Scores of image tokens: the attention of the last layer below l, averaged over its heads and
    over the question's tokens.

    Args:
        model: the LLaVA.
        layer: l.
        batch: the question; its answer is not looked at.
    """

    def __init__(self, model: LlavaForConditionalGeneration, layer: int, batch: Batch) -> None:
        prompt = batch.input_ids[:, : int(batch.prompt_lengths[0])]
        weights: list[torch.Tensor] = []
        attention = model.model.language_model.layers[layer - 1].self_attn

        def keep(module: object, inputs: object, outputs: tuple[torch.Tensor, ...]) -> None:
            weights.append(outputs[1])

        hook = attention.register_forward_hook(keep)
        model.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                model(input_ids=prompt, **batch.pixels)
        finally:
            hook.remove()
            model.set_attn_implementation("sdpa")
        images = batch.image_mask[0].nonzero().flatten()
        self._scores = weights[0][0].mean(0)[int(images[-1]) + 1 :, images].mean(0)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return scores, shape (1, N)."""
        return self._scores[None]


def random_scores(hidden: torch.Tensor) -> torch.Tensor:
    """Return an order that knows nothing of the image."""
    return torch.rand(hidden.shape[:2])


def scorer_of(
    name: str, model: LlavaForConditionalGeneration, layer: int, batch: Batch
) -> str | Callable[[torch.Tensor], torch.Tensor]:
    """Return what orders the tokens of one conversation's image."""
    if name == "attention":
        return Attended(model, layer, batch)
    return random_scores if name == "random" else name


def evaluate(
    folder: Path, images: int, block_size: int | None
) -> Iterator[tuple[str, float, bool, dict[str, float]]]:
    """Yield scorer, keep rate, whether descriptions were asked for, and figures."""
    model = load(folder)
    predictors = load_predictors(folder, model.config.text_config.hidden_size).eval()
    some = held_out(images)
    asked = {
        False: [conversation(s, q.text, q.answer) for s in some for q in s.questions],
        True: [conversation(s, DESCRIBE, s.description) for s in some],
    }
    for long, batches in asked.items():
        for name in ("predictor", "attention", "random"):
            for rate in RATES if name == "predictor" else RATES[1:]:
                torch.manual_seed(0)
                found = _answers(model, predictors, batches, name, rate, block_size)
                yield name, rate, long, summary(found)
        texts = Dropping(predictors.config.image_keep_rate, text_keep=True)
        layer = predictors.config.sparse_layer
        if long and predictors.text_predictor is not None:
            found = [answer(model, predictors, layer, batch, texts) for batch in batches]
            yield "predictor and text", texts.image_keep_rate, long, summary(found)


def _answers(
    model: LlavaForConditionalGeneration,
    predictors: Predictors,
    batches: Sequence[Batch],
    name: str,
    rate: float,
    block_size: int | None,
) -> list[Answers]:
    layer = predictors.config.sparse_layer
    return [
        answer(
            model,
            predictors,
            layer,
            batch,
            Dropping(rate, scorer_of(name, model, layer, batch), block_size),  # type: ignore[arg-type]
        )
        for batch in batches
    ]


def main() -> int:
    """Train, keep what changed, or evaluate, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train; other options go to vllm-plugins train")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--images", type=int, default=4000, help="scenes that are drawn")
    training.add_argument("--steps", type=int, default=600)
    training.add_argument("--long-share", type=float, default=0.5, help="share of descriptions")
    keeping = commands.add_parser("keep", help="write what a trained folder changed")
    keeping.add_argument("folder", type=Path)
    keeping.add_argument("--out", type=Path, default=FOLDER)
    evaluation = commands.add_parser("evaluate", help="print the share of right answers")
    evaluation.add_argument("folder", type=Path, nargs="?")
    evaluation.add_argument("--images", type=int, default=50)
    evaluation.add_argument("--block-size", type=int, help="drop whole blocks only, as serving")
    options, rest = parser.parse_known_args()
    torch.set_num_threads(1)
    if options.command == "train":
        return train(options.out, options.images, options.steps, options.long_share, rest)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if options.command == "keep":
        keep_changes(options.folder, options.out)
        return 0
    folder = options.folder or scenes_dynamic()
    for name, rate, long, figures in evaluate(folder, options.images, options.block_size):
        kind = "descriptions" if long else "questions"
        values = "  ".join(f"{key} {value:.4f}" for key, value in figures.items())
        print(f"{kind:<13} {name:<19} keep {rate:4.0%}  {values}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
