"""A Llama forward with positions as wanted, which shows queries and keys on the way.

Transformers takes positions with gaps for several packed texts, and its fast attention shows no
scores. With positions that count up, the result is the model's own (a test compares them).
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

Seen = list[tuple[torch.Tensor, torch.Tensor]]
"""Of each layer the queries and keys after rotation, [batch, heads or KV heads, tokens, size]."""


def forward(
    model: LlamaForCausalLM, ids: torch.Tensor, positions: torch.Tensor, seen: Seen | None = None
) -> torch.Tensor:
    """Run the model over whole texts.

    Args:
        model: the model.
        ids: [batch, tokens] token ids.
        positions: [batch, tokens].
        seen: queries and keys of each layer are appended to it.

    Returns:
        The last hidden states [batch, tokens, hidden], normed.
    """
    hidden = model.model.embed_tokens(ids)
    angles = model.model.rotary_emb(hidden, positions)
    for layer in model.model.layers:
        normed = layer.input_layernorm(hidden)
        queries, keys, values = _projected(layer.self_attn, normed)
        queries, keys = apply_rotary_pos_emb(queries, keys, *angles)
        if seen is not None:
            seen.append((queries, keys))
        groups = layer.self_attn.num_key_value_groups
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        mixed = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        hidden = hidden + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.model.norm(hidden)


def _projected(attention: torch.nn.Module, normed: torch.Tensor) -> list[torch.Tensor]:
    """Return queries, keys and values, each [batch, heads, tokens, head size]."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    split = (project(normed).unflatten(-1, (-1, attention.head_dim)) for project in projections)
    return [x.transpose(1, 2) for x in split]
