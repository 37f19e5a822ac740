"""Dual-stage high deviation, stage 2: stale tokens that decoding looks at are computed again.

Newly generated tokens attend to KV that still encodes another left context, and drift (KVShare,
arXiv 2503.16525, abstract). Every so many generated tokens each stale token is scored by the
attention that the last query pays to it times its deviation at the check layer, and the highest are
recomputed in place. That there is such a stage is the paper's; the rule is **our guess**.

The last query is found by running the last token once more through the lower layers, a row of work,
so that nothing of the engine's own step has to be watched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_plugins.engine.kv_pages import KVPages
from vllm_plugins.engine.partial_forward import PartialForward, Rows, slot_mapping
from vllm_plugins.kv_connectors.kvshare.transfer import Refresh


@dataclass
class Stale:
    """Tokens of a running request whose KV was reused and not recomputed.

    Attributes:
        positions: Ascending, int64, shape (n,).
        deviation: d_i at the check layer, float32, shape (n,).
        allowance: Tokens that may still be recomputed while it decodes.
        token_ids: The prompt as far as KV was put together, int32.
    """

    positions: np.ndarray
    deviation: np.ndarray
    allowance: int
    token_ids: np.ndarray

    @property
    def left(self) -> int:
        """Tokens that may still be recomputed, and are there."""
        return min(self.allowance, len(self.positions))

    def take(self, index: np.ndarray) -> np.ndarray:
        """Remove tokens by index and return their positions; none is recomputed twice."""
        taken = self.positions[index]
        keep = np.ones(len(self.positions), bool)
        keep[index] = False
        self.positions, self.deviation = self.positions[keep], self.deviation[keep]
        self.allowance -= len(taken)
        return taken


def observed_layers(layers: int) -> list[int]:
    """Return the layers whose attention is looked at: a quarter, half and three quarters up."""
    return sorted({layers // 4, layers // 2, 3 * layers // 4})


def attention_mass(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return the mean attention that one query pays to each position.

    Args:
        query: Shape (heads, head size), rotated.
        keys: Shape (n, kv heads, head size), rotated.

    Returns:
        float32, shape (n,), of sum 1.
    """
    groups = keys.shape[1]
    grouped = query.float().view(groups, -1, query.shape[-1])
    scores = torch.einsum("gqd,ngd->gqn", grouped, keys.float()) / math.sqrt(query.shape[-1])
    return scores.softmax(dim=-1).mean(dim=(0, 1))


def refresh(
    looks: Sequence[tuple[Refresh, Stale]], most: int, pages: KVPages, forward: PartialForward
) -> list[int]:
    """Recompute the stale tokens that matter most to what is decoded now, in passes for all.

    Args:
        looks: Where requests stand, and their stale tokens; those that are recomputed are taken
            out. Some are left of each.
        most: Most tokens of each to recompute.
        pages: The paged cache.
        forward: Runs tokens through the model.

    Returns:
        The number of tokens of each that were recomputed.
    """
    masses = _last_query_masses([order for order, _ in looks], pages, forward)
    parts: list[Rows] = []
    for (order, stale), mass in zip(looks, masses, strict=True):
        score = mass[stale.positions] * stale.deviation
        chosen = np.argsort(-score, kind="stable")[: min(most, stale.left)]
        positions = stale.take(np.sort(chosen))
        parts.append(Rows(positions, order.block_ids, stale.token_ids[positions]))
    forward.run(parts, range(pages.num_layers))
    return [len(part.positions) for part in parts]


def _last_query_masses(
    orders: Sequence[Refresh], pages: KVPages, forward: PartialForward
) -> list[np.ndarray]:
    """Return the attention of each request's last token, mean over layers, heads and ranks."""
    layers = observed_layers(pages.num_layers)
    rows = [
        Rows(np.array([o.position]), o.block_ids, np.array([o.token_id], np.int32)) for o in orders
    ]
    # One row each, so that all of them are in one pass.
    with forward.queries_of(layers) as queries:
        forward.run(rows, range(layers[-1] + 1))
    masses = []
    for index, order in enumerate(orders):
        everything = np.arange(order.position + 1)
        slots = torch.from_numpy(slot_mapping(order.block_ids, everything, pages.block_size))
        slots = slots.to(pages.device)
        own = [
            attention_mass(query[index].view(-1, pages.head_size), pages.read(layer, slots)[0])
            for layer, query in zip(layers, queries, strict=True)
        ]
        masses.append(torch.stack(own).mean(0))
    # A sum over ranks serves as well as a mean: only the order of the scores is used. Whoever waits
    # for the device waits once.
    together = forward.sum_over_ranks(torch.cat(masses))[0].cpu().numpy()
    return np.split(together, np.cumsum([order.position + 1 for order in orders])[:-1])
