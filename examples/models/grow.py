"""Make a Llama, LLaVA or drafter dearer to run without changing what it computes.

    python examples/models/grow.py MODEL OUT [--layers 32] [--feed-forward 8192]

A tiny trained model says in kind what a technique does to its answers, but not in kind what it
saves, since the engine around it costs more than the model. Here feed-forward layers get channels
that nothing reads (their columns of `down_proj` are zero), and layers are added that add zero to
the residual stream, so that outputs are the small model's, while operations and bytes read are
those of the large one (Net2Net's widening and deepening, with zeros).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_LAYER = re.compile(r"^(?P<prefix>(?:.*language_model\.|model\.)?)layers\.(?P<index>\d+)\.")
# Wide enough for gates to be alive, narrow enough not to overflow float16.
_SPREAD = 0.05


def grow(model: Path, out: Path, layers: int, feed_forward: int, seed: int = 0) -> Path:
    """Write a larger model with the same outputs.

    Args:
        model: Folder of a checkpoint, one file of weights.
        out: New folder.
        layers: Layers of the language model then, or fewer than it has: no more are added.
        feed_forward: Channels of each of their feed-forward layers.
        seed: Of the weights that do not matter.

    Raises:
        ValueError: The feed-forward layers are wider already.
    """
    config = json.loads((model / "config.json").read_text())
    text = config.get("text_config", config)
    if feed_forward < text["intermediate_size"]:
        raise ValueError(f"feed-forward layers have {text['intermediate_size']} channels already")
    weights = load_file(model / "model.safetensors")
    draw = torch.Generator().manual_seed(seed)
    for name in [name for name in weights if ".mlp." in name and _LAYER.match(name)]:
        weights[name] = _widened(name, weights[name], feed_forward, draw)
    before = text["num_hidden_layers"]
    last = [name for name in weights if (m := _LAYER.match(name)) and int(m["index"]) == before - 1]
    for index in range(before, layers):
        for name in last:
            copy = name.replace(f"layers.{before - 1}.", f"layers.{index}.")
            silent = name.endswith(("o_proj.weight", "down_proj.weight"))
            weights[copy] = torch.zeros_like(weights[name]) if silent else weights[name].clone()
    shutil.copytree(model, out)
    text["intermediate_size"], text["num_hidden_layers"] = feed_forward, max(before, layers)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _widened(name: str, weight: torch.Tensor, channels: int, draw: torch.Generator) -> torch.Tensor:
    if name.endswith("down_proj.weight"):
        more = weight.new_zeros(weight.shape[0], channels - weight.shape[1])
        return torch.cat((weight, more), dim=1)
    size = (channels - weight.shape[0], weight.shape[1])
    more = torch.randn(size, generator=draw) * _SPREAD
    return torch.cat((weight, more.to(weight.dtype)))


def main() -> int:
    """Grow one model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=1, help="of the language model, at least")
    parser.add_argument("--feed-forward", type=int, required=True, help="channels of each layer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(grow(options.model, options.out, options.layers, options.feed_forward, options.seed))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
