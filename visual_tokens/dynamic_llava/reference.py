"""Dynamic-LLaVA as the paper states it, in plain torch: dropped rows are removed.

This is what serving must agree with, one request at a time, in whatever precision the model has.
The prompt goes through layers below l whole and through the others without the dropped image
tokens, at its original positions. Then, with ``text_keep``, equation 6 is replayed token by token
on a real cache, from which the layers from l on forget what the text predictor drops.

transformers computes normalisation and rotation in float32 whatever the model's precision is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from vllm_plugins.engine.block_holes.plan import plan_hole
from vllm_plugins.visual_tokens.dynamic_llava.decoder import Decoder
from vllm_plugins.visual_tokens.dynamic_llava.predictors import (
    Predictors,
    choose,
    keep_scores,
    keeps,
    wanted_tokens,
)

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

Scorer = Callable[[torch.Tensor], torch.Tensor]
"""From the input of layer l at image tokens, (images, N, h), to scores, (images, N)."""


class Reference(NamedTuple):
    """What a pruned forward pass computed.

    Attributes:
        logits: Of the next token, at each row that the upper layers saw; shape (rows, vocabulary).
        kept: Positions of those rows, ascending, int64, shape (rows,). All text is among them: an
            answer token that is forgotten was still computed in its own step.
        decisions: Of each answer token, whether later ones see it, bool, shape (answer tokens,).
    """

    logits: torch.Tensor
    kept: torch.Tensor
    decisions: torch.Tensor


@torch.no_grad()
def reference_logits(
    model: LlavaForConditionalGeneration,
    predictors: Predictors | None,
    input_ids: torch.Tensor,
    *,
    sparse_layer: int,
    keep_rate: float,
    pixel_values: torch.Tensor | None = None,
    image_features: torch.Tensor | None = None,
    block_size: int | None = None,
    scorer: Literal["predictor"] | Scorer = "predictor",
    text_keep: bool = False,
    prompt_tokens: int | None = None,
) -> Reference:
    """Run one request with its image tokens, and answer tokens if wanted, dropped.

    Args:
        model: transformers' LLaVA, with eager or SDPA attention.
        predictors: Read where a scorer of their own is not given; the text predictor, any module
            from (1, h) to (1, 2), where ``text_keep`` is.
        input_ids: Prompt and answer, int64, shape (n,).
        sparse_layer: l.
        keep_rate: Share of each image's tokens to keep; 1 keeps all.
        pixel_values: Of the images, shape (images, channels, height, width).
        image_features: Instead of pixels, shape (images, N, h).
        block_size: Drop whole blocks of this many tokens only, as serving does; None drops all but
            the wanted number, as the paper does.
        scorer: What orders image tokens.
        text_keep: Decide on answer tokens one by one.
        prompt_tokens: Where the answer begins; needed with ``text_keep``.
    """
    if prompt_tokens is None and text_keep:
        raise ValueError("prompt_tokens says where the answer begins; it is needed with text_keep")
    decoder = Decoder(model)
    if pixel_values is not None:
        image_features = decoder.image_features(pixel_values)
    one = _Request(
        decoder, predictors, sparse_layer, decoder.embed(input_ids[None], image_features)
    )
    prompt = prompt_tokens if text_keep and prompt_tokens is not None else len(input_ids)
    hidden = one.lower(0, prompt)
    kept, after = torch.arange(len(input_ids), device=hidden.device).split_with_sizes(
        (prompt, len(input_ids) - prompt)
    )
    images = decoder.image_rows(input_ids[:prompt]).nonzero().flatten()
    if keep_rate < 1 and image_features is not None and len(images):
        spans = images.view(-1, image_features.shape[1])
        scores = image_scores(predictors, scorer, hidden[0, spans])
        kept = kept_positions(spans, scores, prompt, keep_rate, block_size)
    rows = one.upper(hidden[:, kept], kept)
    steps = [one.decode(position) for position in after.tolist()]
    logits = decoder.logits(torch.cat((rows, *(row for row, _ in steps)), dim=1)[0])
    decisions = torch.tensor([keep for _, keep in steps], dtype=torch.bool)
    return Reference(logits, torch.cat((kept, after)), decisions)


class _Request:
    """One request's passes through the two halves of the layers, and its cache.

    Args:
        decoder: The model's.
        predictors: See `reference_logits`.
        sparse_layer: l.
        embedded: The whole request's embeddings, shape (1, n, h).
    """

    def __init__(
        self,
        decoder: Decoder,
        predictors: Predictors | None,
        sparse_layer: int,
        embedded: torch.Tensor,
    ) -> None:
        from transformers import DynamicCache

        self._decoder, self._predictors, self._embedded = decoder, predictors, embedded
        self._halves = range(sparse_layer), range(sparse_layer, decoder.layers)
        self._cache = DynamicCache()

    def lower(self, start: int, stop: int) -> torch.Tensor:
        """Return the input of layer l at positions [start, stop), shape (1, stop - start, h)."""
        at = torch.arange(start, stop, device=self._embedded.device)
        return self._run(self._embedded[:, start:stop], 0, at)

    def upper(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the last layer's output for rows at these positions; shapes (1, m, h), (m,)."""
        return self._run(hidden, 1, positions)

    def _run(self, hidden: torch.Tensor, half: int, positions: torch.Tensor) -> torch.Tensor:
        # The first rows fill the cache; a single one after them sees all of it.
        mask = causal_mask(len(positions), hidden) if len(positions) > 1 else None
        return self._decoder.run(hidden, self._halves[half], positions[None], mask, self._cache)

    def decode(self, position: int) -> tuple[torch.Tensor, bool]:
        """Run one answer token by equation 6; return its output, (1, 1, h), and its decision."""
        if self._predictors is None or self._predictors.text_predictor is None:
            raise ValueError("there is no text predictor")
        hidden = self.lower(position, position + 1)
        keep = bool(keeps(self._predictors.text_predictor(hidden[0]))[0])
        out = self.upper(hidden, torch.tensor([position], device=hidden.device))
        if not keep:
            for layer in self._halves[1]:
                self._cache.layers[layer].crop(-1)
        return out, keep


