"""Which stale tokens are looked at while a request decodes."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.unit.kvshare_kv import FakePages
from vllm_plugins.kv_connectors.kvshare.refresh import (
    Stale,
    attention_mass,
    observed_layers,
    refresh,
)
from vllm_plugins.kv_connectors.kvshare.segment_file import KVShape
from vllm_plugins.kv_connectors.kvshare.transfer import Refresh


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
    deviation = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    stale = Stale(np.array([3, 5, 8, 9]), deviation, allowance=3, token_ids=np.arange(10))
    assert stale.left == 3
    assert stale.take(np.array([1, 3])).tolist() == [5, 9]
    assert stale.positions.tolist() == [3, 8]
    assert stale.deviation.tolist() == pytest.approx([0.1, 0.3])
    assert stale.allowance == stale.left == 1


def test_the_layers_that_are_looked_at_are_spread():
    assert observed_layers(32) == [8, 16, 24]
    assert observed_layers(2) == [0, 1]


class FakeForward:
    """Passes of which only the rows are looked at; a row's queries follow from its position."""

    def __init__(self):
        self.kept, self.passes, self.sums = None, [], 0

    @contextmanager
    def queries_of(self, layers):
        self.kept, self.layers = [], layers
        yield self.kept
        self.kept = None

    def run(self, parts, layers):
        if self.kept is None:
            self.passes.append([(p.positions.tolist(), p.token_ids.tolist()) for p in parts])
            return
        for layer in self.layers:
            seeds = [int(part.positions[0]) + 1000 * layer for part in parts]
            draws = [torch.randn(4 * 8, generator=torch.Generator().manual_seed(s)) for s in seeds]
            self.kept.append(torch.stack(draws))

    def sum_over_ranks(self, *values):
        self.sums += 1
        return list(values)


def look(length, first_block):
    blocks = np.arange(first_block, first_block + 9, dtype=np.int32)
    rng = np.random.default_rng(length)
    tokens = rng.integers(0, 99, length).astype(np.int32)
    stale = Stale(
        np.arange(2, length - 20, 3), rng.random(len(range(2, length - 20, 3))), 7, tokens
    )
    return Refresh(f"r{length}", length + 2, 5, blocks), stale


def test_requests_are_looked_at_together_as_they_are_alone():
    pages = FakePages(KVShape(layers=8, kv_heads=2, head_size=8, dtype=torch.float32))
    pages.block_size = 16
    lengths, blocks = (90, 120, 60), (1, 20, 40)
    alone, together = FakeForward(), FakeForward()
    counts = [
        refresh([look(*case)], 5, pages, alone)[0] for case in zip(lengths, blocks, strict=True)
    ]
    looks = [look(*case) for case in zip(lengths, blocks, strict=True)]
    assert refresh(looks, 5, pages, together) == counts == [5, 5, 5]
    assert together.passes == [[one for [one] in alone.passes]]
    assert together.sums == 1
    for (positions, token_ids), (_, stale) in zip(together.passes[0], looks, strict=True):
        assert token_ids == stale.token_ids[positions].tolist()
        assert positions == sorted(positions)
        assert stale.left == 2
        assert not set(positions) & set(stale.positions.tolist())
