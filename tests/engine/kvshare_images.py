"""Prompts with images, of the documents that `kvshare_engine` makes its prompts of."""

import numpy as np
from vision import QWEN_END, QWEN_IMAGE, QWEN_START

from tests.engine.kvshare_engine import DOCS


def with_images(*parts):
    """A prompt of texts and, for each string, an image of its own."""
    import PIL.Image

    tokens, images = [], []
    for part in parts:
        if isinstance(part, str):
            size = (56, 84) if part < "c" else (112, 56)
            color = tuple(np.random.default_rng(ord(part)).integers(0, 255, 3).tolist())
            images.append(PIL.Image.new("RGB", size, color))
            tokens += [QWEN_START, QWEN_IMAGE, QWEN_END]
        else:
            tokens += part
    return {"prompt_token_ids": tokens, "multi_modal_data": {"image": images}}


# Without the ids that stand for images, which DOCS has.
TEXTS = [[token + 8 for token in text] for text in DOCS]
