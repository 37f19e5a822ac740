"""Online-logit distillation: the frozen target runs in the training step (paper, section 3).

    L = 0.1 * CE(softmax(z_p), z_q) + 1.0 * SmoothL1(f_q, f_p)

p is the target and q the drafter. At draft row t both are compared for position t + 1, that is the
target's feature f_{t+1} and its logits for token t + 2. Guesses, as the paper leaves them open:

- the loss is over rows from which serving drafts, those whose token t + 1 and t + 2 belong to an
  answer;
- the gate's pick is one operator for each sample, drawn with Gumbel noise. Every operator runs, and
  their outputs are mixed by the straight-through pick: the drafter learns from the picked one, the
  gate from how each would have changed the loss. Weighting the compressed rows instead would teach
  the gate nothing, since the layer's input norm takes their length away;
- the gate is pulled towards even use of the operators by a small term, which is not the paper's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from vllm_plugins.spec_decode.specvlm.chain import unroll
from vllm_plugins.spec_decode.specvlm.compact import CompactRows, compact, draft_span
from vllm_plugins.spec_decode.specvlm.drafter import EagleDrafter
from vllm_plugins.spec_decode.specvlm.gate import (
    gate_inputs,
    mixture,
    restrict,
    sample_straight_through,
    temperature,
)
from vllm_plugins.spec_decode.specvlm.reference import image_spans
from vllm_plugins.spec_decode.specvlm.settings import OPERATORS, Choice
from vllm_plugins.spec_decode.specvlm.target import FrozenTarget, TargetRows
from vllm_plugins.training.batches import Batch
from vllm_plugins.training.loop import Loss


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss's parts.

    Attributes:
        logit: Of the cross-entropy between drafts and the target.
        feature: Of the distance between predicted and true features.
        balance: Of the gate's distance from even use of the operators; 0 leaves it out.
    """

    logit: float = 0.1
    feature: float = 1.0
    balance: float = 0.01


@dataclass(frozen=True)
class Picks:
    """What is done to the images of a batch.

    Attributes:
        choices: Alternatives that every sample is run with; None leaves images whole.
        mixture: How their outputs are mixed, shape (samples, alternatives).
        weights: Of the parts of ``weighted``, shape (samples, 3), or None in other modes.
        logits: The gate's, shape (samples with an image, 5), or None without a gate.
    """

    choices: tuple[Choice | None, ...]
    mixture: torch.Tensor
    weights: torch.Tensor | None = None
    logits: torch.Tensor | None = None


