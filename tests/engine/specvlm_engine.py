"""A tiny LLaVA with 256 image tokens, and random drafters for it."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from build_once import CACHE, build_once
from drafter import random_drafter
from vision import IMAGE_TOKEN, VOCAB, tiny_llava

from tests.models import make_engine
from vllm_plugins import engine_args
from vllm_plugins.spec_decode.specvlm.settings import OPERATORS

PIXELS = 224
GRID = 16
PATCHES = GRID * GRID
BLOCK = 32
SHARP = 3.0
FORMAT = 3


def target(decoder: str = "llama") -> Path:
    """Return a LLaVA with 256 embeddings of an image, which looks at few tokens at a time.

    Attention of random weights is near the mean of all tokens, and 256 of them make every answer
    the same.

    Args:
        decoder: Kind of the language model, "llama" or "qwen2".
    """
    shape, name = {"format": FORMAT, "sharp": SHARP}, "tiny-llava-sharp"
    if decoder != "llama":
        shape, name = shape | {"decoder": decoder}, f"{name}-{decoder}"
    return build_once(CACHE / name, shape, lambda folder: _sharpen(folder, decoder))


def _sharpen(folder: Path, decoder: str) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny_llava(layers=2, positions=2048, pixels=PIXELS, decoder=decoder)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    weights = load_file(source / "model.safetensors")
    for name in weights:
        if "language_model" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
            weights[name] *= SHARP
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def plain_target(decoder: str = "llama") -> Any:
    """Return the target in transformers, float32."""
    from safetensors.torch import load_file
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    folder = target(decoder)
    model = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(folder)).eval()
    weights = load_file(folder / "model.safetensors")
    # vLLM knows the tower under the name that transformers has since dropped.
    plain = {
        k.replace("vision_tower.vision_model.", "vision_tower."): v for k, v in weights.items()
    }
    own = model.state_dict().keys()
    model.load_state_dict({k: weights.get(k, plain.get(k)) for k in own})
    return model


def drafter(decoder: str = "llama", **settings: Any) -> Path:
    """Return a random drafter for it, with what its block `specvlm` says."""
    return random_drafter(target(decoder), (GRID, GRID), block_size=BLOCK, **settings)


def engine(options: dict[str, Any] | None = None, decoder: str = "llama", **arguments: Any) -> Any:
    """Run the target, with the plug-in where there are options; `model` is a random drafter."""
    plugin: dict[str, Any] = {}
    if options is not None:
        plugin = engine_args("specvlm", **{"model": str(drafter(decoder))} | options)
    defaults = {
        "block_size": BLOCK,
        "max_num_seqs": 8,
        "seed": 0,
        "limit_mm_per_prompt": {"image": 3},
    }
    return make_engine(target(decoder), **defaults | plugin | arguments)


def picture(seed: int) -> Any:
    """Return an image whose patches have random colours, each one of its own."""
    from PIL import Image

    colours = np.random.default_rng(seed).integers(0, 256, (GRID, GRID, 3), np.uint8)
    return Image.fromarray(colours).resize((PIXELS, PIXELS), Image.Resampling.NEAREST)


def prompt(parts: list[int | str]) -> dict[str, Any]:
    """Return a prompt: a number n is n words, a string an image of its own."""
    ids: list[int] = []
    images = []
    for place, part in enumerate(parts):
        if isinstance(part, str):
            ids.append(IMAGE_TOKEN)
            images.append(picture(sum(map(ord, part))))
        else:
            ids += np.random.default_rng([place, part]).integers(5, VOCAB, part).tolist()
    made: dict[str, Any] = {"prompt_token_ids": [1, *ids]}
    if images:
        made["multi_modal_data"] = {"image": images}
    return made


def number_of_images(made: dict[str, Any]) -> int:
    """Return how many images a prompt has."""
    return len(made.get("multi_modal_data", {}).get("image", ()))


def greedy(llm: Any, prompts: list[dict[str, Any]], tokens: int = 24, **sampling: Any) -> list[Any]:
    """Return the tokens of each answer."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **sampling)
    results = llm.generate(prompts, params, use_tqdm=False)
    return [list(result.outputs[0].token_ids) for result in results]


def drafter_of(llm: Any) -> Any:
    """Return the live drafter of an engine."""
    from tests.models import worker_of

    return worker_of(llm).model_runner.get_draft_model()


def use(llm: Any, pick: str | None = None, **changes: Any) -> Any:
    """Change the settings of a live drafter, with no cached prompt left, and return them.

    Args:
        llm: The engine.
        pick: What the gate picks; by default it decides.
        **changes: Of the settings.
    """
    model = drafter_of(llm).model
    force_pick(model.gate, pick)
    settings = model.settings.model_copy(update=changes)
    model.settings = model.image_rows._settings = model.compressor.settings = settings
    assert llm.reset_prefix_cache()
    return settings


def force_pick(gate: Any, pick: str | None) -> None:
    """Have a gate pick an operator for every image, or decide by itself again."""
    bias = gate.fc2.bias
    if not hasattr(gate, "own_bias"):
        gate.own_bias = bias.detach().clone()
    forced = 0 if pick is None else 1e4 * torch.eye(len(OPERATORS))[OPERATORS.index(pick)]
    with torch.no_grad():
        bias.copy_(gate.own_bias + forced)


def assert_idle(llm: Any) -> None:
    """Assert that requests which ended hold no block."""
    from tests.models import scheduler_of

    pool = scheduler_of(llm).kv_cache_manager.block_pool
    # One block is vLLM's own, for padding.
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


@cache
def plain_answers(tokens: int = 24) -> list[Any]:
    """Return the target's own greedy answers to :data:`PROMPTS`."""
    with engine() as llm:
        return greedy(llm, PROMPTS, tokens)


PROMPTS = [
    prompt(parts)
    for parts in (
        [9, "a", 40],
        [20],
        [3, "b", 5, "c", 17],
        ["d", 3],
        [31, "e"],
        [30, "f", 8],
        [2, "g", "h", "i", 61],
        [150],
        [64, "j", 100],
    )
]
