"""Scores of tokens: what probes estimate, and what is chosen by them."""

import numpy as np
import pytest
import torch

from vllm_plugins.attention_backends.zipcache import saliency
from vllm_plugins.attention_backends.zipcache.page import PageFormat
from vllm_plugins.attention_backends.zipcache.saliency import Probing


def attention(n, heads=4, size=16, seed=0):
    """Dense causal attention in float64, shape (heads, queries, keys), and what it is of."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, n, heads, size, generator=generator, dtype=torch.float64)
    scores = torch.einsum("qhd,khd->hqk", q, k[:, : heads // 2].repeat_interleave(2, 1)) / 4
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1), q, k[:, : heads // 2]


def scores(q, k, probes, n, normalizer="probe_nnz"):
    sums = saliency.attention_sums(q[probes], k, torch.from_numpy(probes), 0.25)
    seen = len(probes) - np.searchsorted(probes, np.arange(n))
    weight = saliency.weights(seen, np.arange(n), n, normalizer)
    return sums.numpy() * weight


@pytest.mark.parametrize("normalizer", ["probe_nnz", "full_nnz"])
def test_all_queries_as_probes_give_the_score_itself(normalizer):
    n = 50
    dense, q, k = attention(n)
    wanted = dense.sum(1).view(2, 2, n).sum(1).numpy() / (n - np.arange(n))
    np.testing.assert_allclose(scores(q, k, np.arange(n), n, normalizer), wanted, rtol=1e-6)


def test_probes_estimate_without_bias():
    """The mean over seeds comes to the score; sums over all queries would not."""
    n, found = 60, []
    dense, q, k = attention(n)
    wanted = dense.sum(1).view(2, 2, n).sum(1).numpy() / (n - np.arange(n))
    for seed in range(600):
        probes = Probing(0, 0.3, seed).chosen(0, n, n)
        found.append(scores(q, k, probes, n))
    # Tokens at the end are seen by few probes, sometimes none.
    early = slice(0, n // 2)
    mean, spread = np.mean(found, 0)[:, early], np.std(found, 0)[:, early] / 600**0.5
    assert np.all(np.abs(mean - wanted[:, early]) < 5 * spread + 1e-3)


def test_recent_probes_favour_recent_tokens_by_the_published_count():
    n = 400
    _, q, k = attention(n)
    probes = Probing(0.05, 0.05).chosen(0, n, n)
    ratio = scores(q, k, probes, n, "full_nnz") / scores(q, k, probes, n)
    assert ratio[:, 5].mean() < 0.2 < 0.99 < ratio[:, -1].mean()


def test_equal_attention_gives_equal_scores():
    """A sum of the same attention would be larger for earlier tokens."""
    n = 40
    q, k = torch.zeros(n, 2, 16), torch.zeros(n, 1, 16)
    sums = saliency.attention_sums(q, k, torch.arange(n), 1.0)
    uniform = 2 * sum(1 / (np.arange(n) + 1))
    assert sums[0, 0] == pytest.approx(uniform, rel=1e-5)
    assert bool((sums[0, :-1] > sums[0, 1:]).all())
    # Rows have 1 / (number of keys) everywhere: columns differ by their first rows alone.
    rows = torch.arange(30, n)
    late = saliency.attention_sums(q[rows], k, rows, 1.0)[0, :30]
    weight = saliency.weights(np.full(30, 10), np.arange(30), n, "probe_nnz")
    assert np.ptp(late.numpy() * weight) < 1e-6


@pytest.mark.parametrize("length", [1, 2, 19, 100, 1000])
def test_chunks_do_not_change_the_probes(length):
    probing = Probing(0.05, 0.05, 3)
    whole = probing.chosen(0, length, length)
    for size in (1, 7, 64):
        parts = [probing.chosen(i, min(i + size, length), length) for i in range(0, length, size)]
        assert np.array_equal(np.concatenate(parts), whole)
    assert whole[-1] == length - 1


def test_the_share_of_probes_and_its_seed():
    found = [Probing(0.05, 0.05, seed).chosen(0, 4000, 4000) for seed in range(20)]
    assert 380 < np.mean([len(x) for x in found]) < 420
    assert len({tuple(x.tolist()) for x in found}) == 20
    assert all(set(range(3800, 4000)) <= set(x.tolist()) for x in found)


def test_no_recent_probes_or_no_random_ones():
    assert len(Probing(0, 0.5, 1).chosen(0, 1000, 1000)) == pytest.approx(500, abs=60)
    assert Probing(0.1, 0).chosen(0, 100, 100).tolist() == list(range(90, 100))


@pytest.mark.parametrize("count", [0, 1, 19, 32])
def test_the_choice_has_the_quota_and_prefers_earlier_tokens(count):
    values = torch.tensor([[1.0] * 32, [*range(32)], [*range(32, 0, -1)]])
    chosen = saliency.choose(values, count)
    assert chosen.sum(1).tolist() == [count] * 3
    assert chosen[0].nonzero().flatten().tolist() == list(range(count))
    assert chosen[1].nonzero().flatten().tolist() == list(range(32 - count, 32))


@pytest.mark.parametrize(("of_keys", "of_values"), [(32, 5), (5, 19), (19, 0), (7, 7)])
def test_one_ranking_serves_both_quotas(of_keys, of_values):
    values = torch.rand(3, 4, 32, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    chosen = saliency.choose_both(values, PageFormat(32, 16, of_keys, of_values))
    assert chosen.shape == (3, 4, 2, 32)
    fewer, more = chosen.unbind(2) if of_keys < of_values else chosen.unbind(2)[::-1]
    assert bool((chosen.sum(-1) == torch.tensor([of_keys, of_values])).all())
    assert not bool((fewer & ~more).any())
