"""Scenes for the scenes fixture: a few things on a grid, questions about them, a description.

A scene has one to four things (shapes, digits, words of three letters) in the cells of a grid of
three rows and columns, drawn on a dark or light noisy background. All of it is drawn from the seed:
the same seed gives the same pixels, questions and description. Seeds from `HELD_OUT` on are never
trained on.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from random import Random

import numpy as np
from PIL import Image
from scenes_draw import (
    CELL,
    COLOURS,
    MARGIN,
    SCALE,
    SHAPES,
    TONES,
    Box,
    background,
    shape_mask,
    stamp,
    text_mask,
)

HELD_OUT = 1_000_000_000
"""The first seed of the scenes that training never sees."""
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
SIZES = ("small", "large")
DIGITS = tuple("0123456789")
_WORDS = "cat dog sun cup bus key hat box map pen car fox jam log net owl pig rug tea van"
WORDS = tuple(_WORDS.split())
KINDS = (*SHAPES, "digit", "word")
PLURAL = {kind: f"{kind}es" if kind == "cross" else f"{kind}s" for kind in KINDS}
NUMBERS = ("zero", "one", "two", "three", "four")
DESCRIBE = "describe the image ."
_QUESTION_WORDS = (
    "what which how where is are there the a at in on thing things color large many written "
    "describe image this shows background row yes no nothing"
)
_SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
_JITTER_X, _JITTER_Y = 2, 5
# How often a thing takes over the kind or the colour of the one before it, so that there is
# something to count and colours alone do not tell things apart.
_REPEATED = 0.3

VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(
        (
            *_SPECIAL,
            *".?,",
            *_QUESTION_WORDS.split(),
            *COLOURS,
            *SIZES,
            *TONES,
            *KINDS,
            *PLURAL.values(),
            *NUMBERS,
            *ROWS,
            *COLUMNS,
            *DIGITS,
            *WORDS,
        )
    )
)
ID = {word: index for index, word in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Thing:
    """One thing in a scene.

    Attributes:
        kind: one of `KINDS`.
        colour: one of `COLOURS`.
        detail: a shape's size, the digit, or the word.
        cell: row * 3 + column.
        box: where it is drawn, in pixels.
    """

    kind: str
    colour: str
    detail: str
    cell: int
    box: Box

    @property
    def place(self) -> str:
        """The cell in words, such as "top left"."""
        return place_of(self.cell)

    @property
    def text(self) -> str:
        """What it is, such as "a small red circle" or "a blue digit 7"."""
        if self.kind in SHAPES:
            return f"a {self.detail} {self.colour} {self.kind}"
        return f"a {self.colour} {self.kind} {self.detail}"


@dataclass(frozen=True)
class Question:
    """A question on a scene; all three are words of `VOCABULARY` with spaces between them."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    Attributes:
        seed: what it was drawn from.
        tone: of the background, one of `TONES`.
        things: in raster order.
        image: RGB, `IMAGE` pixels wide and high.
    """

    seed: int
    tone: str
    things: tuple[Thing, ...]
    image: Image.Image

    @cached_property
    def questions(self) -> list[Question]:
        """Questions of every kind that the scene allows, in a random order."""
        rng = Random(f"questions on {self.seed}")
        asked = [
            *_on_places(rng, self.things),
            *_on_numbers(rng, self.things),
            *_on_single_things(self.things),
            *_on_presence(rng, self.things),
        ]
        rng.shuffle(asked)
        return asked

    @cached_property
    def description(self) -> str:
        """Everything in the scene in raster order; over 50 words for three things and more."""
        count = len(self.things)
        noun = "thing" if count == 1 else "things"
        sentences = [f"this image shows {NUMBERS[count]} {noun} on a {self.tone} background ."]
        for thing in self.things:
            row, column = thing.place.split()
            sentences.append(f"in the {row} row at the {column} there is {thing.text} .")
        return " ".join(sentences)


def place_of(cell: int) -> str:
    """Return a cell in words."""
    return f"{ROWS[cell // len(COLUMNS)]} {COLUMNS[cell % len(COLUMNS)]}"


def make_scene(seed: int) -> Scene:
    """Draw the scene of a seed."""
    rng, noise = Random(seed), np.random.Generator(np.random.PCG64(seed))
    tone = rng.choice(list(TONES))
    pixels = background(tone, noise)
    cells = sorted(rng.sample(range(len(ROWS) * len(COLUMNS)), rng.choice((1, 2, 3, 3, 4, 4))))
    things: list[Thing] = []
    for cell in cells:
        kind, colour = _kind_and_colour(rng, things)
        detail, centre = _detail(rng, kind), _centre(rng, cell)
        if kind in SHAPES:
            mask, box = shape_mask(kind, detail, centre)
        else:
            mask, box = text_mask(detail, SCALE[kind], centre)
        stamp(pixels, mask, colour, noise)
        things.append(Thing(kind, colour, detail, cell, box))
    drawn = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return Scene(seed, tone, tuple(things), drawn)


def _kind_and_colour(rng: Random, before: list[Thing]) -> tuple[str, str]:
    kind = rng.choice((rng.choice(SHAPES), rng.choice(KINDS), rng.choice(("digit", "word"))))
    colour = rng.choice(list(COLOURS))
    if before and rng.random() < _REPEATED:
        kind = before[-1].kind
    if before and rng.random() < _REPEATED:
        colour = before[-1].colour
    return kind, colour


def _detail(rng: Random, kind: str) -> str:
    return rng.choice({"digit": DIGITS, "word": WORDS}.get(kind, SIZES))


def _centre(rng: Random, cell: int) -> tuple[int, int]:
    row, column = divmod(cell, len(COLUMNS))
    x, y = (MARGIN + CELL * at + CELL // 2 for at in (column, row))
    return x + rng.randint(-_JITTER_X, _JITTER_X), y + rng.randint(-_JITTER_Y, _JITTER_Y)


def _on_places(rng: Random, things: tuple[Thing, ...]) -> list[Question]:
    asked = []
    for thing in things:
        asked.append(
            Question("color", f"what color is the thing at the {thing.place} ?", thing.colour)
        )
        asked.append(Question("what", f"what is at the {thing.place} ?", thing.text))
    empty = sorted(set(range(len(ROWS) * len(COLUMNS))) - {thing.cell for thing in things})
    asked.append(Question("what", f"what is at the {place_of(rng.choice(empty))} ?", "nothing"))
    return asked


def _on_numbers(rng: Random, things: tuple[Thing, ...]) -> list[Question]:
    kinds = Counter(thing.kind for thing in things)
    colours = Counter(thing.colour for thing in things)
    some = {things[0].kind, things[-1].kind, rng.choice(KINDS)}
    hues = {things[0].colour, things[-1].colour, rng.choice(list(COLOURS))}
    counts = [(PLURAL[kind], kinds[kind]) for kind in sorted(some)]
    counts += [(f"{colour} things", colours[colour]) for colour in sorted(hues)]
    counts.append(("things", len(things)))
    return [Question("count", f"how many {noun} are there ?", NUMBERS[n]) for noun, n in counts]


def _on_single_things(things: tuple[Thing, ...]) -> list[Question]:
    kinds = Counter(thing.kind for thing in things)
    pairs = Counter((thing.colour, thing.kind) for thing in things)
    asked = []
    for thing in things:
        name = f"the {thing.colour} {thing.kind}"
        if pairs[thing.colour, thing.kind] == 1:
            asked.append(Question("where", f"where is {name} ?", thing.place))
            if thing.kind in SHAPES:
                asked.append(Question("size", f"how large is {name} ?", thing.detail))
        if kinds[thing.kind] == 1:
            asked.append(Question("color", f"what color is the {thing.kind} ?", thing.colour))
            if thing.kind not in SHAPES:
                text = f"which {thing.kind} is written ?"
                asked.append(Question(thing.kind, text, thing.detail))
    return asked


def _on_presence(rng: Random, things: tuple[Thing, ...]) -> list[Question]:
    """Half of the answers are yes; half of the others are missed by the colour or kind alone."""
    present = {(thing.colour, thing.kind) for thing in things}
    absent = [(c, k) for c in COLOURS for k in KINDS if (c, k) not in present]
    colours, kinds = {c for c, _ in present}, {k for _, k in present}
    near = [(c, k) for c, k in absent if c in colours or k in kinds]
    chosen = [(rng.choice(sorted(present)), "yes") for _ in range(2)]
    chosen += [(rng.choice(near), "no"), (rng.choice(absent), "no")]
    return [Question("exists", f"is there a {c} {k} ?", answer) for (c, k), answer in chosen]
