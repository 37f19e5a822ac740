"""How well a model answers with tokens really removed, and whether the keep rates are held.

All answer tokens of a conversation are computed at once, under the mask that equation 6 amounts to;
`reference` computes them one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch.nn import functional

from vllm_plugins.visual_tokens.dynamic_llava.decoder import Decoder
from vllm_plugins.visual_tokens.dynamic_llava.losses import LEN_OT, long_answers
from vllm_plugins.visual_tokens.dynamic_llava.predictors import Predictors, keeps
from vllm_plugins.visual_tokens.dynamic_llava.reference import Scorer, image_scores, kept_positions

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from vllm_plugins.training.batches import Batch


@dataclass(frozen=True)
class Dropping:
    """What is dropped when a conversation is computed.

    Attributes:
        image_keep_rate: Share of each image's tokens to keep.
        scorer: What orders them; see `reference.reference_logits`.
        block_size: Drop whole blocks of so many tokens only; None drops all but the wanted number.
        text_keep: Let the text predictor drop tokens of long answers.
        long_answer: Tokens from which on an answer is long.
    """

    image_keep_rate: float = 1.0
    scorer: Literal["predictor"] | Scorer = "predictor"
    block_size: int | None = None
    text_keep: bool = False
    long_answer: int = LEN_OT


class Answers(NamedTuple):
    """How the answers of a conversation come out, each token after the right ones before it.

    Attributes:
        losses: Cross-entropy of each answer token in nats, shape (answer tokens,).
        right: Of each turn, whether all tokens are the likeliest ones, bool, shape (turns,).
        decided: Of each answer token that the text predictor decided on, whether it is kept.
    """

    losses: torch.Tensor
    right: torch.Tensor
    decided: torch.Tensor


@torch.no_grad()
def answer(
    model: LlavaForConditionalGeneration,
    predictors: Predictors | None,
    sparse_layer: int,
    batch: Batch,
    dropping: Dropping,
) -> Answers:
    """Compute the answers of one conversation with an image.

    Args:
        model: transformers' LLaVA.
        predictors: As far as ``dropping`` uses them.
        sparse_layer: l.
        batch: The conversation alone, shape (1, n).
        dropping: What is dropped.
    """
    decoder, layer = Decoder(model), sparse_layer
    features = decoder.image_features(batch.pixels["pixel_values"])
    hidden = decoder.embed(batch.input_ids, features)
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    everyone = torch.ones_like(positions, dtype=torch.bool)
    hidden = decoder.run(hidden, range(layer), positions[None], _visible(positions, everyone))
    rows, seen = positions, everyone.clone()
    if dropping.image_keep_rate < 1:
        spans = batch.image_mask[0].nonzero().view(len(features), -1)
        scores = image_scores(predictors, dropping.scorer, hidden[0, spans])
        rate, size = dropping.image_keep_rate, dropping.block_size
        rows = kept_positions(spans, scores, len(positions), rate, size)
    decided = long_answers(batch.answer_mask, dropping.long_answer)[0]
    if dropping.text_keep:
        seen[decided] = _text_decisions(predictors, hidden[0, decided])
    upper = range(layer, decoder.layers)
    out = decoder.run(hidden[:, rows], upper, rows[None], _visible(rows, seen))[0]
    before = batch.answer_mask[0, 1:].nonzero().flatten()
    logits = decoder.logits(out[torch.searchsorted(rows, before)])
    return _judge(logits, batch, seen[decided] if dropping.text_keep else seen[:0])


def _visible(rows: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Return which of some positions each sees: itself, and earlier ones that are seen at all."""
    earlier, itself = rows[None] < rows[:, None], rows[None] == rows[:, None]
    return (earlier & seen[rows] | itself)[None, None]


def _text_decisions(predictors: Predictors | None, hidden: torch.Tensor) -> torch.Tensor:
    if predictors is None or predictors.text_predictor is None:
        raise ValueError("there is no text predictor")
    return keeps(predictors.text_predictor(hidden))


def _judge(logits: torch.Tensor, batch: Batch, decided: torch.Tensor) -> Answers:
    answers = batch.answer_mask[0]
    targets = batch.input_ids[0][answers]
    before = functional.pad(answers, (1, 0))[:-1]
    turn = ((answers & ~before).cumsum(0) - 1)[answers]
    # The limit of tokens may have cut all answers off.
    turns = int(turn[-1]) + 1 if len(turn) else 0
    wrong = torch.zeros(turns, dtype=torch.int64, device=logits.device)
    wrong.scatter_add_(0, turn, (logits.argmax(-1) != targets).long())
    losses = functional.cross_entropy(logits.double(), targets, reduction="none")
    return Answers(losses, wrong == 0, decided)


def summary(found: Iterable[Answers]) -> dict[str, float]:
    """Return means over conversations: of tokens' losses, of right answers, of tokens kept.

    Args:
        found: At least one conversation's answers.

    Returns:
        ``cross_entropy`` and ``right``, and ``text_kept``; each absent where nothing counts for it.
    """
    names = ("cross_entropy", "right", "text_kept")
    gathered = (torch.cat(parts).double() for parts in zip(*found, strict=True))
    return {n: x.mean().item() for n, x in zip(names, gathered, strict=True) if len(x)}
