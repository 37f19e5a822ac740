"""Attention in which dropped tokens weigh nothing, yet decisions get gradients (section 3.3).

Training keeps every row and multiplies the softmax's numerators by G, where ``G[i, j] = M[j]`` off
the diagonal and 1 on it: a dropped token still sees itself, as it does when it is decoded. What a
kept token computes is then what it would compute had the dropped ones been removed. Zeroed tokens
instead cost over a point of accuracy in the paper.

`register` makes this an attention implementation of transformers, so that the model trained is the
unmodified one. Layers that are called without ``keep`` run transformers' own attention.
"""

from __future__ import annotations

from typing import Any

import torch

NAME = "dynamic_llava"
"""Name of the implementation among those of transformers."""

EPSILON = 1e-6
"""Smoothing of the published code; 0 equals removal."""


def register() -> str:
    """Make the implementation known to transformers, and return its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return NAME


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    keep: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    epsilon: float = EPSILON,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers asks its implementations to.

    Args:
        module: The attention layer.
        query: Shape (batch, heads, n, head size).
        key: Shape (batch, kv heads, n, head size).
        value: As ``key``.
        attention_mask: True, or 0 if it is added, where a query may see a key; shape
            (batch, 1, n, n). None is causal.
        keep: M, the share of each token that later ones see, shape (batch, n); None masks nothing.
        scaling: Of the scores.
        dropout: Of the weights; not applied where ``keep`` is given, because the paper uses none.
        epsilon: Smoothing of the masked softmax.
        **others: Passed on to transformers' own attention.

    Returns:
        Shape (batch, n, heads, head size), and no weights.
    """
    if keep is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    grouped = query.unflatten(1, (-1, groups))
    scores = torch.einsum("bkgid,bkjd->bkgij", grouped, key) * scale
    visible = _visible(attention_mask, query.shape[2], query.device)
    weights = masked_softmax(scores, keep[:, None, None], visible[:, :, None], epsilon)
    seen = torch.einsum("bkgij,bkjd->bikgd", weights.to(value.dtype), value)
    return seen.flatten(2, 3), None


def masked_softmax(
    scores: torch.Tensor, keep: torch.Tensor, visible: torch.Tensor, epsilon: float = EPSILON
) -> torch.Tensor:
    """Return attention weights from which dropped tokens are missing.

    With e the numerators, multiplied by G, and N the keys that a query may see, the weights are
    ``(e + epsilon / N) / (sum(e) + epsilon)``. Unlike in the published code, as read, the smoothing
    covers only keys that a query may see, so that it shows nothing of the future.

    Args:
        scores: Scaled products, shape (..., n, n): queries by keys.
        keep: M, in [0, 1], shape (..., n), broadcast over the leading dimensions.
        visible: bool, shape (..., n, n); each query sees itself.
        epsilon: Smoothing.

    Returns:
        At least float32, of the shape of ``scores``; each row sums to 1.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~visible, -torch.inf)
    itself = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    shares = torch.where(itself, 1.0, keep.to(scores.dtype)[..., None, :])
    # The shift cancels out, so it needs no gradient.
    numerators = (scores - scores.detach().amax(-1, keepdim=True)).exp() * shares
    smoothing = epsilon / visible.sum(-1, keepdim=True) * visible
    return (numerators + smoothing) / (numerators.sum(-1, keepdim=True) + epsilon)


def _visible(mask: torch.Tensor | None, n: int, device: torch.device) -> torch.Tensor:
    """Return which keys each query may see, bool, shape (batch or 1, 1, n, n)."""
    if mask is None:
        return torch.ones(n, n, dtype=torch.bool, device=device).tril()[None, None]
    return mask if mask.dtype == torch.bool else mask == 0
