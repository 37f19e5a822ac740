"""Which stale tokens are looked at while a request decodes."""

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm_plugins.kv_connectors.kvshare.refresh import Stale, attention_mass, observed_layers


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (8, 1)])
def test_the_mass_is_the_mean_of_softmax_attention(heads, kv_heads):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(heads, 32, generator=generator)
    keys = torch.randn(50, kv_heads, 32, generator=generator)
    # With one-hot values, attention's output is its weights.
    values = torch.eye(50).expand(heads, 50, 50)
    spread = keys.repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1)
    reference = torch.nn.functional.scaled_dot_product_attention(
        query[:, None].double(), spread.double(), values.double()
    )
    mass = attention_mass(query, keys)
    assert torch.allclose(mass.double(), reference[:, 0].mean(0), atol=1e-6)
    assert mass.sum().item() == pytest.approx(1)


def test_tokens_are_taken_once_and_counted():
    stale = Stale(np.array([3, 5, 8, 9]), np.array([0.1, 0.2, 0.3, 0.4], np.float32), allowance=3)
    assert stale.take(np.array([1, 3])).tolist() == [5, 9]
    assert stale.positions.tolist() == [3, 8]
    assert stale.deviation.tolist() == pytest.approx([0.1, 0.3])
    assert stale.allowance == 1


def test_the_layers_that_are_looked_at_are_spread():
    assert observed_layers(32) == [8, 16, 24]
    assert observed_layers(2) == [0, 1]
