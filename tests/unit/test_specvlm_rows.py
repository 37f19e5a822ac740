"""Which rows of a draft step are an image's and which the question's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_plugins.engine.block_holes.plan import plan_step
from vllm_plugins.spec_decode.specvlm.draft_rows import (
    StepImages,
    plan_image,
    request_images,
)
from vllm_plugins.spec_decode.specvlm.metrics import DraftTally
from vllm_plugins.spec_decode.specvlm.settings import OPERATORS, SpecVLMSettings


def test_rows_lie_one_before_their_tokens():
    images = request_images(70, [("x", [(10, 30)]), ("y", [(30, 50)])])
    assert images.spans == ((9, 29), (29, 49))
    assert (images.contents, images.image_end) == (("x", "y"), 50)


def test_nothing_stands_before_the_first_token():
    assert request_images(9, [("x", [(0, 5)])]).spans == ((0, 4),)
    assert request_images(9, [("x", [(0, 1)]), ("y", [(1, 3)])]).spans == ((0, 2),)
    assert request_images(9, []).spans == ()


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"mode": "off"}, 256),
        ({"mode": "static", "default_operator": "pool"}, 13),
        ({"mode": "static", "default_operator": "text_only"}, 0),
        ({"mode": "static", "default_operator": "resample"}, 2),
        ({"mode": "static", "default_operator": "pool", "pool_ratio": 1}, 256),
        ({"mode": "weighted"}, 86),
        ({"mode": "concat"}, 13 + 13 + 86 + 2),
        ({"mode": "select"}, 86),
        ({"mode": "select", "select_from": ("pool", "text_only")}, 13),
    ],
    ids=str,
)
def test_rows_of_an_image(settings, rows):
    """Blocks of one token leave exactly what is wanted."""
    assert plan_image(SpecVLMSettings(**settings), (9, 265), 1).kept == rows
    kept = plan_image(SpecVLMSettings(**settings), (9, 265), 32).kept
    # At least the 23 rows before the first whole block and the 9 behind the last.
    assert max(rows, 32) <= kept < max(rows, 32) + 32 or kept == 256 == rows


class Runner:
    """A worker's requests, each a prompt of some length with one image."""

    def __init__(self, *requests):
        self.requests = requests

    def media_features(self, common):
        def item(content, start, end):
            ranges = [(start, end - 1)]
            position = SimpleNamespace(extract_embeds_range=lambda: ranges)
            return SimpleNamespace(identifier=content, mm_position=position)

        return [(prompt, [item(*image)]) for prompt, image in self.requests]


def step(requests, computed, ends):
    images = StepImages(Runner(*requests))
    starts = np.cumsum([0, *np.subtract(ends, computed)])
    common = SimpleNamespace(
        query_start_loc_cpu=torch.from_numpy(starts), seq_lens_cpu_upper_bound=torch.tensor(ends)
    )
    settings = SpecVLMSettings(mode="static")
    holes = [[plan_image(settings, s, 32) for s in own] for own in images.spans(common)]
    return images, plan_step(holes, starts, np.array(ends))


def test_the_question_is_what_follows_the_last_image():
    requests = [(300, ("x", 10, 266)), (290, ("y", 20, 276))]
    images, plan = step(requests, [0, 0], [300, 290])
    assert [images.content(c) for c in plan.choices] == ["x", "y"]
    assert [images.question(c) for c in plan.choices] == [(266, 300), (300 + 276, 590)]
    assert images.total_rows == 590


def test_a_question_in_a_later_step_is_not_seen():
    images, plan = step([(300, ("x", 10, 266))], [0], [280])
    assert images.question(plan.choices[0]) is None


def test_after_a_hit_the_question_moves_with_the_rows():
    images, plan = step([(300, ("x", 40, 296))], [32], [300])
    assert images.question(plan.choices[0]) == (296 - 32, 300 - 32)


def test_a_prompt_that_ends_with_its_image_asks_with_its_last_token():
    images, plan = step([(266, ("x", 10, 266))], [0], [266])
    assert images.question(plan.choices[0]) == (265, 266)


def test_answers_that_are_computed_again_are_no_question():
    """A preempted request comes back with what it had generated."""
    images, plan = step([(300, ("x", 10, 266))], [0], [340])
    assert images.question(plan.choices[0]) == (266, 300)


def test_picks_are_counted_by_operator():
    tally = DraftTally(("pool", "conv"))
    tally.count_picks(torch.tensor([1, 1, 0]))
    tally.count_picks(torch.tensor([1]))
    tally.count("weighted", 2)
    tally.count_rows(10, 25)
    assert tally.images() == {"pool": 1, "conv": 3, "weighted": 2}
    assert tally.rows == {"kept": 10, "dropped": 15}
    assert set(tally.images()) <= {*OPERATORS, "weighted"}
