"""Random SpecVLM drafters for tiny vision-language models: nothing they draft is any good.

    python examples/models/drafter.py FOLDER

makes one for the model in a folder and prints where it is. What is answered is the target's own
whatever a drafter drafts, which is what a random one is good for.
"""

import sys
from pathlib import Path
from typing import Any

from build_once import CACHE, build_once

FORMAT = 1


def random_drafter(target: Path, grid: tuple[int, int], **settings: Any) -> Path:
    """Return a random drafter for a target.

    Args:
        target: The target's folder.
        grid: Lines and columns of its image patches.
        **settings: Of the drafter's block `specvlm`.
    """
    named = "-".join(f"{key}{value}" for key, value in sorted(settings.items()))
    block = {"grid": list(grid), "gate_width": 32, **settings}
    folder = CACHE / f"{target.name}-drafter{'-' if named else ''}{named}"
    described = {"format": FORMAT, "target": str(target), "block": block}
    return build_once(folder, described, lambda made: _build(made, target, block))


def _build(folder: Path, target: Path, block: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig

    from vllm_plugins.spec_decode.specvlm.checkpoint import save_drafter
    from vllm_plugins.spec_decode.specvlm.drafter import DrafterShape, EagleDrafter
    from vllm_plugins.spec_decode.specvlm.settings import SpecVLMSettings

    text = AutoConfig.from_pretrained(target).get_text_config()
    torch.manual_seed(1)
    made = EagleDrafter(DrafterShape.of_target(text), SpecVLMSettings.model_validate(block))
    with torch.no_grad():
        for parameter in made.parameters():
            # Large, so that what is drafted depends on every row.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_drafter(folder, made, text, torch.float32)


if __name__ == "__main__":
    # The tiny LLaVA's images have 4 by 4 patches.
    print(random_drafter(Path(sys.argv[1]), (4, 4)))
