"""How much a scenes model gets right: questions of every kind, and descriptions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import numpy as np
import torch
from PIL import Image
from scenes_batches import ROW, row_of
from scenes_data import DESCRIBE, HELD_OUT, ID, VOCABULARY, Scene, make_scene
from scenes_forward import patch_states, read_image, row_logits
from scenes_model import BOS, EOS, IMAGE_TOKEN, PATCHES, normed
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

LONGEST = 80
"""Tokens at which a description is cut off."""
_TOGETHER = 16


def held_out(count: int, seed: int = 0) -> list[Scene]:
    """Return scenes that no training run sees; seeds that differ by `count` share none."""
    return [make_scene(HELD_OUT + seed + index) for index in range(count)]


def prompt_ids(question: str) -> list[int]:
    """Return the token ids of `<s>`, an image and a question."""
    return [BOS, *[IMAGE_TOKEN] * PATCHES, *(ID[word] for word in question.split())]


def pixels_of(images: Sequence[Image.Image]) -> torch.Tensor:
    """Return images as the model takes them, [batch, 3, IMAGE, IMAGE] of float32."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return normed(stacked.permute(0, 3, 1, 2))


@torch.no_grad()
def answers(model: LlavaForConditionalGeneration, scene: Scene) -> list[bool]:
    """Return which of a scene's questions greedy decoding answers exactly, end included.

    Greedy decoding gives an answer exactly if every token of it is the likeliest after those before
    it, so one pass over all questions tells.
    """
    rows = [row_of([(q.text, q.answer)], ROW) for q in scene.questions]
    ids, wanted = (torch.tensor([part]) for part in zip(*rows, strict=True))
    images = torch.from_numpy(np.asarray(scene.image).transpose(2, 0, 1)[None].copy())
    kept = torch.arange(PATCHES)[None]
    read = read_image(model, patch_states(model, images, kept), kept)
    found = row_logits(model, read, ids).argmax(-1)
    return ((found == wanted) | (wanted < 0)).all(-1)[0].tolist()


@torch.no_grad()
def descriptions(model: LlavaForConditionalGeneration, scenes: Sequence[Scene]) -> list[str]:
    """Return the model's own descriptions, decoded greedily with transformers."""
    prompt = torch.tensor([prompt_ids(DESCRIBE)] * len(scenes))
    told = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        pixel_values=pixels_of([scene.image for scene in scenes]),
        max_new_tokens=LONGEST,
        do_sample=False,
    )
    return [" ".join(_words(row)) for row in told[:, prompt.shape[1] :].tolist()]


def _words(ids: Sequence[int]) -> Iterator[str]:
    for token in ids:
        if token == EOS:
            return
        yield VOCABULARY[token]


def words_right(told: str, wanted: str) -> tuple[int, int]:
    """Return how many words of a description are right at their place, and how many there are."""
    pairs = list(zip_longest(told.split(), wanted.split()))
    return sum(a == b for a, b in pairs), len(pairs)


def evaluate(
    model: LlavaForConditionalGeneration, scenes: Sequence[Scene]
) -> dict[str, tuple[int, int]]:
    """Return (right, asked) for each kind of question and for the words of descriptions."""
    right, asked = Counter(), Counter()
    for scene in scenes:
        for question, exact in zip(scene.questions, answers(model, scene), strict=True):
            right[question.kind] += exact
            asked[question.kind] += 1
    for start in range(0, len(scenes), _TOGETHER):
        some = scenes[start : start + _TOGETHER]
        for scene, told in zip(some, descriptions(model, some), strict=True):
            good, words = words_right(told, scene.description)
            right["words of descriptions"] += good
            asked["words of descriptions"] += words
            right["whole descriptions"] += told == scene.description
            asked["whole descriptions"] += 1
    return {name: (right[name], asked[name]) for name in sorted(asked)}
