"""Draw the things of a scene: shapes, digits and words of three letters, on a noisy background.

Glyphs are a bitmap font of this module, so that no font file is needed and every Pillow draws the
same pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

IMAGE = 128
"""Pixels of an image's side."""
MARGIN, CELL = 4, 40
"""Pixels before the first cell of the grid, and of a cell's side."""
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 75, 230),
    "yellow": (235, 220, 40),
    "purple": (150, 50, 190),
    "orange": (245, 140, 25),
    "cyan": (50, 210, 220),
}
TONES = {"dark": 35, "light": 215}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
RADIUS = {"small": 8, "large": 14}
"""Half of a shape's side, in pixels."""
GLYPH_WIDTH, GLYPH_HEIGHT = 5, 7
SCALE = {"digit": 3, "word": 2}
"""Pixels of a glyph's dot."""
TINT, NOISE, SHADE = 12, 20, 15
"""Largest deviation from a tone's level: of a channel, of a pixel, of a thing's colour."""

# Seven rows of five dots each, as hexadecimal numbers.
_FONT = {
    "0": "0e11131519110e",
    "1": "040c040404040e",
    "2": "0e11010204081f",
    "3": "1f02040201110e",
    "4": "02060a121f0202",
    "5": "1f101e0101110e",
    "6": "0608101e11110e",
    "7": "1f010204080808",
    "8": "0e11110e11110e",
    "9": "0e11110f01020c",
    "a": "0e11111f111111",
    "b": "1e11111e11111e",
    "c": "0e11101010110e",
    "d": "1c12111111121c",
    "e": "1f10101e10101f",
    "f": "1f10101e101010",
    "g": "0e11101711110f",
    "h": "1111111f111111",
    "i": "0e04040404040e",
    "j": "0702020202120c",
    "k": "11121418141211",
    "l": "1010101010101f",
    "m": "111b1515111111",
    "n": "11191915131311",
    "o": "0e11111111110e",
    "p": "1e11111e101010",
    "q": "0e11111115120d",
    "r": "1e11111e141211",
    "s": "0f10100e01011e",
    "t": "1f040404040404",
    "u": "1111111111110e",
    "v": "11111111110a04",
    "w": "11111115151b11",
    "x": "11110a040a1111",
    "y": "11110a04040404",
    "z": "1f01020408101f",
}


class Box(NamedTuple):
    """Where a thing is drawn, in pixels; `right` and `bottom` are the first not drawn to."""

    left: int
    top: int
    right: int
    bottom: int


def background(tone: str, noise: np.random.Generator) -> np.ndarray:
    """Return a noisy background of one tone, [IMAGE, IMAGE, 3] in float32 of 0 to 255."""
    tint = noise.uniform(-TINT, TINT, 3)
    pixels = TONES[tone] + tint + noise.uniform(-NOISE, NOISE, (IMAGE, IMAGE, 3))
    return pixels.astype(np.float32)


def stamp(pixels: np.ndarray, mask: Image.Image, colour: str, noise: np.random.Generator) -> None:
    """Paint a mask's set pixels in a colour's noisy shade, in place.

    Args:
        pixels: [IMAGE, IMAGE, 3] of float32.
        mask: an image of mode "L" of the same size.
        colour: one of `COLOURS`.
        noise: where the shade and the grain come from.
    """
    shade = np.array(COLOURS[colour]) + noise.uniform(-SHADE, SHADE, 3)
    where = np.asarray(mask) > 0
    grain = noise.uniform(-NOISE, NOISE, (int(where.sum()), 3)) / 2
    pixels[where] = shade + grain


def shape_mask(shape: str, size: str, centre: tuple[int, int]) -> tuple[Image.Image, Box]:
    """Return the mask of a shape and its box."""
    (x, y), r = centre, RADIUS[size]
    box = Box(x - r, y - r, x + r + 1, y + r + 1)
    mask = Image.new("L", (IMAGE, IMAGE))
    pen = ImageDraw.Draw(mask)
    arm = r // 3
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=255)
    elif shape == "diamond":
        pen.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=255)
    else:
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=255)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=255)
    return mask, box


def text_mask(text: str, scale: int, centre: tuple[int, int]) -> tuple[Image.Image, Box]:
    """Return the mask of digits or small letters, each dot `scale` pixels wide, and its box."""
    width, height = (len(text) * (GLYPH_WIDTH + 1) - 1) * scale, GLYPH_HEIGHT * scale
    left, top = centre[0] - width // 2, centre[1] - height // 2
    mask = Image.new("L", (IMAGE, IMAGE))
    for place, character in enumerate(text):
        at = left + place * (GLYPH_WIDTH + 1) * scale
        mask.paste(_glyph(character, scale), (at, top))
    return mask, Box(left, top, left + width, top + height)


def _glyph(character: str, scale: int) -> Image.Image:
    rows = np.frombuffer(bytes.fromhex(_FONT[character]), np.uint8)[:, None]
    dots = rows >> np.arange(GLYPH_WIDTH)[::-1] & 1
    return Image.fromarray(np.kron(dots, np.full((scale, scale), 255)).astype(np.uint8))
