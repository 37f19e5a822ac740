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
    """

    positions: np.ndarray
    deviation: np.ndarray
    allowance: int

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
    order: Refresh, stale: Stale, most: int, pages: KVPages, forward: PartialForward
) -> int:
    """Recompute the stale tokens that matter most to what is decoded now.

    Args:
        order: Where the request stands.
        stale: Its stale tokens; those that are recomputed are taken out.
        most: Most tokens to recompute.
        pages: The paged cache.
        forward: Runs tokens through the model.

    Returns:
        The number of tokens that were recomputed.
    """
    count = min(most, stale.allowance, len(stale.positions))
    if count <= 0:
        return 0
    mass = _last_query_mass(order, pages, forward)
    score = mass[torch.from_numpy(stale.positions)].numpy() * stale.deviation
    chosen = np.sort(np.argsort(-score, kind="stable")[:count])
    positions = stale.take(chosen)
    rows = Rows(positions, order.block_ids, order.token_ids[positions])
    forward.run([rows], range(pages.num_layers))
    return len(positions)


def _last_query_mass(order: Refresh, pages: KVPages, forward: PartialForward) -> torch.Tensor:
    """Return the attention of the request's last token, mean over layers, heads and ranks."""
    layers = observed_layers(pages.num_layers)
    last = len(order.token_ids) - 1
    row = Rows(np.array([last]), order.block_ids, order.token_ids[[last]])
    with forward.queries_of(layers) as queries:
        forward.run([row], range(layers[-1] + 1))
    everything = np.arange(last + 1)
    slots = torch.from_numpy(slot_mapping(order.block_ids, everything, pages.block_size))
    slots = slots.to(pages.device)
    masses = [
        attention_mass(query[0].view(-1, pages.head_size), pages.read(layer, slots)[0])
        for layer, query in zip(layers, queries, strict=True)
    ]
    # A sum over ranks serves as well as a mean: only the order of the scores is used.
    return forward.sum_over_ranks(torch.stack(masses).mean(0))[0].cpu()
