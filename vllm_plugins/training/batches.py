"""Batches of tokenised conversations, in an order that a seed and a count of batches determine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_plugins.errors import PluginError
from vllm_plugins.training.data import MAX_PIXELS, Sample, load_image

if TYPE_CHECKING:
    from PIL.Image import Image

# Batches of one shuffled stretch are made of samples of like length: enough to save padding, and
# few enough that the order of an epoch stays random.
STRETCH = 64


@dataclass(frozen=True)
class Batch:
    """Conversations of one micro-batch, padded on the right.

    Attributes:
        input_ids: Tokens, an image as many as the model gives it; int64, shape (batch, length).
        attention_mask: 1 for tokens and 0 for padding; int64, shape (batch, length).
        answer_mask: Tokens of answers, their end included; bool, shape (batch, length).
        image_mask: Tokens that stand for an image; bool, shape (batch, length).
        prompt_lengths: Tokens before the first answer; int64, shape (batch,).
        image_seeds: A number made from the picture alone, 0 without one; int64, shape (batch,).
        pixels: What the model's processor made of the images, by its own names; empty without any.
        cut: Conversations that lost their end to the limit of tokens.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    answer_mask: torch.Tensor
    image_mask: torch.Tensor
    prompt_lengths: torch.Tensor
    image_seeds: torch.Tensor
    pixels: dict[str, torch.Tensor]
    cut: int = 0

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Return the batch on a device, with pixels in a floating-point type."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        pixels = {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in self.pixels.items()
        }
        return replace(self, **moved, pixels=pixels)


class Collator:
    """Turns samples into a batch with the model's own processor and chat template.

    An answer is what the template adds for a turn of the assistant, its end of turn included. Where
    the template ends a conversation without the tokenizer's end of sequence, that is added: the
    model must learn where to stop.

    Args:
        processor: The model's, with an image processor and a fast tokenizer.
        image_token: Identifier of the token that stands for a patch.
        max_tokens: Longest conversation; the rest is cut off and counted.
        max_pixels: Largest picture.

    Raises:
        PluginError: The processor has no chat template or no fast tokenizer.
    """

    def __init__(
        self, processor: Any, image_token: int, max_tokens: int, max_pixels: int = MAX_PIXELS
    ) -> None:
        tokenizer = processor.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise PluginError("tokenizer", "is not a fast one", "convert it to tokenizer.json")
        if not (getattr(processor, "chat_template", None) or tokenizer.chat_template):
            raise PluginError("processor", "has no chat template", "add a chat_template.jinja")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._processor = processor
        self._image_token, self._max_tokens = image_token, max_tokens
        self._max_pixels = max_pixels
        self._marker = tokenizer.convert_ids_to_tokens(image_token)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Return the batch of these conversations.

        Raises:
            PluginError: An image is bad, or one does not fit into the limit of tokens.
        """
        images = [load_image(s, self._max_pixels) if s.image else None for s in samples]
        rendered = [self.render(sample) for sample in samples]
        return self.encode([text for text, _ in rendered], images, rendered, samples)

    def encode(
        self,
        texts: Sequence[str],
        images: Sequence[Image | None],
        rendered: Sequence[tuple[str, list[tuple[int, int]]]],
        samples: Sequence[Sample],
    ) -> Batch:
        """Tokenise rendered conversations together with their pictures."""
        encoded = self._processor(
            text=list(texts),
            images=[image for image in images if image is not None] or None,
            return_tensors="pt",
            padding=True,
            padding_side="right",
            return_offsets_mapping=True,
            add_special_tokens=not self._starts_itself(texts[0]),
        )
        ids, mask = encoded.pop("input_ids"), encoded.pop("attention_mask")
        offsets, length = encoded.pop("offset_mapping"), min(ids.shape[1], self._max_tokens)
        image_mask = (ids == self._image_token) & mask.bool()
        if bool(image_mask[:, length:].any()):
            worst = int(image_mask[:, length:].any(1).int().argmax())
            raise PluginError(
                samples[worst].where,
                f"its image does not fit into {self._max_tokens} tokens",
                "raise --max-tokens",
            )
        answers = self._answer_mask(rendered, offsets, image_mask) & mask.bool()
        return Batch(
            ids[:, :length],
            mask[:, :length],
            answers[:, :length],
            image_mask[:, :length],
            first_true(answers, mask.sum(1)).clamp(max=length),
            torch.tensor([image_seed(image) for image in images]),
            {name: value for name, value in encoded.items() if isinstance(value, torch.Tensor)},
            int(mask[:, length:].any(1).sum()) if length < ids.shape[1] else 0,
        )

    def render(self, sample: Sample) -> tuple[str, list[tuple[int, int]]]:
        """Return a conversation as text, and where its answers lie, in letters from its end.

        Distances from the end hold whatever number of tokens the image before them becomes.

        Raises:
            PluginError: The chat template changes earlier turns when later ones are added.
        """
        messages: list[dict[str, Any]] = []
        spans, text = [], ""
        for index, turn in enumerate(sample.turns):
            content = [{"type": "text", "text": turn.question}]
            if sample.image and index == 0:
                content.insert(0 if sample.image_first else 1, {"type": "image"})
            messages.append({"role": "user", "content": content})
            start = self._template(messages, sample, text, prompt=True)
            answer = [{"type": "text", "text": turn.answer}]
            messages.append({"role": "assistant", "content": answer})
            text = self._template(messages, sample, start, prompt=False)
            spans.append((len(start), len(text)))
        ended = self._with_end(text)
        spans[-1] = (spans[-1][0], len(ended))
        return ended, [(len(ended) - start, len(ended) - end) for start, end in spans]

    def _template(self, messages: list[Any], sample: Sample, before: str, prompt: bool) -> str:
        text = self._processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
        if not text.startswith(before):
            raise PluginError(
                sample.where,
                "the chat template changes earlier turns when later ones are added",
                "train on conversations of one turn",
            )
        return str(text)

    def _with_end(self, text: str) -> str:
        end = self._processor.tokenizer.eos_token
        return text if end is None or text.rstrip().endswith(end) else text + end

    def _starts_itself(self, text: str) -> bool:
        start = self._processor.tokenizer.bos_token
        return start is not None and text.startswith(start)

    def _answer_mask(
        self,
        rendered: Sequence[tuple[str, list[tuple[int, int]]]],
        offsets: torch.Tensor,
        image_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Mark tokens of answers by the letters they came from; shape (batch, length)."""
        answers = torch.zeros(offsets.shape[:2], dtype=torch.bool)
        begins, ends = offsets[..., 0], offsets[..., 1]
        patches = image_mask.sum(1)
        for row, (text, spans) in enumerate(rendered):
            added = max(0, int(patches[row]) - 1) * len(self._marker)
            letters = len(text) + added
            for start, end in spans:
                inside = (ends[row] > letters - start) & (begins[row] < letters - end)
                answers[row] |= inside
        return answers


