"""`grow.py` makes models dearer and changes nothing of what they compute."""

import json

import pytest
import torch
from grow import grow
from safetensors.torch import load_file
from scenes import scenes
from transformers import AutoModelForImageTextToText

DRAFTER = scenes().parent / "scenes-drafter"


def logits(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.inference_mode():
        return model(input_ids=torch.arange(10, 60)[None]).logits


def test_a_grown_model_computes_the_same(tmp_path):
    small = scenes()
    large = grow(small, tmp_path / "large", layers=9, feed_forward=700)
    config = json.loads((large / "config.json").read_text())["text_config"]
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (9, 700)
    torch.testing.assert_close(logits(large), logits(small), rtol=0, atol=1e-12)


def test_what_was_added_costs_something(tmp_path):
    weights = load_file(grow(DRAFTER, tmp_path / "large", 1, 700) / "model.safetensors")
    gate = weights["layers.0.mlp.gate_proj.weight"]
    assert gate.shape == (700, 128) and gate[256:].float().std() > 0.01
    assert not weights["layers.0.mlp.down_proj.weight"][:, 256:].any()


def test_narrower_layers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="256 channels already"):
        grow(scenes(), tmp_path / "small", 6, 100)
