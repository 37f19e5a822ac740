"""A Llama forward over some rows of a prompt, with the KV of the other rows given.

This is what reuse of KV caches needs and transformers does not offer: rows anywhere in the prompt
are computed, their keys and values replace those that were given, and every row attends to given
and computed ones alike. The layers are those of a `LlamaForCausalLM`; with all rows and no KV given
the result is the model's own (a test compares them).
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from reader_data import Prompt, Question, elsewhere
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import rotate_half

Layer = tuple[torch.Tensor, torch.Tensor]
"""Keys (after rotation) and values of a layer, each [batch, KV heads, positions, head size]."""


def forward_rows(
    model: LlamaForCausalLM,
    ids: torch.Tensor,
    positions: torch.Tensor,
    masks: Sequence[torch.Tensor],
    given: Sequence[Layer] | None = None,
    rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[Layer]]:
    """Run the model over `rows` of a prompt.

    Args:
        model: the model.
        ids: [batch, rows], the token ids of the rows.
        positions: [batch, rows], their positions.
        masks: for each layer [batch or 1, 1, rows, columns], true where a row sees a column.
        given: KV of all columns for each layer; None where all rows are computed.
        rows: [rows], the columns that are computed; wanted with `given`.

    Returns:
        The last hidden states [batch, rows, hidden], normed, and the KV of all columns.
    """
    hidden = model.model.embed_tokens(ids)
    angles = model.model.rotary_emb(hidden, positions)
    kept: list[Layer] = []
    for index, layer in enumerate(model.model.layers):
        normed = layer.input_layernorm(hidden)
        fresh = _keys_values(layer.self_attn, normed, angles)
        kept.append(fresh if given is None else _replaced(given[index], fresh, rows))
        hidden = hidden + _attend(layer.self_attn, normed, angles, kept[-1], masks[index])
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.model.norm(hidden), kept


def _heads(projected: torch.Tensor, size: int) -> torch.Tensor:
    return projected.unflatten(-1, (-1, size)).transpose(1, 2)


def _rotated(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = (a.unsqueeze(1) for a in angles)
    return x * cos + rotate_half(x) * sin


def _keys_values(attention: torch.nn.Module, normed: torch.Tensor, angles: tuple) -> Layer:
    keys = _heads(attention.k_proj(normed), attention.head_dim)
    return _rotated(keys, angles), _heads(attention.v_proj(normed), attention.head_dim)


def _replaced(given: Layer, fresh: Layer, rows: torch.Tensor) -> Layer:
    keys, values = (old.index_copy(2, rows, new) for old, new in zip(given, fresh, strict=True))
    return keys, values


def _attend(
    attention: torch.nn.Module, normed: torch.Tensor, angles: tuple, kv: Layer, mask: torch.Tensor
) -> torch.Tensor:
    queries = _rotated(_heads(attention.q_proj(normed), attention.head_dim), angles)
    keys, values = (x.repeat_interleave(attention.num_key_value_groups, dim=1) for x in kv)
    mixed = scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    return attention.o_proj(mixed.transpose(1, 2).flatten(2))


def moved(model: LlamaForCausalLM, kv: Layer, shift: int) -> Layer:
    """Return the KV as it would be `shift` positions later: keys rotate, values stay."""
    keys, values = kv
    angles = model.model.rotary_emb(keys, torch.tensor([[shift]]))
    return _rotated(keys, angles), values


@torch.no_grad()
def prefill(model: LlamaForCausalLM, prompt: Prompt) -> list[Layer]:
    """Return the KV of the prompt's documents, computed in full."""
    ids = torch.tensor([prompt.ids])
    positions = torch.arange(ids.shape[1])[None]
    causal = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    return forward_rows(model, ids, positions, [causal] * len(model.model.layers))[1]


def stale(model: LlamaForCausalLM, rng: Random, prompt: Prompt) -> list[Layer]:
    """Return KV for the prompt in which each document's was computed in another context.

    The text of each document is the same there; the documents before it are in another order and
    the other sources introduce other words. Only `<s>` is as in the prompt.
    """
    plain = next(i for i, document in enumerate(prompt.documents) if not document.notes)
    shared = elsewhere(rng, prompt, plain)[0]
    shared_kv = prefill(model, shared)
    pieces = [[(keys[:, :, :1], values[:, :, :1]) for keys, values in shared_kv]]
    for index, document in enumerate(prompt.documents):
        if document.notes:
            context, place = elsewhere(rng, prompt, index)
            kv = prefill(model, context)
        else:
            context, place, kv = shared, shared.documents.index(document), shared_kv
        first = context.starts[place]
        part = slice(first, first + len(document.tokens))
        shift = prompt.starts[index] - first
        pieces.append([moved(model, (k[:, :, part], v[:, :, part]), shift) for k, v in kv])
    layers = zip(*pieces, strict=True)
    return [tuple(torch.cat(x, dim=2) for x in zip(*layer, strict=True)) for layer in layers]


@torch.no_grad()
def refreshed(
    model: LlamaForCausalLM, prompt: Prompt, kv: Sequence[Layer], positions: Sequence[int]
) -> list[Layer]:
    """Return `kv` with the tokens at `positions` recomputed in all layers."""
    if not positions:
        return list(kv)
    rows = torch.tensor(sorted(positions))
    ids = torch.tensor(prompt.ids)[rows][None]
    mask = (torch.arange(len(prompt.ids)) <= rows[:, None])[None, None]
    masks = [mask] * len(model.model.layers)
    return forward_rows(model, ids, rows[None], masks, kv, rows)[1]


@torch.no_grad()
def answers(
    model: LlamaForCausalLM, kv: Sequence[Layer], questions: Sequence[Question]
) -> list[int]:
    """Return the greedy answer to each question, asked alone after the documents with `kv`."""
    ids = torch.tensor([question.tokens for question in questions])
    count, width = ids.shape
    length = kv[0][0].shape[2]
    padded = [
        tuple(torch.nn.functional.pad(x, (0, 0, 0, width)).expand(count, -1, -1, -1) for x in layer)
        for layer in kv
    ]
    rows = torch.arange(length, length + width)
    mask = (torch.arange(length + width) <= rows[:, None])[None, None]
    masks = [mask] * len(model.model.layers)
    hidden, _ = forward_rows(model, ids, rows.expand(count, -1), masks, padded, rows)
    return model.lm_head(hidden[:, -1]).argmax(-1).tolist()
