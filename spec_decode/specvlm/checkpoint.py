"""A drafter on disk: safetensors, and a config.json that transformers and vLLM can read.

The architecture's name begins with ``Eagle``, which vLLM would otherwise put in front of it; the
plug-in registers it. Embeddings and head are left out: vLLM then shares the target's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from vllm_plugins.errors import PluginError
from vllm_plugins.spec_decode.specvlm.drafter import DrafterShape, EagleDrafter
from vllm_plugins.spec_decode.specvlm.settings import read_settings

ARCHITECTURES = {
    "llama": "EagleSpecVLMLlamaForCausalLM",
    "qwen2": "EagleSpecVLMQwen2ForCausalLM",
}
MAX_CONFIG_BYTES = 1 << 20
MEND = "train one: vllm-plugins train specvlm"
# What a served config needs beside the layer's shape, taken from the target as it is.
FROM_TARGET = ("bos_token_id", "eos_token_id", "pad_token_id")


def save_drafter(folder: Path, drafter: EagleDrafter, text_config: Any, dtype: torch.dtype) -> None:
    """Write a drafter's folder.

    Args:
        folder: Made where it is missing.
        drafter: To write.
        text_config: Of the target's language model, for its special tokens.
        dtype: Of the written weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.detach().to("cpu", dtype).contiguous()
        for name, value in drafter.state_dict().items()
    }
    partial = folder / ".model.safetensors.new"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.rename(folder / "model.safetensors")
    config = drafter_config(drafter, text_config, dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def drafter_config(drafter: EagleDrafter, text_config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return the config.json of a drafter."""
    shape = drafter.shape
    special = {name: getattr(text_config, name, None) for name in FROM_TARGET}
    return {
        "architectures": [ARCHITECTURES[shape.model_type]],
        **shape.to_dict(),
        # Where transformers older than 5 looks for it.
        "rope_theta": shape.rope_parameters["rope_theta"],
        **{name: value for name, value in special.items() if value is not None},
        "hidden_act": "silu",
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "specvlm": drafter.settings.model_dump(mode="json"),
    }


def read_config(folder: Path) -> dict[str, Any]:
    """Read a drafter's config.json.

    Raises:
        PluginError: It cannot be read, or is not a drafter's.
    """
    path = folder / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("it is too large")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PluginError(str(path), f"cannot be read ({error})", MEND) from None
    known = isinstance(config, dict) and config.get("model_type") in ARCHITECTURES
    if not known or config.get("architectures") != [ARCHITECTURES[config["model_type"]]]:
        raise PluginError(str(path), "is not a SpecVLM drafter's", MEND)
    return config


def read_shape(config: dict[str, Any], where: str) -> DrafterShape:
    """Return the layer's shape of a checked config.

    Raises:
        PluginError: A field is missing.
    """
    try:
        return DrafterShape(**{name: config[name] for name in DrafterShape.__dataclass_fields__})
    except KeyError as error:
        raise PluginError(where, f"lacks {error}", MEND) from None


def load_drafter(folder: Path, dtype: torch.dtype = torch.float32) -> EagleDrafter:
    """Read a drafter's folder, on the host.

    Raises:
        PluginError: Something is missing or does not fit together.
    """
    config = read_config(folder)
    settings = read_settings(config.get("specvlm"), str(folder / "config.json"))
    shape = read_shape(config, str(folder / "config.json"))
    path = folder / "model.safetensors"
    try:
        # Nothing is allocated before the file's own shapes agree with the config's.
        with torch.device("meta"):
            expected = EagleDrafter(shape, settings).state_dict()
        wrong = next(_disagreements(path, expected), None)
        if wrong:
            raise PluginError(str(path), wrong, "it does not belong to its config.json")
        weights = load_file(path)
    except (OSError, SafetensorError, RuntimeError, TypeError) as error:
        raise PluginError(str(path), f"cannot be read ({error})", MEND) from None
    drafter = EagleDrafter(shape, settings)
    drafter.load_state_dict(weights)
    return drafter.to(dtype)


def _disagreements(path: Path, expected: dict[str, torch.Tensor]) -> Iterator[str]:
    with safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for name in sorted(shapes.keys() | expected.keys()):
        there = shapes.get(name)
        here = tuple(expected[name].shape) if name in expected else None
        if here != there:
            yield f"{name} has shape {there}, not {here}"
