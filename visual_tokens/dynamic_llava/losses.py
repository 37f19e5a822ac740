"""What training minimises, and how it draws decisions (section 3.3 and appendix A.1).

The loss is the cross-entropy of answers plus
``lambda ((r_I - mean M_I)^2 + (r_OT - mean M_OT)^2)``, with the means over each conversation and
the squares averaged over the batch, as in the published code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from vllm_plugins.visual_tokens.dynamic_llava.predictors import KEEP

LAMBDA = 100.0
"""Weight of the keep rates' term."""

LEN_OT = 50
"""Tokens from which on an answer's tokens are decided on; shorter answers keep all."""

HOT, COLD = 1.0, 0.1
"""Temperature of the decisions in the first step and in the last."""


def temperature(progress: float) -> float:
    """Return the temperature of the decisions, which falls exponentially.

    Args:
        progress: Share of the steps that are done, in [0, 1].
    """
    return HOT * (COLD / HOT) ** progress


def draw_decisions(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Draw M by the Gumbel-softmax: hard in value, with the gradient of the soft sample.

    Args:
        logits: Of the predictors, shape (..., 2).
        temperature: Above 0.

    Returns:
        0 or 1, at least float32, shape (...).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.gumbel_softmax(logits, temperature, hard=True)[..., KEEP]


def also_seen(drawn: torch.Tensor, scores: torch.Tensor, rate: float, share: float) -> torch.Tensor:
    """Let some images be seen in larger part than was drawn, as serving at a higher rate would.

    Not in the paper [G]: a model that is trained at one keep rate alone answers worse where it sees
    more, above all how many things there are. Such an image shows its best tokens besides, up to a
    part drawn evenly between the keep rate and 1.

    Args:
        drawn: M of the images' tokens, shape (images, N).
        scores: How much each should be kept, shape (images, N).
        rate: Keep rate, r_I.
        share: Of images that are seen in larger part.

    Returns:
        What later layers see, shape (images, N); the gradient is that of M where M decides.
    """
    parts, luck = torch.rand(2, len(drawn), 1, device=drawn.device)
    ranks = scores.argsort(-1, descending=True).argsort(-1)
    more = (luck < share) & (ranks < (rate + (1 - rate) * parts) * scores.shape[1])
    return torch.where(more, 1.0, drawn)


def long_answers(answers: torch.Tensor, at_least: int = LEN_OT) -> torch.Tensor:
    """Return which tokens belong to an answer of at least so many tokens.

    Each turn's answer is judged by itself [G]: the paper speaks of one answer.

    Args:
        answers: Tokens of answers, bool, shape (batch, n); turns are apart.
        at_least: Tokens.

    Returns:
        bool, shape (batch, n).
    """
    before = functional.pad(answers, (1, 0))[:, :-1]
    turn = (answers & ~before).cumsum(-1)
    counts = torch.zeros(answers.shape[0], answers.shape[1] + 1, device=answers.device)
    counts = counts.long().scatter_add_(1, turn, answers.long())
    return answers & (counts.gather(1, turn) >= at_least)


def keep_rate_loss(decisions: torch.Tensor, where: torch.Tensor, rate: float) -> torch.Tensor:
    """Return the mean over the batch of the squared distance from a keep rate.

    A conversation without tokens of the kind counts as 0 [G].

    Args:
        decisions: M, shape (batch, n).
        where: Tokens that are decided on, bool, shape (batch, n).
        rate: Share of them to keep.

    Returns:
        Shape ().
    """
    count = where.sum(-1)
    mean = (decisions * where).sum(-1) / count.clamp(min=1)
    return ((rate - mean).square() * (count > 0)).mean()


@dataclass(frozen=True)
class Losses:
    """The parts of one batch's loss.

    Attributes:
        answers: Cross-entropy of the answers' tokens, in nats a token.
        image: Squared distance from the images' keep rate, before its weight.
        text: Squared distance from the answers' keep rate, before its weight.
        total: What is minimised.
    """

    answers: torch.Tensor
    image: torch.Tensor
    text: torch.Tensor
    total: torch.Tensor


def weighted(
    answers: torch.Tensor, image: torch.Tensor, text: torch.Tensor, weight: float = LAMBDA
) -> Losses:
    """Add up the parts; see `Losses`, all of shape ().

    Args:
        answers: Cross-entropy.
        image: Squared distance of the images' keep rate.
        text: Squared distance of the answers' keep rate.
        weight: Lambda.
    """
    return Losses(answers, image, text, answers + weight * (image + text))
