"""What each patch of a scene shows: the dense supervision that the tower is trained on first.

The script draws the images, so the truth of every patch is known. A throw-away linear probe reads
it from the tower's states; questions alone would take the tower far longer to learn from.
"""

from __future__ import annotations

from string import ascii_lowercase

import numpy as np
import torch
from scenes_data import COLUMNS, DIGITS, ID, KINDS, ROWS, SIZES, WORDS, Scene
from scenes_draw import CELL, COLOURS, GLYPH_WIDTH, IMAGE, MARGIN, SCALE, TONES
from scenes_model import PATCH, TOWER_WIDTH

SIDE = IMAGE // PATCH
_DETAILS = (*SIZES, *DIGITS, *WORDS)
# A patch counts as a thing's if its centre is at most this far outside of the thing's box.
_REACH = 2
NOT_ASKED = -100
_BACKGROUND = 0.1
FIELDS = {
    "kind": len(KINDS) + 1,
    "colour": len(COLOURS),
    "detail": len(_DETAILS),
    "cell": len(ROWS) * len(COLUMNS),
    "tone": len(TONES),
    "letter": len(ascii_lowercase),
}
"""Classes of each field. Kind 0 is the background, where colour and detail are not asked; a letter
is asked of words only, whose letters are learnt sooner than which word they make."""


def patch_truth(scene: Scene) -> np.ndarray:
    """Return the class of each field for each patch, [SIDE * SIDE, fields] of int64."""
    centres = np.arange(SIDE) * PATCH + PATCH // 2
    y, x = np.meshgrid(centres, centres, indexing="ij")
    truth = np.full((SIDE, SIDE, len(FIELDS)), NOT_ASKED, np.int64)
    row, column = (((at - MARGIN) // CELL).clip(0, 2) for at in (y, x))
    truth[..., 0], truth[..., 3] = 0, row * len(COLUMNS) + column
    truth[..., 4] = list(TONES).index(scene.tone)
    for thing in scene.things:
        box = thing.box
        inside = (x >= box.left - _REACH) & (x < box.right + _REACH)
        inside &= (y >= box.top - _REACH) & (y < box.bottom + _REACH)
        truth[inside, 0] = KINDS.index(thing.kind) + 1
        truth[inside, 1] = list(COLOURS).index(thing.colour)
        truth[inside, 2] = _DETAILS.index(thing.detail)
        truth[inside, 3] = thing.cell
        if thing.kind == "word":
            letter = (x[inside] - box.left) // ((GLYPH_WIDTH + 1) * SCALE["word"])
            spelt = np.array([ascii_lowercase.index(character) for character in thing.detail])
            truth[inside, 5] = spelt[letter.clip(0, len(spelt) - 1)]
    return truth.reshape(-1, len(FIELDS))


def _mean_loss(readings: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the mean over what is asked; 0 where nothing is, as of letters without a word."""
    summed = torch.nn.functional.cross_entropy(
        readings.flatten(0, 1),
        wanted.flatten(),
        weights,
        ignore_index=NOT_ASKED,
        reduction="sum",
    )
    counted = weights[wanted.clamp(min=0)] * (wanted != NOT_ASKED)
    return summed / counted.sum().clamp(min=_BACKGROUND)


def _share(readings: torch.Tensor, wanted: torch.Tensor, asked: torch.Tensor) -> float:
    """Return the share of right readings, 0 where nothing is asked."""
    right = (readings.argmax(-1) == wanted) & asked
    return (right.sum() / asked.sum().clamp(min=1)).item()


class Names:
    """Words that a patch is called by, one or none of each group.

    A patch's embedding is taught to be near those of its words (`loss`). A question that names a
    place then finds the patches there by likeness, and what they are called is the answer.
    """

    _GROUPS = (
        ("nothing", *KINDS),
        tuple(COLOURS),
        _DETAILS,
        ROWS,
        COLUMNS,
        tuple(TONES),
    )
    # A patch has up to six names, so its likeness to each is 0.4 at best; this makes it count.
    _SCALE = 16.0

    @classmethod
    def loss(
        cls, embedded: torch.Tensor, words: torch.Tensor, truth: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """Return the summed loss of the groups and the share of details called right.

        Args:
            embedded: [batch, patches, hidden], what the projector makes of patches.
            words: [vocabulary, hidden], the language model's embeddings.
            truth: [batch, patches, fields], see `patch_truth`.
        """
        kind, colour, detail, cell, tone, _ = truth.unbind(-1)
        wanted = (kind, colour, detail, cell // len(COLUMNS), cell % len(COLUMNS), tone)
        normalize = torch.nn.functional.normalize
        embedded, words = normalize(embedded.float(), dim=-1), normalize(words, dim=-1)
        total, right = embedded.new_zeros(()), 0.0
        for names, target in zip(cls._GROUPS, wanted, strict=True):
            called = cls._SCALE * embedded @ words[[ID[name] for name in names]].T
            weights = called.new_ones(len(names))
            weights[0] = _BACKGROUND if names[0] == "nothing" else 1.0
            total = total + _mean_loss(called, target, weights)
            if names is _DETAILS:
                right = _share(called, target, target != NOT_ASKED)
        return total, right


class Probe(torch.nn.Module):
    """Linear readings of every field from a patch's state."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(TOWER_WIDTH, elementwise_affine=False)
        self.read = torch.nn.Linear(TOWER_WIDTH, sum(FIELDS.values()))

    def loss(
        self, states: torch.Tensor, truth: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the summed loss of the fields and the share of right readings of each.

        Args:
            states: [batch, patches, TOWER_WIDTH].
            truth: [batch, patches, fields], see `patch_truth`.
        """
        readings = self.read(self.norm(states)).float().split(list(FIELDS.values()), dim=-1)
        total, right = states.new_zeros(()), {}
        for index, (name, reading) in enumerate(zip(FIELDS, readings, strict=True)):
            wanted = truth[..., index]
            weights = reading.new_ones(reading.shape[-1])
            asked = wanted != NOT_ASKED
            if name == "kind":
                # Most patches are background; where a kind counts is where it is not.
                weights[0], asked = _BACKGROUND, wanted > 0
            total = total + _mean_loss(reading, wanted, weights)
            right[name] = _share(reading, wanted, asked)
        return total, right
