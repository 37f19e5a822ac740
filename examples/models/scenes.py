"""Train, evaluate and draw for "scenes", a tiny vision-language model that answers questions.

    python examples/models/scenes.py train --out FOLDER [--seed 0] [--steps N] [--minutes 40]
    python examples/models/scenes.py evaluate FOLDER [--images 200]
    python examples/models/scenes.py data FOLDER --images N --seed S [--long-share 0.5]

`data` writes images and `scenes.json` in the LLaVA layout, the one that the package's training
commands read. A GPU takes more: `train --device cuda --batch 256 --workers 8 --layers 12
--hidden 512`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

import torch
from scenes_data import DESCRIBE, HELD_OUT, Scene, make_scene
from scenes_evaluate import evaluate, held_out
from scenes_model import Shape, load
from scenes_train import STEPS, Run, Trainer

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "scenes"
MOST_TURNS = 4
# Scenes written as data are neither those of training runs nor held out.
_DATA_SEEDS, _SEEDS_OF_DATA = HELD_OUT // 2, 1_000_000


def scenes() -> Path:
    """Return the folder of the committed model."""
    return FOLDER


def write_data(out: Path, images: int, seed: int, long_share: float, unseen: bool = False) -> Path:
    """Draw images with conversations and return the path of `scenes.json`.

    Args:
        out: folder for the images and the list.
        images: how many; each is one sample.
        seed: different seeds share no scene.
        long_share: share of samples that ask for a description; the others ask one to
            `MOST_TURNS` questions, one a turn.
        unseen: draw held-out scenes instead.
    """
    out.mkdir(parents=True, exist_ok=True)
    first = (HELD_OUT if unseen else _DATA_SEEDS) + seed * _SEEDS_OF_DATA
    samples = []
    for index in range(images):
        scene, name = make_scene(first + index), f"{index + 1:04d}"
        scene.image.save(out / f"{name}.png")
        turns = _turns(Random(f"turns of {scene.seed}"), scene, long_share)
        samples.append({"id": name, "image": f"{name}.png", "conversations": turns})
    path = out / "scenes.json"
    path.write_text(json.dumps(samples, indent=1) + "\n")
    return path


def _turns(rng: Random, scene: Scene, long_share: float) -> list[dict[str, str]]:
    asked = [(q.text, q.answer) for q in scene.questions[: rng.randint(1, MOST_TURNS)]]
    if rng.random() < long_share:
        asked = [(DESCRIBE, scene.description)]
    turns = []
    for index, (question, answer) in enumerate(asked):
        said = question if index else f"<image>\n{question}"
        turns += [{"from": "human", "value": said}, {"from": "gpt", "value": answer}]
    return turns


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train a model and write its folder")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--seed", type=int, default=0, help="of the weights and the scenes")
    training.add_argument("--steps", type=int, default=STEPS, help="of all stages together")
    training.add_argument("--minutes", type=float, default=40, help="stop then at the latest")
    training.add_argument("--batch", type=int, default=8, help="images of a step")
    training.add_argument("--layers", type=int, default=Shape.layers, help="of the Llama")
    training.add_argument("--hidden", type=int, default=Shape.hidden, help="a multiple of 64")
    training.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    training.add_argument("--workers", type=int, default=0, help="processes that draw scenes")
    evaluation = commands.add_parser("evaluate", help="print the accuracy of a model")
    evaluation.add_argument("folder", type=Path)
    evaluation.add_argument("--images", type=int, default=200)
    evaluation.add_argument("--seed", type=int, default=0, help="first of the held-out scenes")
    data = commands.add_parser("data", help="write images and scenes.json in the LLaVA layout")
    data.add_argument("folder", type=Path)
    data.add_argument("--images", type=int, required=True)
    data.add_argument("--seed", type=int, default=0, help="different seeds share no scene")
    data.add_argument("--long-share", type=float, default=0.5, help="share of descriptions")
    data.add_argument("--held-out", action="store_true", help="scenes that training never sees")
    return parser


def main() -> int:
    """Train, evaluate or draw, as the command line says."""
    options = _parser().parse_args()
    # Two threads were slower than one on shared cores, and results of one are the same again.
    torch.set_num_threads(1)
    if options.command == "train":
        shape = Shape(options.layers, options.hidden)
        names = ("steps", "minutes", "batch", "seed", "device", "workers")
        Trainer(Run(shape, **{name: getattr(options, name) for name in names})).train(options.out)
        print(options.out)
    elif options.command == "data":
        folder, count, share = options.folder, options.images, options.long_share
        print(write_data(folder, count, options.seed, share, options.held_out))
    else:
        counted = evaluate(load(options.folder), held_out(options.images, options.seed))
        for name, (right, asked) in counted.items():
            print(f"{name:<22} {right / asked:7.2%} of {asked}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
