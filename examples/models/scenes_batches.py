"""Training batches of scenes: pixels, the truth of patches, questions and conversations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from random import Random

import numpy as np
import torch
from scenes_data import DESCRIBE, HELD_OUT, ID, Question, Scene, make_scene
from scenes_model import EOS, PAD, PATCHES
from scenes_patches import patch_truth

IGNORED = -100
ROW, QUESTIONS = 12, 16
"""Tokens of a question with its answer and end, and questions on an image."""
TALK = 72
"""Tokens of a conversation: a description, or several questions."""
# How often an image's conversation is a description, and not questions one after the other.
_DESCRIBED = 0.7


@dataclass(frozen=True)
class Batch:
    """Scenes, each with questions that do not see one another and one conversation.

    Attributes:
        images: [batch, 3, IMAGE, IMAGE] of uint8.
        truth: [batch, PATCHES, fields], see `patch_truth`.
        kept: [batch, kept], the patches that are computed, ascending.
        asked: [batch, QUESTIONS, ROW], token ids of question, answer and end.
        asked_wanted: the same shape, the next token where it is the answer's, else `IGNORED`.
        talk, talk_wanted: likewise of the conversation, [batch, 1, TALK].
    """

    images: torch.Tensor
    truth: torch.Tensor
    kept: torch.Tensor
    asked: torch.Tensor
    asked_wanted: torch.Tensor
    talk: torch.Tensor
    talk_wanted: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        moved = (getattr(self, field.name).to(device) for field in fields(self))
        return Batch(*moved)


def row_of(turns: Iterable[tuple[str, str]], length: int) -> tuple[list[int], list[int]]:
    """Return token ids and wanted next tokens of turns, padded.

    Args:
        turns: (question, answer) in words.
        length: tokens of the row; what does not fit is a `ValueError`.
    """
    ids: list[int] = []
    wanted: list[int] = []
    for question, answer in turns:
        given = [ID[word] for word in question.split()]
        told = [*(ID[word] for word in answer.split()), EOS]
        wanted += [IGNORED] * (len(given) - 1) + told + [IGNORED]
        ids += given + told
    if len(ids) > length:
        raise ValueError(f"{len(ids)} tokens do not fit in a row of {length}")
    spare = length - len(ids)
    return ids + [PAD] * spare, wanted + [IGNORED] * spare


class Scenes(torch.utils.data.Dataset):
    """Scenes of successive seeds, as arrays; an index gives the same example everywhere.

    Args:
        first: seed of the first scene.
        count: scenes.
        kept: patches kept of each image: those of things first, then others, at random.
    """

    def __init__(self, first: int, count: int, kept: int = PATCHES) -> None:
        if first < HELD_OUT < first + count:
            raise ValueError("training scenes run into the held-out ones")
        self._first, self._count, self._kept = first, count, kept

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        seed = self._first + index
        scene, rng = make_scene(seed), Random(f"batch of {seed}")
        truth = patch_truth(scene)
        rows = [row_of([(q.text, q.answer)], ROW) for q in _some(rng, scene.questions)]
        asked, wanted = (np.array(part) for part in zip(*rows, strict=True))
        talk, answered = (np.array([part]) for part in row_of(_conversation(rng, scene), TALK))
        pixels = np.asarray(scene.image).transpose(2, 0, 1)
        return pixels, truth, _kept(rng, truth, self._kept), asked, wanted, talk, answered


def _some(rng: Random, questions: Sequence[Question]) -> list[Question]:
    """Return `QUESTIONS` questions, the last ones again where there are fewer."""
    spare = max(0, QUESTIONS - len(questions))
    return [*questions[:QUESTIONS], *rng.choices(questions, k=spare)]


def _conversation(rng: Random, scene: Scene) -> list[tuple[str, str]]:
    if rng.random() < _DESCRIBED:
        return [(DESCRIBE, scene.description)]
    asked = rng.sample(scene.questions, min(len(scene.questions), TALK // (ROW - 1)))
    return [(question.text, question.answer) for question in asked]


def _kept(rng: Random, truth: np.ndarray, count: int) -> np.ndarray:
    first = np.random.Generator(np.random.PCG64(rng.getrandbits(63))).random(len(truth))
    first[truth[:, 0] > 0] -= 1
    return np.sort(np.argsort(first)[:count])


def collate(examples: Sequence[tuple[np.ndarray, ...]]) -> Batch:
    """Stack examples of `Scenes`."""
    return Batch(*(torch.from_numpy(np.stack(part)) for part in zip(*examples, strict=True)))
