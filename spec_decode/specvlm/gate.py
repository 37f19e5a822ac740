"""The question-aware gate, which picks how an image is compressed (paper, section 3).

The paper says that the target's penultimate features drive it and leaves the rest open. Guesses:
its input is the target's feature of the last prompt token beside the mean feature of the question,
and it is a perceptron of two layers; the temperature falls exponentially.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from vllm_plugins.spec_decode.specvlm.settings import OPERATORS, WEIGHTED, Operator

TEMPERATURES = (1.0, 0.1)
"""Of the Gumbel noise, at the first and the last step (a guess)."""


class QuestionGate(nn.Module):
    """Scores the operators for a question. Parameters: ``fc1.*`` and ``fc2.*``.

    Args:
        hidden_size: Width of a feature.
        width: Hidden units.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2 * hidden_size, width)
        self.fc2 = nn.Linear(width, len(OPERATORS))

    def forward(self, last: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        """Return the operators' logits, in the order of ``OPERATORS``; shape (prompts, 5).

        Args:
            last: Target feature of each prompt's last token, shape (prompts, hidden).
            question: Mean target feature of each prompt's question, shape (prompts, hidden).
        """
        return self.fc2(functional.silu(self.fc1(torch.cat([last, question], -1))))


def question_start(prompt_length: int, image_end: int) -> int:
    """Return the first row of the question: what follows the last image, or else the last token.

    Args:
        prompt_length: Tokens of the prompt.
        image_end: Position behind the prompt's last image.
    """
    return min(image_end, prompt_length - 1)


def gate_inputs(
    features: torch.Tensor, prompt_length: int, image_end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the gate sees of one prompt: its last feature and the question's mean.

    Args:
        features: Of the target, shape (at least prompt_length, hidden).
        prompt_length: Tokens of the prompt.
        image_end: Position behind the prompt's last image.
    """
    question = features[question_start(prompt_length, image_end) : prompt_length]
    return features[prompt_length - 1], question.mean(0)


def restrict(logits: torch.Tensor, allowed: Sequence[Operator]) -> torch.Tensor:
    """Return logits with all but the allowed operators at minus infinity; (..., 5)."""
    barred = torch.tensor([name not in allowed for name in OPERATORS], device=logits.device)
    return logits.masked_fill(barred, -torch.inf)


def mixture(logits: torch.Tensor) -> torch.Tensor:
    """Return the weights of pruning, pooling and convolution; (..., 5) to (..., 3)."""
    return logits[..., : len(WEIGHTED)].softmax(-1)


def temperature(progress: float) -> float:
    """Return the temperature when a share of training is done."""
    first, last = TEMPERATURES
    return first * (last / first) ** progress


def sample_straight_through(logits: torch.Tensor, tau: float) -> torch.Tensor:
    """Pick operators with Gumbel noise.

    Args:
        logits: Shape (prompts, operators).
        tau: Temperature.

    Returns:
        For each prompt exactly 1 at its pick and 0 elsewhere, with the gradient of the soft sample
        (straight-through); shape (prompts, operators).
    """
    soft = functional.gumbel_softmax(logits, tau)
    hard = functional.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())
