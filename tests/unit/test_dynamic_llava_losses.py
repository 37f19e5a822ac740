"""What training of Dynamic-LLaVA minimises, against sums done by hand."""

import math

import pytest
import torch

from vllm_plugins.visual_tokens.dynamic_llava.losses import (
    also_seen,
    draw_decisions,
    keep_rate_loss,
    long_answers,
    temperature,
    weighted,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_temperature_falls_exponentially_from_one_to_a_tenth():
    assert temperature(0) == 1
    assert temperature(1) == pytest.approx(0.1)
    assert temperature(0.5) == pytest.approx(math.sqrt(0.1))


def test_decisions_are_hard_and_drawn_with_the_softmax_probabilities():
    logits = torch.tensor([1.0, -0.5]).expand(200_000, 2)
    for tau in (1.0, 0.1):
        drawn = draw_decisions(logits, tau)
        assert set(drawn.unique().tolist()) == {0.0, 1.0}
        # Five standard deviations of the mean of as many draws.
        assert drawn.mean().item() == pytest.approx(1 / (1 + math.exp(-1.5)), abs=5e-3)


def test_decisions_carry_the_gradient_of_the_soft_sample():
    logits = torch.randn(500, 2, dtype=torch.float64, requires_grad=True)
    weights, tau = torch.randn(500, dtype=torch.float64), 0.7
    torch.manual_seed(1)
    (draw_decisions(logits, tau) * weights).sum().backward()
    torch.manual_seed(1)
    noise = -torch.empty_like(logits).exponential_().log()
    with torch.no_grad():
        p = ((logits + noise) / tau).softmax(-1)[:, 0]
    expected = weights * p * (1 - p) / tau
    torch.testing.assert_close(logits.grad[:, 0], expected)
    torch.testing.assert_close(logits.grad[:, 1], -expected)


def test_some_images_show_their_best_tokens_up_to_a_random_part():
    scores = torch.rand(20_000, 10)
    seen = also_seen(torch.zeros(scores.shape), scores, rate=0.2, share=0.5)
    by_rank = seen.gather(1, scores.argsort(-1, descending=True))
    assert (by_rank.diff(dim=-1) <= 0).all()
    # Half of the images; the part is drawn evenly between 0.2 and 1.
    wanted = [0.5 * min(1, (10 - rank) / 8) for rank in range(10)]
    # Five standard deviations of the mean of as many draws.
    assert by_rank.mean(dim=0).tolist() == pytest.approx(wanted, abs=0.018)


def test_what_is_drawn_stays_seen_and_decides_where_nothing_else_does():
    drawn, scores = torch.rand(500, 10).round().requires_grad_(), torch.rand(500, 10)
    seen = also_seen(drawn, scores, rate=0.2, share=0.5)
    assert (seen >= drawn).all()
    assert (also_seen(drawn, scores, rate=0.2, share=0.0) == drawn).all()
    seen.sum().backward()
    # Hidden tokens were hidden by the draw.
    assert (drawn.grad[seen == 0] == 1).all()
    assert 0.2 < (drawn.grad == 0).float().mean().item() < 0.4


def test_only_long_answers_are_decided_on_each_turn_by_itself():
    rows = ["..aaa.aa.aaaa", "aaaaaaaaaaaaa", ".............", "aa.aaa.......", "aaa.........a"]
    answers = torch.tensor([[letter == "a" for letter in row] for row in rows])
    expected = ["..AAA....AAAA", "AAAAAAAAAAAAA", ".............", "...AAA.......", "AAA.........."]
    found = long_answers(answers, at_least=3)
    assert ["".join("A" if x else "." for x in row) for row in found.tolist()] == expected
    assert not long_answers(answers).any()
    assert long_answers(torch.ones(1, 50, dtype=torch.bool)).all()
    assert not long_answers(torch.ones(1, 49, dtype=torch.bool)).any()


def test_keep_rates_are_means_of_conversations_and_squares_of_the_batch():
    decisions = torch.tensor([[1.0, 0, 0, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    where = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    expected = ((0.2 - 2 / 4) ** 2 + (0.2 - 1 / 3) ** 2 + 0) / 3
    assert keep_rate_loss(decisions, where, 0.2).item() == pytest.approx(expected)


def test_gradient_of_the_keep_rate_reaches_only_decided_tokens():
    decisions = torch.rand(2, 6, dtype=torch.float64, requires_grad=True)
    where = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    keep_rate_loss(decisions, where, 0.2).backward()
    mean = decisions[0, :4].mean().item()
    expected = torch.zeros(2, 6, dtype=torch.float64)
    expected[0, :4] = 2 * (mean - 0.2) / 4 / 2
    torch.testing.assert_close(decisions.grad, expected)


def test_parts_add_up_with_the_papers_weight():
    losses = weighted(torch.tensor(2.0), torch.tensor(0.01), torch.tensor(0.04))
    assert losses.total.item() == pytest.approx(2 + 100 * 0.05)
