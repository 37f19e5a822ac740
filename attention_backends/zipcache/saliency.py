"""Which tokens are salient: the normalised attention score of section 4.2, from probes alone.

The score of a token is the mean attention that later queries pay it (a sum would favour early
tokens, which more queries see). Only some queries of a prompt are probes: the last ones and some at
random (section 4.3, 5% and 5%). Heads that share keys share a selection: attention is summed over
them [C].

The published code draws random probes with replacement and counts them exactly. Here each position
before the recent ones is a probe with the same probability, by a hash of its number and the seed
[G]: then the set depends neither on how the prompt is cut into chunks, nor on other requests, nor
on the rank. All layers and requests have the same random positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_plugins.attention_backends.zipcache.page import PageFormat


@dataclass(frozen=True)
class Probing:
    """Which queries of a prompt are probes.

    Attributes:
        recent: Share of the last ones, all of which are probes.
        random: Share of the prompt that is drawn from those before.
        seed: Of the draw.
    """

    recent: float
    random: float
    seed: int = 0

    def first_recent(self, length: int) -> int:
        """Return the position from which on all queries are probes.

        Args:
            length: Of the prompt, in tokens.
        """
        if self.recent == 0:
            return length
        return length - max(1, round(self.recent * length))

    def chosen(self, first: int, last: int, length: int) -> np.ndarray:
        """Return the probes among some positions.

        Args:
            first: First position.
            last: Position behind the last one.
            length: Of the prompt, in tokens.

        Returns:
            Positions, ascending, int64.
        """
        positions = np.arange(first, last)
        recent = self.first_recent(length)
        share = self.random * length / recent if recent else 0.0
        drawn = _uniform(positions, self.seed) < share
        return positions[(positions >= recent) | drawn]


def _uniform(positions: np.ndarray, seed: int) -> np.ndarray:
    """Return a number in [0, 1) for each position (splitmix64)."""
    with np.errstate(over="ignore"):
        x = positions.astype(np.uint64) + np.uint64(seed % 2**32 << 32)
        x = x * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def attention_sums(
    query: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return the attention that queries pay to each key, summed over the queries.

    Args:
        query: Shape (queries, heads, head size).
        keys: From the sequence's first on, shape (n, kv heads, head size).
        positions: Of the queries, int64, shape (queries,).
        scale: Of the scores.

    Returns:
        Shape (kv heads, n); heads that share keys are summed up.
    """
    n, groups = keys.shape[:2]
    grouped = query.unflatten(1, (groups, -1))
    scores = torch.einsum("tkgd,nkd->tkgn", grouped, keys) * scale
    hidden = torch.arange(n, device=keys.device) > positions[:, None]
    scores.masked_fill_(hidden[:, None, None], -torch.inf)
    return scores.softmax(dim=-1).sum(dim=(0, 2))


def weights(seen: np.ndarray, positions: np.ndarray, length: int, normalizer: str) -> np.ndarray:
    """Return what sums of attention are multiplied by.

    Args:
        seen: Probes that saw each token.
        positions: Of the tokens.
        length: Of the prompt, or of what exists of the sequence.
        normalizer: ``probe_nnz`` divides by the probes, which estimates the paper's score without
            bias; ``full_nnz`` by all queries that could see the token, as the published code does,
            which with few probes favours recent tokens.
    """
    count = seen if normalizer == "probe_nnz" else length - positions
    return (1.0 / np.maximum(count, 1)).astype(np.float32)


def choose(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return which tokens of a block are salient; of equal scores the earlier token wins.

    Args:
        scores: Shape (..., N).
        count: Salient tokens.

    Returns:
        bool, of the shape of ``scores``.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], value=True)


def choose_both(scores: torch.Tensor, page: PageFormat) -> torch.Tensor:
    """Return whose keys and whose values are salient, by one ranking of a block's tokens.

    So the tokens of the smaller quota are among those of the larger one.

    Args:
        scores: Shape (..., N).
        page: What has the quotas.

    Returns:
        bool, of keys and of values, shape (..., 2, N).
    """
    return torch.stack([choose(scores, quota) for quota in page.quotas], dim=-2)
