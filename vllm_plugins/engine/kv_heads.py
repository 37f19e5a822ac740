"""How vLLM shares a model's KV heads out among tensor-parallel ranks."""

from __future__ import annotations


def heads_of_rank(total: int, rank: int, ranks: int) -> slice:
    """Return which KV heads a rank has, as vLLM divides or replicates them.

    Args:
        total: KV heads of the model. Where there are fewer than ranks, several have the same one.
        rank: The rank.
        ranks: How many there are.
    """
    first = rank * total // ranks
    return slice(first, first + max(1, total // ranks))
