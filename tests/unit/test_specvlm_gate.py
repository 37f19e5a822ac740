"""The gate: what it sees, what it picks, and what its gradient is."""

import pytest
import torch

from vllm_plugins.spec_decode.specvlm.gate import (
    QuestionGate,
    gate_inputs,
    mixture,
    question_start,
    restrict,
    sample_straight_through,
    temperature,
)
from vllm_plugins.spec_decode.specvlm.settings import OPERATORS


def features(count: int = 12, hidden: int = 6) -> torch.Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(1))


def test_it_sees_the_last_token_and_the_mean_of_the_question():
    rows = features()
    last, question = gate_inputs(rows, 9, 5)
    assert torch.equal(last, rows[8]) and torch.allclose(question, rows[5:9].mean(0))
    # Rows of the answer, which serving does not have, change nothing.
    rows[9:] = torch.nan
    assert torch.equal(gate_inputs(rows, 9, 5)[1], question)


def test_an_image_that_ends_the_prompt_leaves_the_last_token_as_the_question():
    assert question_start(9, 9) == 8
    last, question = gate_inputs(features(), 9, 9)
    assert torch.equal(last, question)


def test_it_is_a_perceptron_of_two_layers():
    gate, last, question = QuestionGate(6, 10), features(3), features(3) + 1
    inner = torch.cat([last, question], 1) @ gate.fc1.weight.T + gate.fc1.bias
    expected = (inner * inner.sigmoid()) @ gate.fc2.weight.T + gate.fc2.bias
    assert torch.allclose(gate(last, question), expected, atol=1e-6)
    assert expected.shape == (3, len(OPERATORS))


def test_the_temperature_falls_from_one_to_a_tenth():
    assert temperature(0) == 1 and temperature(1) == pytest.approx(0.1)
    assert temperature(0.5) == pytest.approx(0.1**0.5)


def test_samples_follow_the_softmax_of_the_logits():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5])
    torch.manual_seed(0)
    shares = sample_straight_through(logits.expand(40000, -1), 0.3).mean(0)
    assert torch.allclose(shares, logits.softmax(0), atol=0.015)


def test_a_pick_is_exactly_one_and_has_the_soft_samples_gradient():
    logits = torch.randn(50, 5, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    picked = sample_straight_through(logits, 0.7)
    assert (picked.sort(-1).values == torch.tensor([0, 0, 0, 0, 1])).all()
    outer = torch.randn(50, 5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((picked * outer).sum(), logits)
    torch.manual_seed(3)
    soft = torch.nn.functional.gumbel_softmax(logits, 0.7)
    assert torch.equal(soft.argmax(-1), picked.argmax(-1))
    mean = (soft * outer).sum(-1, keepdim=True)
    assert torch.allclose(gradient, soft * (outer - mean) / 0.7)


def test_only_allowed_operators_are_picked():
    logits = restrict(torch.zeros(200, 5), ("pool", "text_only"))
    assert sample_straight_through(logits, 1.0).sum(0).nonzero()[:, 0].tolist() == [1, 4]


def test_weights_of_the_mixture_are_over_its_three_operators():
    logits = torch.tensor([[1.0, 2.0, 3.0, 99.0, 99.0]])
    assert torch.allclose(mixture(logits), torch.tensor([[1.0, 2.0, 3.0]]).softmax(1))