def row_losses(
    predicted: torch.Tensor, feature: torch.Tensor, logits: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's soft cross-entropy and its smooth L1 distance, each of shape (rows,).

    Args:
        predicted: Feature of the drafter, f_q, shape (rows, hidden).
        feature: Of the target, f_p, of the same shape.
        logits: Of the drafter, z_q, shape (rows, vocabulary).
        target: Logits of the target, z_p, of the same shape.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_q = logits.to(wide).log_softmax(-1)
    cross = -(target.to(wide).softmax(-1) * log_q).sum(-1)
    smooth = functional.smooth_l1_loss(predicted.to(wide), feature.to(wide), reduction="none")
    return cross, smooth.mean(-1)


class Distillation(nn.Module):
    """One training step's forward: target, compression, drafter, loss.

    Args:
        target: Frozen.
        drafter: Trained; its settings say how images are compressed.
        weights: Of the loss's parts.
        steps: Draft steps that are unrolled, each fed with the one before's features. The paper
            trains one.
    """

    def __init__(
        self, target: FrozenTarget, drafter: EagleDrafter, weights: LossWeights, steps: int = 1
    ) -> None:
        super().__init__()
        self.target, self.drafter = target, drafter
        self._weights, self._steps = weights, steps

    def forward(self, batch: Batch, progress: float) -> Loss:
        """Return the loss of a batch, over its answer rows.

        Args:
            batch: On the device of the modules.
            progress: Share of training that is done, for the temperature of the gate.
        """
        rows = self.target(batch.input_ids, batch.attention_mask, batch.pixels)
        return self.loss_of(batch, rows, progress)

    def loss_of(self, batch: Batch, rows: TargetRows, progress: float) -> Loss:
        """Return the loss for what the target made of a batch."""
        fused = self.drafter.fuse(rows.embeddings[:, 1:], rows.features[:, :-1])
        picks = self.pick(batch, rows.features, progress)
        compacts = self.compact(batch, fused, picks)
        samples, runs = len(batch.input_ids), len(picks.choices)
        state = pad_sequence([c.rows for c in compacts], True)
        positions = pad_sequence([c.positions for c in compacts], True, 0)
        # Alternatives differ in what they make of an image, not in where the text lies.
        sources = pad_sequence([c.sources for c in compacts[:samples]], True, -1)
        at = sources.clamp(min=0)[..., None].expand(-1, -1, state.shape[-1])
        following = rows.embeddings[:, 1:].gather(1, at).repeat(runs, 1, 1)
        counted = answer_rows(batch).gather(1, sources.clamp(min=0)) & (sources >= 0)
        truth = rows.features[:, 1:].gather(1, at)
        passes = unroll(self.drafter, state, positions, self._steps, lambda _: following)
        predictions = (
            torch.einsum("sr,rsnh->snh", picks.mixture.to(out.dtype), out.unflatten(0, (runs, -1)))
            for out in passes
        )
        return self._sum(predictions, truth, counted, picks)

    def pick(self, batch: Batch, features: torch.Tensor, progress: float) -> Picks:
        """Choose what is done to each sample's images."""
        settings, samples = self.drafter.settings, len(batch.input_ids)
        alone = features.new_ones(samples, 1)
        if settings.mode not in ("select", "weighted"):
            return Picks((settings.choice(),), alone)
        ends = image_ends(batch.image_mask).tolist()
        lengths = batch.prompt_lengths.tolist()
        seen = [gate_inputs(features[i], max(1, lengths[i]), ends[i]) for i in range(samples)]
        logits = self.drafter.gate(*(torch.stack(parts) for parts in zip(*seen, strict=True)))
        pictured = batch.image_mask.any(1)
        if settings.mode == "weighted":
            return Picks((settings.choice(),), alone, mixture(logits), logits[pictured])
        logits = restrict(logits, settings.select_from)
        picked = sample_straight_through(logits, temperature(progress))
        columns = [OPERATORS.index(name) for name in settings.select_from]
        return Picks(settings.select_from, picked[:, columns], None, logits[pictured])

    def compact(self, batch: Batch, fused: torch.Tensor, picks: Picks) -> list[CompactRows]:
        """Compress the images of each sample and drop its padding, alternative by alternative."""
        lengths, seeds = batch.attention_mask.sum(1).tolist(), batch.image_seeds.tolist()
        spans = [[draft_span(*span) for span in image_spans(mask)] for mask in batch.image_mask]
        return [
            compact(
                fused[i, : length - 1],
                spans[i],
                choice,
                self.drafter.compressor,
                [seeds[i]] * len(spans[i]),
                None if picks.weights is None else picks.weights[i],
            )
            for choice in picks.choices
            for i, length in enumerate(lengths)
        ]

    def _sum(
        self,
        predictions: Iterable[torch.Tensor],
        truth: torch.Tensor,
        counted: torch.Tensor,
        picks: Picks,
    ) -> Loss:
        """Add the loss up over counted rows, and over the steps that are unrolled their mean."""
        total, weight = truth.new_zeros((), dtype=torch.float32), counted.sum()
        terms: dict[str, torch.Tensor] = {}
        for step, predicted in enumerate(predictions):
            if step:
                # A chain counts from a row that counts.
                counted = counted & functional.pad(counted[:, :-1], (1, 0))
            parts = self._parts(predicted[counted], truth[counted])
            part = self._weights.logit * parts["logit"] + self._weights.feature * parts["feature"]
            total = total + part / self._steps
            terms = terms or parts
        if picks.logits is not None:
            total = total + self._weights.balance * weight * imbalance(picks.logits)
            terms |= {name: weight * share for name, share in shares(picks).items()}
        return Loss(total, weight, {name: term.detach() for name, term in terms.items()})

    def _parts(self, predicted: torch.Tensor, truth: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return sums over rows of (rows, hidden): both losses, and agreement of the tokens."""
        logits = self.target.head(predicted)
        with torch.no_grad():
            true = self.target.head(truth)
        cross, smooth = row_losses(predicted, truth, logits, true)
        agreement = logits.argmax(-1) == true.argmax(-1)
        return {"logit": cross.sum(), "feature": smooth.sum(), "agreement": agreement.sum()}


def imbalance(logits: torch.Tensor) -> torch.Tensor:
    """Return the divergence of the mean pick from even use; (prompts, operators) to ().

    Operators at minus infinity cannot be picked and do not count.
    """
    if not len(logits):
        return logits.sum()
    mean, allowed = logits.softmax(-1).mean(0), logits[0].isfinite().sum()
    return (mean * (mean * allowed).clamp(min=1e-9).log()).sum()


def shares(picks: Picks) -> dict[str, torch.Tensor]:
    """Return how often the gate would pick each operator without noise, each of shape ()."""
    assert picks.logits is not None
    best = picks.logits.argmax(-1)
    return {
        f"pick_{name}": (best == index).sum() / max(1, len(best))
        for index, name in enumerate(OPERATORS)
    }


def answer_rows(batch: Batch) -> torch.Tensor:
    """Return the draft rows that the loss is over; bool, shape (batch, n - 1).

    Row t counts where tokens t + 1 and t + 2 belong to an answer: serving drafts from no other.
    """
    answers = batch.answer_mask
    return functional.pad(answers[:, 1:-1] & answers[:, 2:], (0, 1))


def image_ends(image_mask: torch.Tensor) -> torch.Tensor:
    """Return the position behind each sample's last image token, 0 without one; (batch, n)."""
    behind = torch.arange(1, image_mask.shape[1] + 1, device=image_mask.device)
    return (behind * image_mask).amax(1)
