"""A tiny random target in any precision, drafters for it, and prompts with images."""

from functools import cache
from typing import Any

import torch
from vision import IMAGE_TOKEN, PATCHES, VOCAB, tiny_llava

from vllm_plugins.spec_decode.specvlm.drafter import DrafterShape, EagleDrafter
from vllm_plugins.spec_decode.specvlm.settings import SpecVLMSettings
from vllm_plugins.spec_decode.specvlm.target import FrozenTarget, load_target
from vllm_plugins.training.batches import Batch, first_true

IMAGE = [IMAGE_TOKEN] * PATCHES


@cache
def target(dtype: torch.dtype = torch.float64) -> FrozenTarget:
    """Return the tiny LLaVA, loaded once."""
    return load_target(str(tiny_llava()), "cpu", dtype)


def drafter(dtype: torch.dtype = torch.float64, **settings: Any) -> EagleDrafter:
    """Return a random drafter whose drafts depend on every row."""
    defaults = {"grid": (4, 4), "prune_ratio": 4, "pool_ratio": 4, "block_size": 4}
    chosen = SpecVLMSettings(**{**defaults, "gate_width": 16, **settings})
    torch.manual_seed(0)
    made = EagleDrafter(DrafterShape.of_target(target(dtype).text_config), chosen)
    with torch.no_grad():
        # Operators begin as means, some of which are alike.
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2).add_(torch.randn_like(parameter), alpha=0.05)
    return made.to(dtype)


def pixels(images: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Return random pictures as the processor would hand them over."""
    if not images:
        return {}
    random = torch.Generator().manual_seed(images)
    return {"pixel_values": torch.randn(images, 3, 56, 56, generator=random).to(dtype)}


def make_batch(
    prompts: list[list[int]], answers: list[list[int]], dtype: torch.dtype = torch.float64
) -> Batch:
    """Return a batch of prompts, each with an image or none, and their answers."""
    rows = [p + a for p, a in zip(prompts, answers, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    column = torch.arange(longest)[None]
    answer_mask = (column >= starts) & (column < lengths)
    image_mask = ids == IMAGE_TOKEN
    return Batch(
        ids,
        (column < lengths).long(),
        answer_mask,
        image_mask,
        first_true(answer_mask, lengths[:, 0]),
        torch.arange(1, len(rows) + 1),
        pixels(int(image_mask.any(1).sum()), dtype),
    )


def words(count: int, seed: int = 0) -> list[int]:
    """Return random words."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(7, VOCAB, (count,), generator=random).tolist()