def first_true(mask: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Return the first true column of each row of a (n, m) mask, or what stands in its place."""
    return torch.where(mask.any(1), mask.int().argmax(1), otherwise)


def image_seed(image: Image | None) -> int:
    """Return a number that only the picture's content determines, 0 without one."""
    if image is None:
        return 0
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
    return int.from_bytes(digest[:7], "big")


@dataclass(frozen=True)
class Order:
    """The order of micro-batches, a function of the seed alone.

    A run may therefore stop after any micro-batch and continue with the next.

    Attributes:
        letters: Rough length of each sample.
        size: Samples of a micro-batch.
        seed: Of the shuffling.
        ranks: Processes that share an epoch; each gets the same number of micro-batches.
    """

    letters: tuple[int, ...]
    size: int
    seed: int
    ranks: int = 1

    def epoch_batches(self) -> int:
        """Number of micro-batches of an epoch, over all ranks; a multiple of the ranks.

        The last ones are filled up with samples from the epoch's beginning.
        """
        whole = self.size * self.ranks
        return -(-len(self.letters) // whole) * self.ranks

    def epoch(self, number: int) -> list[np.ndarray]:
        """Return the micro-batches of an epoch: indices of samples, each of shape (size,)."""
        random = np.random.default_rng((self.seed, number))
        order = np.resize(random.permutation(len(self.letters)), self.epoch_batches() * self.size)
        letters = np.asarray(self.letters)
        batches: list[np.ndarray] = []
        for begin in range(0, len(order), STRETCH * self.size):
            stretch = order[begin : begin + STRETCH * self.size]
            ordered = stretch[np.argsort(letters[stretch], kind="stable")]
            batches += list(ordered.reshape(-1, self.size))
        return [batches[i] for i in random.permutation(len(batches))]

    def follow(self, start: int, rank: int = 0) -> Iterator[np.ndarray]:
        """Yield one rank's micro-batches for ever, beginning after ``start`` of its own."""
        per_epoch = self.epoch_batches() // self.ranks
        number, skipped = divmod(start, per_epoch)
        while True:
            yield from self.epoch(number)[rank :: self.ranks][skipped:]
            number, skipped = number + 1, 0
