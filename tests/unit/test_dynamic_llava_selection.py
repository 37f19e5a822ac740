"""Which rows of a step go on, against choosing image by image."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_plugins.engine.block_holes.plan import plan_hole, plan_step
from vllm_plugins.visual_tokens.dynamic_llava.predictors import choose
from vllm_plugins.visual_tokens.dynamic_llava.scorers import Images, RandomScorer
from vllm_plugins.visual_tokens.dynamic_llava.selection import _choose


@st.composite
def steps(draw):
    """Requests with images of one size, each behind some text."""
    size, tokens = draw(st.sampled_from([16, 32])), draw(st.integers(40, 150))
    wanted, holes, ends = draw(st.integers(0, tokens)), [], []
    for _ in range(draw(st.integers(1, 4))):
        position, own = 0, []
        for _ in range(draw(st.integers(0, 3))):
            position += draw(st.integers(0, 40))
            own.append(plan_hole(position, position + tokens, wanted, size))
            position += tokens
        holes.append(own)
        ends.append(position + draw(st.integers(1, 20)))
    starts = np.concatenate(([0], np.cumsum(ends)))
    return tokens, plan_step(holes, starts, np.array(ends)), int(starts[-1])


@settings(deadline=None)
@given(steps(), st.randoms(use_true_random=False), st.booleans())
def test_each_image_keeps_its_best_in_their_order(step, random, ties):
    tokens, plan, rows = step
    if plan is None or not plan.choices:
        return
    first = np.array([choice.first_row for choice in plan.choices])
    of_images = torch.from_numpy(first[:, None] + np.arange(tokens))
    values = [random.choice(range(4)) if ties else random.random() for _ in range(rows)]
    scores = torch.tensor(values, dtype=torch.float32)[of_images]
    source = torch.from_numpy(plan.rows.copy())
    images = Images(plan.choices, of_images, torch.zeros(rows, 1), None, torch.arange(rows))
    _choose(images, scores, source)
    expected = torch.from_numpy(plan.rows.copy())
    for choice, ranked in zip(plan.choices, scores, strict=True):
        best = choose(ranked[None, : choice.candidates], choice.selected)[0]
        expected[choice.at : choice.at + choice.selected] = choice.first_row + best
    assert source.tolist() == expected.tolist()
    # No row twice, and the tokens that stay are their own.
    assert len(set(source.tolist())) == len(source)


def test_the_random_order_is_the_same_for_all_images_of_a_size():
    scorer, other = RandomScorer(), RandomScorer()
    rows = torch.arange(200).view(2, 100)
    images = Images((), rows, torch.zeros(200, 8), None, torch.arange(200))
    scores = scorer(images)
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores, other(images))
    assert scores[0].unique().numel() == 100
