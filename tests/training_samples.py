"""Image-text samples in the LLaVA JSON layout, in the words of the tiny models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_samples(folder: Path, count: int = 12, text_only: int = 2, side: int = 56) -> Path:
    """Write random pictures and conversations of one or two turns; return the JSON file.

    Args:
        folder: Made where missing; pictures lie in its folder `images`.
        count: Samples.
        text_only: How many of them, the last ones, have no image.
        side: Of a picture, in pixels.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    entries: list[dict[str, Any]] = []
    for index in range(count):
        entry: dict[str, Any] = {"id": f"sample-{index}"}
        marker = ""
        if index < count - text_only:
            entry["image"], marker = f"{index}.png", "<image>\n"
            pixels = random.integers(0, 256, (side, side, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "images" / entry["image"])
        turns = []
        for turn in range(1 + index % 2):
            question = " ".join(f"t{i}" for i in random.integers(7, 64, 3 + index % 3))
            answer = " ".join(f"t{i}" for i in random.integers(7, 64, 6 + index % 5))
            turns += [
                {"from": "human", "value": (marker if turn == 0 else "") + question},
                {"from": "gpt", "value": answer},
            ]
        entries.append({**entry, "conversations": turns})
    path = folder / "samples.json"
    path.write_text(json.dumps(entries))
    return path