def causal_mask(n: int, like: torch.Tensor) -> torch.Tensor:
    """Return the mask with which each of n rows sees itself and those before.

    It is one to be added, which every attention implementation of transformers takes.

    Args:
        n: Rows.
        like: A tensor of the precision and on the device wanted.

    Returns:
        Shape (1, 1, n, n).
    """
    lowest = torch.finfo(like.dtype).min
    return torch.full((n, n), lowest, dtype=like.dtype, device=like.device).triu(1)[None, None]


def image_scores(
    predictors: Predictors | None, scorer: Literal["predictor"] | Scorer, hidden: torch.Tensor
) -> torch.Tensor:
    """Return how much each image token should be kept, shape (images, N).

    Args:
        predictors: Read unless the scorer is another.
        scorer: What orders the tokens.
        hidden: Input of layer l at the images' tokens, shape (images, N, h).

    Raises:
        ValueError: The image predictor is wanted, and there is none.
    """
    if callable(scorer):
        return scorer(hidden)
    if predictors is None or predictors.image_predictor is None:
        raise ValueError("there is no image predictor")
    return keep_scores(predictors.image_predictor(hidden))


def kept_positions(
    spans: torch.Tensor, scores: torch.Tensor, length: int, rate: float, block_size: int | None
) -> torch.Tensor:
    """Return the positions of a prompt that the upper layers see.

    Args:
        spans: Positions of each image's tokens, consecutive, int64, shape (images, N).
        scores: Higher is kept, shape (images, N).
        length: Of the prompt, or of prompt and answer, in tokens.
        rate: Share of each image's tokens to keep.
        block_size: See `reference_logits`.

    Returns:
        Ascending, int64, shape (rows,).
    """
    tokens = spans.shape[1]
    wanted = wanted_tokens(tokens, rate)
    keep = torch.ones(length, dtype=torch.bool, device=spans.device)
    for span, ranked in zip(spans, scores, strict=True):
        selected, tail = wanted, 0
        if block_size is not None:
            start, end = int(span[0]), int(span[-1]) + 1
            hole = plan_hole(start, end, wanted, block_size, keep_last=True)
            selected, tail = hole.selected, hole.tail
        head = tokens - tail
        keep[span[:head]] = False
        keep[span[choose(ranked[None, :head], selected)[0]]] = True
    return keep.nonzero().flatten()
