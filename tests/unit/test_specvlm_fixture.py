"""The trained drafter of the scenes model: what the tests that serve it take for granted."""

from pathlib import Path

import pytest
import torch
from scenes import scenes, write_data

from vllm_plugins.spec_decode.specvlm.acceptance import AcceptanceEstimate, Answered, answer
from vllm_plugins.spec_decode.specvlm.checkpoint import load_drafter
from vllm_plugins.spec_decode.specvlm.drafter import EagleDrafter
from vllm_plugins.spec_decode.specvlm.target import FrozenTarget, load_target
from vllm_plugins.training.batches import Collator
from vllm_plugins.training.data import read_samples

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "scenes-drafter"
DRAFTS = 5


@pytest.fixture(scope="module")
def target() -> FrozenTarget:
    return load_target(str(scenes()), "cpu", torch.float32)


@pytest.fixture(scope="module")
def answered(target, tmp_path_factory) -> list[Answered]:
    """Descriptions of scenes that neither model was trained on, in the target's own words."""
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("scenes")
    data = write_data(folder, 8, seed=3, long_share=1.0, unseen=True)
    collator = Collator(AutoProcessor.from_pretrained(scenes()), target.image_token, 512)
    samples = read_samples(data, folder)
    return answer(target, collator, samples, "cpu", torch.float32, 64)


def test_it_is_of_the_scenes_model_and_small(target):
    drafter = load_drafter(FOLDER)
    text = target.text_config
    assert drafter.shape.hidden_size == text.hidden_size
    assert drafter.shape.vocab_size == text.vocab_size
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_500_000


def test_its_drafts_are_mostly_right(target, answered):
    estimate = AcceptanceEstimate(target, answered, DRAFTS)
    drafter = load_drafter(FOLDER)
    torch.manual_seed(0)
    untrained = EagleDrafter(drafter.shape, drafter.settings)
    assert estimate.figures(untrained)["tokens_per_round"] < 1.3
    assert estimate.figures(drafter)["tokens_per_round"] > 3
