"""The distillation loss against a computation by hand, and where its gradient goes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.specvlm_models import IMAGE, drafter, make_batch, target, words
from vllm_plugins.spec_decode.specvlm.chain import unroll
from vllm_plugins.spec_decode.specvlm.distillation import (
    Distillation,
    LossWeights,
    Picks,
    answer_rows,
    image_ends,
    imbalance,
    row_losses,
    shares,
)
from vllm_plugins.spec_decode.specvlm.settings import OPERATORS

WEIGHTS = LossWeights(balance=0.0)
PROMPTS = [[1, *IMAGE, *words(4)], [1, 9, *IMAGE, *words(2, 1)], [1, *words(6, 2)]]
ANSWERS = [words(7, 3), words(4, 4), words(5, 5)]


def batch_of(indices=(0, 1, 2)):
    return make_batch([PROMPTS[i] for i in indices], [ANSWERS[i] for i in indices])


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_row_losses_are_the_papers():
    random = np.random.default_rng(0)
    f_q, f_p = random.normal(size=(2, 6, 8)) * 2
    z_q, z_p = random.normal(size=(2, 6, 11)) * 3
    cross, smooth = row_losses(*(torch.from_numpy(x) for x in (f_q, f_p, z_q, z_p)))
    assert np.allclose(cross, -(softmax(z_p) * np.log(softmax(z_q))).sum(-1))
    gap = np.abs(f_q - f_p)
    assert np.allclose(smooth, np.where(gap < 1, gap**2 / 2, gap - 0.5).mean(-1))


def test_the_loss_is_over_rows_that_serving_drafts_from():
    batch = batch_of((0,))
    length = len(PROMPTS[0])
    counted = answer_rows(batch)[0].nonzero()[:, 0].tolist()
    # From the row that carries the first answer token, to the one that predicts the last.
    assert counted == list(range(length - 1, length - 1 + len(ANSWERS[0]) - 1))


def test_images_end_where_the_question_begins():
    assert image_ends(batch_of().image_mask).tolist() == [17, 18, 0]


@pytest.mark.parametrize("mode", ["off", "static", "concat", "weighted"])
def test_the_online_loss_is_an_offline_computation_in_two_passes(mode):
    """Sample by sample, from stored teacher outputs, row by row in numpy."""
    model, batch = drafter(mode=mode, default_operator="resample"), batch_of()
    loss = Distillation(target(), model, WEIGHTS)(batch, 0.5)
    stored = [target()(*sample_inputs(batch, i)) for i in range(3)]
    total, count = 0.0, 0
    for i, rows in enumerate(stored):
        tokens = len(PROMPTS[i]) + len(ANSWERS[i])
        z_p = target().head(rows.features)[0].numpy()
        predicted, sources = offline_prediction(model, rows, batch, i, tokens)
        z_q = target().head(predicted).detach().numpy()
        f_q, f_p = predicted.detach().numpy(), rows.features[0].numpy()
        for row, t in enumerate(sources):
            if len(PROMPTS[i]) - 1 <= t <= tokens - 3:
                p, q = softmax(z_p[t + 1]), softmax(z_q[row])
                gap = np.abs(f_q[row] - f_p[t + 1])
                smooth = np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
                total += 0.1 * -(p * np.log(q)).sum() + 1.0 * smooth
                count += 1
    # Padding of the batch moves the target's float64 rows in their last digits.
    assert loss.total.item() == pytest.approx(total, rel=1e-9)
    assert int(loss.weight) == count == sum(len(answer) - 1 for answer in ANSWERS)


def sample_inputs(batch, i):
    length = int(batch.attention_mask[i].sum())
    has = bool(batch.image_mask[i].any())
    image = {"pixel_values": batch.pixels["pixel_values"][i : i + 1]} if has else {}
    return batch.input_ids[i : i + 1, :length], None, image


def offline_prediction(model, rows, batch, i, tokens):
    from vllm_plugins.spec_decode.specvlm.compact import compact, draft_span
    from vllm_plugins.spec_decode.specvlm.reference import image_spans

    spans = image_spans(batch.image_mask[i])
    choice, weights = None, None
    if spans:
        choice, weights = model.decide(rows.features[0], len(PROMPTS[i]), spans[-1][1])
    fused = model.fuse(rows.embeddings[:, 1:], rows.features[:, :-1])[0, : tokens - 1]
    seeds = [int(batch.image_seeds[i])] * len(spans)
    drafted = [draft_span(*span) for span in spans]
    made = compact(fused, drafted, choice, model.compressor, seeds, weights)
    return model(made.rows[None], made.positions[None])[0][0], made.sources.tolist()


def test_padding_changes_nothing():
    module = Distillation(target(), drafter(mode="static"), WEIGHTS)
    batch = batch_of()
    together = float(module(batch, 0.0).total.detach())
    alone = [
        replace(batch_of((i,)), pixels=sample_inputs(batch, i)[2]) for i in range(len(PROMPTS))
    ]
    assert together == pytest.approx(sum(float(module(x, 0.0).total.detach()) for x in alone))


@pytest.mark.parametrize("mode", ["select", "weighted"])
def test_a_gradient_reaches_the_gate(mode):
    model = drafter(mode=mode)
    torch.manual_seed(0)
    Distillation(target(), model, WEIGHTS)(batch_of((0, 1)), 0.0).total.backward()
    for name, parameter in model.gate.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 1e-2, name


def test_the_gate_learns_how_each_operator_would_change_the_loss():
    """By finite differences of the mixture of the operators' outputs."""
    model, batch = drafter(mode="select"), batch_of((0, 1))
    module = Distillation(target(), model, WEIGHTS)
    rows = target()(batch.input_ids, batch.attention_mask, batch.pixels)
    base = torch.tensor([[0.0, 0, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.float64)

    def loss(mixed: torch.Tensor) -> torch.Tensor:
        module.pick = lambda *_: Picks(OPERATORS, mixed)
        return module.loss_of(batch, rows, 0.0).total

    mixed = base.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(mixed), mixed)
    for sample, operator in np.ndindex(2, 5):
        step = torch.zeros_like(base)
        step[sample, operator] = 1e-5
        slope = (loss(base + step) - loss(base - step)).item() / 2e-5
        assert gradient[sample, operator].item() == pytest.approx(slope, rel=1e-5)
    # The operators differ in it, or there would be nothing to choose.
    assert (gradient.std(1) > 1e-2).all()


def test_only_the_picked_operator_is_trained():
    model, batch = drafter(mode="select"), batch_of((0, 1))
    module = Distillation(target(), model, WEIGHTS)
    only_conv = torch.nn.functional.one_hot(torch.tensor([2, 2]), 5).double()
    module.pick = lambda *_: Picks(OPERATORS, only_conv)
    module(batch, 0.0).total.backward()
    assert model.compressor.conv.pointwise.weight.grad.abs().sum() > 0
    assert model.compressor.resampler.queries.grad.abs().sum() == 0
    static = drafter(mode="static", default_operator="conv", conv_ratio=3)
    expected = Distillation(target(), static, WEIGHTS)(batch, 0.0)
    assert module(batch, 0.0).total.item() == pytest.approx(expected.total.item())


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_gradient_reaches_each_operator(operator):
    model = drafter(mode="static", default_operator=operator)
    Distillation(target(), model, WEIGHTS)(batch_of((0, 1)), 0.0).total.backward()
    touched = {
        name.split(".")[0]
        for name, parameter in model.compressor.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().sum() > 0
    }
    assert touched == {"conv": {"conv"}, "resample": {"resampler"}}.get(operator, set())
    assert model.fc.weight.grad.abs().sum() > 0


def test_the_target_gets_no_gradient_and_stays_in_evaluation_mode():
    module = Distillation(target(), drafter(), WEIGHTS).train()
    module(batch_of(), 0.0).total.backward()
    assert all(p.grad is None for p in module.target.parameters())
    assert not module.target.model.training and module.drafter.training


def test_a_sample_without_an_image_needs_no_gate():
    model = drafter(mode="select")
    loss = Distillation(target(), model, LossWeights())(batch_of((2,)), 0.0)
    loss.total.backward()
    assert torch.isfinite(loss.total) and int(loss.weight) == len(ANSWERS[2]) - 1


def test_unrolled_steps_count_chains_that_begin_in_the_answer():
    model, batch = drafter(mode="off"), batch_of((2,))
    one, two = (Distillation(target(), model, WEIGHTS, n)(batch, 0.0) for n in (1, 2))
    rows = target()(batch.input_ids, None, {})
    fused = model.fuse(rows.embeddings[:, 1:], rows.features[:, :-1])
    positions = torch.arange(fused.shape[1])[None]
    second = list(unroll(model, fused, positions, 2, lambda _: rows.embeddings[:, 1:]))[1]
    length = len(PROMPTS[2])
    at = list(range(length, length - 1 + len(ANSWERS[2]) - 1))
    truth = rows.features[0, 1:]
    cross, smooth = row_losses(
        second[0, at], truth[at], target().head(second[0, at]), target().head(truth[at])
    )
    expected = (one.total.item() + (0.1 * cross + smooth).sum().item()) / 2
    assert two.total.item() == pytest.approx(expected, rel=1e-9)
    assert int(two.weight) == int(one.weight)


def test_even_use_costs_nothing_and_one_operator_costs_most():
    assert float(imbalance(torch.zeros(7, 5))) == pytest.approx(0, abs=1e-6)
    one = torch.tensor([[99.0, 0, 0, 0, 0]])
    assert float(imbalance(one)) == pytest.approx(np.log(5), rel=1e-5)
    barred = torch.tensor([[0.0, 0, -torch.inf, -torch.inf, -torch.inf]])
    assert float(imbalance(barred)) == pytest.approx(0, abs=1e-6)
    assert float(imbalance(torch.zeros(0, 5))) == 0


def test_shares_are_of_the_picks_without_noise():
    logits = torch.tensor([[0.0, 3, 0, 0, 0], [0, 0, 0, 0, 1.0], [0, 2, 0, 0, 0], [9, 0, 0, 0, 0]])
    found = shares(Picks((), logits, None, logits))
    assert {name: float(share) for name, share in found.items()} == {
        "pick_prune": 0.25, "pick_pool": 0.5, "pick_conv": 0, "pick_resample": 0,
        "pick_text_only": 0.25,
    }  # fmt: skip
