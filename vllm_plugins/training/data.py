"""Image-text samples in the LLaVA JSON layout: reading, and refusing what cannot be trained on.

The layout is a list of ``{"id", "image", "conversations": [{"from", "value"}, ...]}`` beside a
folder of images. ``image`` is a path below that folder, and is absent from a sample of text alone;
``conversations`` alternates ``human`` and ``gpt``, and the first human turn holds ``<image>`` once,
at its beginning or its end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from vllm_plugins.errors import PluginError

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
MARKER = "<image>"
HUMAN, GPT = "human", "gpt"
# The mix of LLaVA-1.5 is one file of a gigabyte.
MAX_JSON_BYTES = 8 << 30
MAX_PIXELS = 1 << 26
# What an image weighs against letters of text when batches are made of samples of like length.
IMAGE_LETTERS = 2048


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        question: Without the marker of the image.
        answer: What the loss is computed on.
    """

    question: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        where: File, entry and identifier, for messages.
        image: File of the picture, or None for a sample of text alone.
        image_first: Whether the image stands before the first question or after it.
        turns: At least one.
    """

    where: str
    image: Path | None
    image_first: bool
    turns: tuple[Turn, ...]

    @property
    def letters(self) -> int:
        """Rough length, for batches of samples of like length; an image counts as letters."""
        text = sum(len(turn.question) + len(turn.answer) for turn in self.turns)
        return text + (IMAGE_LETTERS if self.image else 0)


def read_samples(data: Path, images: Path | None, images_only: bool = False) -> list[Sample]:
    """Read and check a file of samples, but not the pictures themselves: see `pictures`.

    A turn of ``gpt`` before the first question and a question after the last answer are left out,
    as LLaVA's own training does: neither has a loss.

    Args:
        data: The JSON file.
        images: Folder that the samples' image paths are relative to.
        images_only: Leave out samples without an image.

    Raises:
        PluginError: The file or an entry is not of this layout, an image path leads out of the
            folder or to no file, or no sample is left.
    """
    if images is not None and not images.is_dir():
        raise PluginError(str(images), "is not a folder", "name the folder of the images")
    entries, images = _read_json(data), images.resolve() if images else None
    samples = [_read_entry(entry, f"{data}: entry {i}", images) for i, entry in enumerate(entries)]
    samples = [sample for sample in samples if sample.image is not None or not images_only]
    if not samples:
        wanted = "sample with an image" if images_only else "sample"
        raise PluginError(str(data), f"has no {wanted}", "give other data")
    return samples


def _read_json(path: Path) -> list[Any]:
    mend = 'it must be a list of {"id", "image", "conversations"}'
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise PluginError(str(path), f"is over {MAX_JSON_BYTES >> 30} GiB", "split it")
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PluginError(str(path), f"cannot be read ({error.strerror})", "check --data") from None
    except ValueError as error:
        raise PluginError(str(path), f"is not JSON ({error})", mend) from None
    if not isinstance(entries, list):
        raise PluginError(str(path), "is not a list", mend)
    return entries


def _read_entry(entry: Any, where: str, images: Path | None) -> Sample:
    if not isinstance(entry, dict):
        raise PluginError(where, "is not an object", "see the LLaVA JSON layout")
    if "id" in entry:
        where = f"{where} (id {str(entry['id'])[:80]!r})"
    pairs = _read_turns(entry.get("conversations"), where)
    image = _read_image(entry.get("image"), where, images)
    markers = [question.count(MARKER) for question, _ in pairs]
    if sum(markers) != markers[0] or markers[0] != (image is not None):
        expected = "once, in the first question" if image else "nowhere, as there is no image"
        raise PluginError(where, f"{MARKER} must stand {expected}", "mend or leave out the entry")
    first = pairs[0][0].strip()
    if image and not (first.startswith(MARKER) or first.endswith(MARKER)):
        raise PluginError(where, f"{MARKER} stands inside the question", "move it to an end")
    turns = tuple(Turn(q.replace(MARKER, "").strip(), a.strip()) for q, a in pairs)
    return Sample(where, image, first.startswith(MARKER), turns)


def _read_turns(value: Any, where: str) -> list[tuple[str, str]]:
    """Return questions with their answers, markers still in."""
    turns: list[tuple[str, str]] = []
    for turn in value if isinstance(value, list) else []:
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (0, 0)
        if speaker not in (HUMAN, GPT) or not isinstance(text, str):
            raise PluginError(
                where, f"has a turn that is not {HUMAN}'s or {GPT}'s text", "mend the entry"
            )
        turns.append((speaker, text))
    if turns and turns[0][0] == GPT:
        turns = turns[1:]
    if turns and turns[-1][0] == HUMAN:
        turns = turns[:-1]
    if not turns:
        raise PluginError(where, "has no question with an answer", "mend or leave out the entry")
    if any(speaker != (HUMAN, GPT)[i % 2] for i, (speaker, _) in enumerate(turns)):
        raise PluginError(where, f"{HUMAN} and {GPT} do not take turns", "mend the entry")
    return [(turns[i][1], turns[i + 1][1]) for i in range(0, len(turns), 2)]


def _read_image(value: Any, where: str, images: Path | None) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise PluginError(where, "image is not one path", "give one image for each entry")
    name = PurePosixPath(value)
    if name.is_absolute() or ".." in name.parts or "\\" in value or "\0" in value:
        raise PluginError(
            where, f"image {value!r} leads out of the image folder", "use a path below it"
        )
    if images is None:
        raise PluginError(where, "has an image", "name their folder with --images")
    path = images / name
    if not path.is_file():
        raise PluginError(where, f"image {value!r} is not in {images}", "check --images")
    # A link inside the folder may still lead out of it.
    if not path.resolve().is_relative_to(images):
        raise PluginError(where, f"image {value!r} leads out of the image folder", "copy it there")
    return path


def load_image(sample: Sample, max_pixels: int = MAX_PIXELS) -> Image:
    """Return a sample's picture as RGB.

    Raises:
        PluginError: It cannot be decoded, or has more than ``max_pixels`` pixels.
    """
    return _read_picture(sample, max_pixels, lambda picture: picture.convert("RGB"))


def check_image(sample: Sample, max_pixels: int = MAX_PIXELS) -> None:
    """Read a sample's picture as far as that goes without decoding it.

    Raises:
        PluginError: As of :func:`load_image`.
    """
    _read_picture(sample, max_pixels, lambda picture: picture.verify())


def _read_picture(sample: Sample, max_pixels: int, read: Callable[[Image], T]) -> T:
    from PIL import Image

    assert sample.image is not None
    try:
        with Image.open(sample.image) as picture:
            # The header alone has been read so far.
            if picture.width * picture.height > max_pixels:
                raise PluginError(
                    sample.where,
                    f"image has {picture.width} x {picture.height} pixels, over {max_pixels}",
                    "scale it down",
                )
            return read(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, PluginError):
            raise
        # Leaving the entry out would make it another run, which --resume refuses.
        raise PluginError(
            sample.where, f"image cannot be decoded ({error})", "replace the picture"
        ) from None


def split_samples(
    samples: Sequence[Sample], held_out: int, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Split off samples that are not trained on, chosen by the seed alone.

    Raises:
        PluginError: Nothing would be left to train on.
    """
    if held_out >= len(samples):
        raise PluginError(
            "--held-out", f"{held_out} of {len(samples)} samples leave none", "lower it"
        )
    order = np.random.default_rng(seed).permutation(len(samples))
    kept = np.sort(order[held_out:])
    return [samples[i] for i in kept], [samples[i] for i in order[:held_out]]
