"""The scenes model over an image's patches and, beside one another, many rows of words.

Each row sees the image and itself, at the positions that it would have alone, so that one pass
over an image trains on many questions. The layers are those of the transformers model; with all
patches the result is the model's own (a test compares them). Products run in bfloat16 under
autocast where that is faster; attention over patches stays in float32, which CPUs do faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from scenes_model import BOS, PATCHES, normed
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import rotate_half
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

Layer = tuple[torch.Tensor, torch.Tensor]
"""Keys (after rotation) and values of a layer, each [batch, heads, positions, head size]."""
Angles = tuple[torch.Tensor, torch.Tensor]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def patch_states(
    model: LlavaForConditionalGeneration, images: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """Return the tower's last states of the patches kept, [batch, kept, tower width].

    Args:
        model: the model.
        images: [batch, 3, IMAGE, IMAGE] of uint8.
        kept: [batch, kept], the patches that are computed; the others do not exist for them.
    """
    tower = model.model.vision_tower
    hidden = tower.embeddings(normed(images))
    rows = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], dim=1)
    hidden = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
    hidden = tower.pre_layrnorm(hidden)
    for layer in tower.encoder.layers:
        hidden = hidden + _tower_attention(layer.self_attn, layer.layer_norm1(hidden))
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return hidden[:, 1:]


def _tower_attention(attention: Any, hidden: torch.Tensor) -> torch.Tensor:
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (_heads(project(hidden), attention.head_dim) for project in projections)
    return attention.out_proj(_in_float32(q, k, v).transpose(1, 2).flatten(2))


def _in_float32(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False
) -> torch.Tensor:
    with torch.autocast(q.device.type, enabled=False):
        return scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal)


def _heads(projected: torch.Tensor, size: int) -> torch.Tensor:
    return projected.unflatten(-1, (-1, size)).transpose(1, 2)


def _rotated(x: torch.Tensor, angles: Angles) -> torch.Tensor:
    cos, sin = (a.unsqueeze(1) for a in angles)
    return x * cos + rotate_half(x) * sin


def read_image(
    model: LlavaForConditionalGeneration, states: torch.Tensor, kept: torch.Tensor
) -> list[Layer]:
    """Return the language model's KV of the beginning and an image, layer by layer.

    Args:
        model: the model.
        states: [batch, kept, tower width], see `patch_states`.
        kept: [batch, kept]; patch i stands at position i + 1.
    """
    llama = model.model.language_model
    image = model.model.multi_modal_projector(states).float()
    begin = llama.embed_tokens(torch.full_like(kept[:, :1], BOS))
    hidden = torch.cat([begin, image], dim=1)
    positions = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], dim=1)
    angles = llama.rotary_emb(hidden, positions)
    read: list[Layer] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        read.append((k, v))
        return _in_float32(q, k, v, causal=True)

    for layer in llama.layers:
        hidden = _through(layer, hidden, angles, attend)
    return read


def row_logits(
    model: LlavaForConditionalGeneration, read: list[Layer], rows: torch.Tensor
) -> torch.Tensor:
    """Return the logits of rows of words after an image, [batch, rows, tokens, vocabulary].

    Args:
        model: the model.
        read: KV of the image, see `read_image`.
        rows: [batch, rows, tokens] of token ids.
    """
    llama = model.model.language_model
    count, tokens = rows.shape[1:]
    hidden = llama.embed_tokens(rows.flatten(1))
    positions = (PATCHES + 1 + torch.arange(tokens, device=rows.device)).repeat(count)
    angles = llama.rotary_emb(hidden, positions[None])
    for layer, image in zip(llama.layers, read, strict=True):

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, image: Layer = image
        ) -> torch.Tensor:
            return _attend_in_rows(q, k, v, image, count)

        hidden = _through(layer, hidden, angles, attend)
    return model.lm_head(llama.norm(hidden)).unflatten(1, (count, tokens))


def _through(layer: Any, hidden: torch.Tensor, angles: Angles, attend: Attend) -> torch.Tensor:
    attention, before = layer.self_attn, layer.input_layernorm(hidden)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (_heads(project(before), attention.head_dim) for project in projections)
    q, k = _rotated(q, angles), _rotated(k, angles)
    k, v = (x.repeat_interleave(attention.num_key_value_groups, dim=1) for x in (k, v))
    hidden = hidden + attention.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _attend_in_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, image: Layer, rows: int
) -> torch.Tensor:
    """Return attention of each row's tokens to the image and to what precedes them in the row.

    Args:
        q, k, v: [batch, heads, rows * tokens, head size].
        image: keys and values that all rows see.
        rows: how many rows there are.
    """
    image_keys, image_values = image
    own_q, own_k, own_v = (x.unflatten(2, (rows, -1)) for x in (q, k, v))
    tokens = own_q.shape[3]
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    own = (own_q @ own_k.transpose(-1, -2)).float().masked_fill(future, -math.inf).flatten(2, 3)
    seen = (q @ image_keys.transpose(-1, -2)).float()
    weights = (torch.cat([seen, own], dim=-1) / math.sqrt(q.shape[-1])).softmax(-1)
    seen, own = weights.split([seen.shape[-1], tokens], dim=-1)
    mixed = seen.to(v.dtype) @ image_values.to(v.dtype)
    return mixed + (own.unflatten(2, (rows, -1)).to(v.dtype) @ own_v).flatten(2, 3)
