"""Which reused tokens are computed again: dual-stage high deviation (DHD), stage 1.

That the selection is conditional is the paper's (KVShare, arXiv 2503.16525, abstract); its formulas
could not be read, so the concrete rule is **our guess**, built on CacheBlend (deviation of V at a
check layer, top-k) and EPIC (the first tokens of each reused run). Those two rules, random choice
and no choice at all are here too, so that they can be compared at equal budgets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

SelectorName = Literal["dhd", "cacheblend", "epic", "random", "none"]


def value_deviation(new: torch.Tensor, old: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how far recomputed values are from stored ones, and how large these are.

    Args:
        new: Values of the reused tokens as just computed, shape (n, kv heads, head size).
        old: Stored values of the same tokens.

    Returns:
        Squared deviation and squared norm over heads and dimensions, float32, shape (n,) each.
    """
    old = old.float()
    return (new.float() - old).square().sum((1, 2)), old.square().sum((1, 2))


@dataclass(frozen=True)
class Reused:
    """The reused tokens of a request, as a selector sees them.

    Attributes:
        deviation: d_i of each token, float32, shape (n,).
        norm: Squared norm of its stored value, of the same shape.
        links: Whether it is among the first tokens of a run whose left context changed; bool.
        seed: For a choice that is random and yet the same on every rank.
    """

    deviation: np.ndarray
    norm: np.ndarray
    links: np.ndarray
    seed: int


@dataclass(frozen=True)
class Budget:
    """How much may be recomputed of the reused tokens.

    Attributes:
        least: r_min, share of the reused tokens, in [0, 1].
        most: r_max, likewise.
        skip_eps: Deviation, relative to the values' mean norm, below which a token is as good as
            new.
        theta: A token deviates highly if d_i exceeds this times the median.
    """

    least: float
    most: float
    skip_eps: float
    theta: float

    def tokens(self, reused: int) -> tuple[int, int]:
        """Return the least and the most tokens of ``reused`` ones."""
        return int(np.ceil(self.least * reused)), int(self.most * reused)


def _highest(deviation: np.ndarray, count: int) -> np.ndarray:
    """Return a mask of the ``count`` highest values; of equal ones the earlier, on every rank."""
    mask = np.zeros(len(deviation), bool)
    mask[np.argsort(-deviation, kind="stable")[:count]] = True
    return mask


def dhd(reused: Reused, budget: Budget) -> np.ndarray:
    """Links, and what deviates highly: theta times the median, within r_min and r_max.

    The condition: KV that deviates by less than ``skip_eps`` is as good as new, a link's too, and
    nothing is spent on it beyond r_min. It is asked of each token, as a mean over the prompt would
    hide a few facts that changed. Where the candidates are more than r_max, those of them that
    deviate most are taken; where they are fewer than r_min, others that do.
    """
    least, most = budget.tokens(len(reused.deviation))
    deviation = reused.deviation
    stale = deviation >= budget.skip_eps * reused.norm.mean()
    candidates = stale & ((deviation > budget.theta * np.median(deviation)) | reused.links)
    wanted = min(max(int(candidates.sum()), least), most)
    mask = np.zeros(len(deviation), bool)
    mask[np.lexsort((-deviation, ~candidates))[:wanted]] = True
    return mask


def cacheblend(reused: Reused, budget: Budget) -> np.ndarray:
    """The r_max of the tokens that deviate most at the check layer (CacheBlend)."""
    return _highest(reused.deviation, budget.tokens(len(reused.deviation))[1])


def epic(reused: Reused, budget: Budget) -> np.ndarray:
    """The first tokens of each run, whatever they deviate (EPIC); the budget is not looked at."""
    return reused.links


def at_random(reused: Reused, budget: Budget) -> np.ndarray:
    """As many as CacheBlend's rule, but any."""
    noise = np.random.default_rng(reused.seed).random(len(reused.deviation))
    return _highest(noise, budget.tokens(len(noise))[1])


def nothing(reused: Reused, budget: Budget) -> np.ndarray:
    """No reused token."""
    return np.zeros(len(reused.deviation), bool)


SELECTORS: dict[SelectorName, Callable[[Reused, Budget], np.ndarray]] = {
    "dhd": dhd,
    "cacheblend": cacheblend,
    "epic": epic,
    "random": at_random,
    "none": nothing,
}
