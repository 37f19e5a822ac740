"""The model in training: all rows are computed, and masked attention hides the dropped ones.

The predictors read the input of layer l. Every layer from l on attends by `masked_attention` with
the decisions M: drawn for image tokens and for long answers, 1 elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from vllm_plugins.training.loop import Loss
from vllm_plugins.visual_tokens.dynamic_llava.decoder import Decoder
from vllm_plugins.visual_tokens.dynamic_llava.losses import (
    LAMBDA,
    LEN_OT,
    also_seen,
    draw_decisions,
    keep_rate_loss,
    long_answers,
    temperature,
    weighted,
)
from vllm_plugins.visual_tokens.dynamic_llava.masked_attention import register
from vllm_plugins.visual_tokens.dynamic_llava.predictors import keep_scores

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from vllm_plugins.training.batches import Batch
    from vllm_plugins.visual_tokens.dynamic_llava.predictors import Predictors


class Forward(NamedTuple):
    """What a training step's forward pass gives the losses.

    Attributes:
        logits: At the rows before the answers' tokens, shape (answer tokens, vocabulary).
        targets: The answers' tokens, int64, shape (answer tokens,).
        decisions: M as the predictors draw it, shape (batch, n).
        text_rows: Tokens whose decision the text predictor made, bool, shape (batch, n).
    """

    logits: torch.Tensor
    targets: torch.Tensor
    decisions: torch.Tensor
    text_rows: torch.Tensor


class Student(nn.Module):
    """A LLaVA with its predictors; the vision tower and the projector are frozen.

    Gradient checkpointing is transformers' own.

    Args:
        model: transformers' LLaVA, whose language model's attention implementation is replaced.
        predictors: Trained beside it.
        weight: Of the keep rates' terms, lambda.
        long_answer: Tokens from which on an answer is decided on, LEN_OT.
        varied: Share of images that are seen in larger part than drawn; see `losses.also_seen`.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        predictors: Predictors,
        weight: float = LAMBDA,
        long_answer: int = LEN_OT,
        varied: float = 0.0,
    ) -> None:
        super().__init__()
        self._weight, self.long_answer, self._varied = weight, long_answer, varied
        self.model, self.predictors = model, predictors
        model.model.language_model.set_attn_implementation(register())
        for part in self.frozen():
            part.requires_grad_(False)

    def frozen(self) -> tuple[nn.Module, nn.Module]:
        """Return the parts that are not trained."""
        return self.model.model.vision_tower, self.model.model.multi_modal_projector

    def train(self, mode: bool = True) -> Student:
        """Switch to training, or back, all but the frozen parts."""
        super().train(mode)
        for part in self.frozen():
            part.eval()
        return self

    def forward(self, batch: Batch, progress: float) -> Loss:
        """Return a micro-batch's loss, as a sum over its conversations.

        The cross-entropy is the mean over the micro-batch's answer tokens, as usual in training
        language models, and counts for each conversation.

        Args:
            batch: Conversations with an image each.
            progress: Share of training that is done.

        Returns:
            Terms ``answers`` (cross-entropy), ``image_kept`` (share of image tokens), and the
            squared distances ``image`` and ``text`` from the keep rates.
        """
        config, found = self.predictors.config, self.run(batch, temperature(progress))
        logits = found.logits.to(torch.promote_types(found.logits.dtype, torch.float32))
        # Conversations may have lost all of their answers to the limit of tokens.
        answers = functional.cross_entropy(logits, found.targets, reduction="sum")
        losses = weighted(
            answers / max(1, len(found.targets)),
            keep_rate_loss(found.decisions, batch.image_mask, config.image_keep_rate),
            keep_rate_loss(found.decisions, found.text_rows, config.text_keep_rate),
            self._weight,
        )
        count = torch.tensor(len(batch.input_ids), device=logits.device)
        kept = found.decisions.detach()[batch.image_mask].mean()
        terms = {"answers": losses.answers, "image": losses.image, "text": losses.text}
        terms = {name: value.detach() for name, value in terms.items()} | {"image_kept": kept}
        return Loss(losses.total * count, count, {n: v * count for n, v in terms.items()})

    def run(self, batch: Batch, temperature: float) -> Forward:
        """Run a batch with decisions drawn at a temperature."""
        decoder, layer = Decoder(self.model), self.predictors.config.sparse_layer
        with torch.no_grad():
            features = decoder.image_features(batch.pixels["pixel_values"])
        hidden = decoder.embed(batch.input_ids, features)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        mask = training_mask(batch.attention_mask)
        hidden = decoder.run(hidden, range(layer), positions, mask)
        text_rows = long_answers(batch.answer_mask, self.long_answer)
        decisions, seen = self._decide(
            hidden, batch.image_mask, features.shape[1], text_rows, temperature
        )
        upper = range(layer, decoder.layers)
        hidden = decoder.run(hidden, upper, positions, mask, keep=seen)
        predicted = batch.answer_mask[:, 1:]
        logits = decoder.logits(hidden[:, :-1][predicted])
        return Forward(logits, batch.input_ids[:, 1:][predicted], decisions, text_rows)

    def _decide(
        self,
        hidden: torch.Tensor,
        images: torch.Tensor,
        tokens: int,
        text_rows: torch.Tensor,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return M and what is seen, each of shape (batch, n); an image has so many tokens."""
        decisions = seen = torch.ones(images.shape, device=hidden.device)
        if self.predictors.image_predictor is not None:
            logits = self.predictors.image_predictor(hidden[images].unflatten(0, (-1, tokens)))
            drawn = more = draw_decisions(logits, temperature)
            if self._varied:
                rate = self.predictors.config.image_keep_rate
                more = also_seen(drawn, keep_scores(logits.detach()), rate, self._varied)
            ones = decisions.to(drawn.dtype)
            decisions, seen = (ones.masked_scatter(images, part) for part in (drawn, more))
        if self.predictors.text_predictor is not None:
            # All rows, whichever the batch decides on: every rank then has all gradients.
            drawn = draw_decisions(self.predictors.text_predictor(hidden), temperature)
            decisions, seen = (torch.where(text_rows, drawn, part) for part in (decisions, seen))
        return decisions, seen


def training_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Return which keys each row sees: itself, and tokens before it that are not padding.

    Args:
        attention_mask: 0 for padding, shape (batch, n).

    Returns:
        bool, shape (batch, 1, n, n).
    """
    n = attention_mask.shape[1]
    rows = torch.ones(n, n, dtype=torch.bool, device=attention_mask.device)
    itself = torch.eye(n, dtype=torch.bool, device=attention_mask.device)
    return (rows.tril() & (attention_mask.bool()[:, None] | itself))[:, None]
