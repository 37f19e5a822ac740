"""Moved keys are what the model would have computed at their new positions."""

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.rotary_embedding.mrope import apply_interleaved_rope

from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.kvshare.rope import PositionShift

HEAD, HEADS, LENGTH = 64, 2, 4096
SCALINGS = {
    "plain": {"rope_type": "default", "rope_theta": 10000.0},
    "partial": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "ntk": {"rope_type": "ntk", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic alpha": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}


# Sections of a key that time, height and width rotate; side by side, or by turns.
MROPE = {
    "sections": {"rope_type": "default", "mrope_section": [8, 12, 12]},
    "by turns": {"rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True},
    "yarn": {
        "rope_type": "yarn",
        "mrope_section": [8, 12, 12],
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}


def rotary(scaling, neox=True, dtype=torch.float32):
    with set_current_vllm_config(VllmConfig()):
        return get_rope(
            HEAD, max_position=LENGTH, is_neox_style=neox, rope_parameters=scaling, dtype=dtype
        )


def rotate(module, keys, positions):
    flat = keys.reshape(len(keys), -1)
    _, out = module.forward_native(positions, flat.clone(), flat.clone())
    return out.view_as(keys)


def draw(count, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(count, HEADS, HEAD, generator=generator).to(dtype)
    source, target = torch.randint(0, LENGTH, (2, count), generator=generator)
    return keys, source, target


@pytest.mark.parametrize("neox", [True, False], ids=["neox", "gptj"])
@pytest.mark.parametrize("kind", SCALINGS)
def test_a_moved_key_equals_one_rotated_there(kind, neox):
    module = rotary(SCALINGS[kind], neox)
    keys, source, target = draw(200)
    moved = PositionShift(module)(rotate(module, keys, source), source, target)
    assert torch.allclose(moved, rotate(module, keys, target), atol=2e-6, rtol=0)


def exactly_rotated(module, keys, positions, neox):
    """Keys in float64, each pair turned by its section's position times its frequency."""
    half, (axes, count) = HEAD // 2, positions.shape
    # YaRN's frequencies follow from its scale.
    frequencies = module._compute_inv_freq(module.scaling_factor or module.base).double()
    # From the module's own rule of which axis rotates a pair: rotate by an axis' number.
    if module.mrope_interleaved:
        axis = apply_interleaved_rope(
            torch.arange(axes).view(axes, 1, 1).expand(-1, 1, half), module.mrope_section
        )[0]
    else:
        axis = torch.arange(axes).repeat_interleave(torch.tensor(module.mrope_section))
    angles = positions.double()[axis].T * frequencies
    turn = torch.polar(torch.full_like(angles, module.mscale), angles)[:, None]
    pairs = keys.double()
    pairs = (
        pairs.view(count, HEADS, 2, half).transpose(2, 3)
        if neox
        else pairs.view(count, HEADS, half, 2)
    )
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return (turned.transpose(2, 3) if neox else turned).reshape(keys.shape)


@pytest.mark.parametrize("neox", [True, False], ids=["neox", "gptj"])
@pytest.mark.parametrize("kind", MROPE)
def test_a_moved_key_of_text_is_rotated_by_all_axes_of_its_new_place(kind, neox):
    """Up to a prompt's first image time, height and width count its tokens."""
    module = rotary(MROPE[kind] | {"rope_theta": 10000.0}, neox)
    keys, source, target = draw(200)
    at = rotate(module, keys, source.expand(3, -1))
    moved = PositionShift(module)(at, source, target)
    assert torch.allclose(moved, rotate(module, keys, target.expand(3, -1)), atol=3e-6, rtol=0)
    there = exactly_rotated(module, keys, target.expand(3, -1), neox)
    # The table's own rounding of an angle up to 4096 in float32 is 2.4e-4.
    assert torch.allclose(moved.double(), there, atol=2e-3, rtol=0)
    # What the oracle is to tell apart: axes that differ, as those of an image do.
    apart = torch.stack((source, target, source))
    assert torch.allclose(
        rotate(module, keys, apart).double(),
        exactly_rotated(module, keys, apart, neox),
        atol=2e-3,
        rtol=0,
    )
    assert not torch.allclose(moved.double(), exactly_rotated(module, keys, apart, neox), atol=1e-2)


def test_in_bfloat16_it_costs_one_more_rounding():
    """The table is in bfloat16 too: what counts is the row that the model itself would use."""
    module = rotary(SCALINGS["plain"], dtype=torch.bfloat16)
    keys, source, target = draw(400, torch.bfloat16)
    there = rotate(module, keys, target).float()
    moved = PositionShift(module)(rotate(module, keys, source), source, target).float()
    error = (moved - there).norm() / there.norm()
    # One rounding to 8 bits is 2^-9 at most, and 0.29 of 2^-8 in the mean square.
    assert error < 4e-3


def test_there_and_back_is_the_same_and_staying_is_bit_exact():
    module = rotary(SCALINGS["yarn"])
    shift = PositionShift(module)
    keys, source, target = draw(100)
    back = shift(shift(keys, source, target), target, source)
    assert torch.allclose(back, keys, atol=2e-6, rtol=0)
    assert torch.equal(shift(keys, source, source), keys)
    mixed = shift(keys, source, torch.where(torch.arange(100) < 50, source, target))
    assert torch.equal(mixed[:50], keys[:50])


def test_only_the_rotated_part_moves():
    module = rotary(SCALINGS["partial"])
    keys, source, target = draw(20)
    moved = PositionShift(module)(keys, source, target)
    assert torch.equal(moved[..., HEAD // 2 :], keys[..., HEAD // 2 :])
    assert not torch.equal(moved[..., : HEAD // 2], keys[..., : HEAD // 2])


def test_other_kinds_are_refused():
    class Phi3LongRoPEScaledRotaryEmbedding:
        pass

    with pytest.raises(PluginError) as caught:
        PositionShift(Phi3LongRoPEScaledRotaryEmbedding())
    assert str(caught.value) == (
        "--plugin kvshare: cannot move keys that were rotated by "
        "Phi3LongRoPEScaledRotaryEmbedding; use a model with plain, linear, NTK, Llama-3, "
        "YaRN or M-RoPE position embedding"
    )
