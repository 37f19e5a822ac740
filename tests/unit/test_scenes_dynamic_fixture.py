"""The committed Dynamic-LLaVA of the scenes model answers with most of its image tokens gone."""

import pytest
import torch
from safetensors.torch import load_file
from scenes import scenes
from scenes_data import DESCRIBE
from scenes_dynamic import FOLDER, conversation, scenes_dynamic
from scenes_dynamic import random_scores as at_random
from scenes_evaluate import held_out
from scenes_model import load

from vllm_plugins.visual_tokens.dynamic_llava.checkpoint import load_predictors
from vllm_plugins.visual_tokens.dynamic_llava.evaluation import Dropping, answer, summary

SCENES = 6
BYTES = 3 << 20


@pytest.fixture(scope="module")
def parts():
    torch.set_num_threads(1)
    folder = scenes_dynamic()
    model = load(folder)
    return model, load_predictors(folder, model.config.text_config.hidden_size).eval()


@pytest.fixture(scope="module")
def questions():
    return [conversation(s, q.text, q.answer) for s in held_out(SCENES) for q in s.questions]


@pytest.fixture(scope="module")
def descriptions():
    return [conversation(s, DESCRIBE, s.description) for s in held_out(SCENES)]


def figures(parts, batches, **dropping):
    model, predictors = parts
    layer = predictors.config.sparse_layer
    torch.manual_seed(0)
    return summary(
        answer(model, predictors, layer, batch, Dropping(**dropping)) for batch in batches
    )


def test_the_fixture_is_small_and_only_what_training_changed():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= BYTES
    before, changed = (load_file(f / "model.safetensors") for f in (scenes(), FOLDER))
    assert changed.keys() < before.keys()
    assert not any("vision_tower" in name or "projector" in name for name in changed)


def test_a_quarter_of_the_image_answers_nearly_as_well(parts, questions):
    whole = figures(parts, questions)["right"]
    kept = figures(parts, questions, image_keep_rate=0.25, block_size=32)["right"]
    assert whole > 0.85
    assert kept > 0.97 * whole


def test_predicted_tokens_describe_better_than_random_ones(parts, descriptions):
    dropping = {"image_keep_rate": 0.25, "block_size": 32}
    predicted = figures(parts, descriptions, **dropping)["cross_entropy"]
    random = figures(parts, descriptions, **dropping, scorer=at_random)["cross_entropy"]
    assert predicted < 0.7 * random


def test_descriptions_go_on_without_what_they_have_said(parts, descriptions):
    found = figures(parts, descriptions, image_keep_rate=0.25, text_keep=True)
    assert abs(found["text_kept"] - 0.5) < 0.1
    assert found["cross_entropy"] < figures(parts, descriptions)["cross_entropy"] + 0.1
