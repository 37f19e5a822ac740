"""Moving rotated keys to other positions, from the layer's own tables of cosines and sines.

A key stored at position p was rotated by the table's row p. It is turned back by that row and
turned by row q, in one complex product in float32, and rounded once. Taking both rows from the
table serves every kind of RoPE whose angle depends on the position alone, scaled ones included: a
row's length, such as YaRN's magnitude factor, divides out and comes back. A key that does not move
stays as it is.

M-RoPE takes sections of a key, side by side or interleaved, from the rows of time, height and
width. What is moved is text with no image before it, whose three positions are one number, at the
old place and at the new one: so all sections are from one row, and are moved by it.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_plugins.errors import PluginError

# Kinds whose table holds for all requests and positions alike. Others choose a table by the length
# of the request.
KINDS = frozenset(
    {
        "RotaryEmbedding",
        "LinearScalingRotaryEmbedding",
        "Llama3RotaryEmbedding",
        "NTKScalingRotaryEmbedding",
        "YaRNScalingRotaryEmbedding",
        "DynamicNTKScalingRotaryEmbedding",
        "DynamicNTKAlphaRotaryEmbedding",
        "MRotaryEmbedding",
    }
)


class PositionShift:
    """Moves keys of one model, all of whose layers share a rotary embedding.

    Args:
        rotary: A layer's rotary embedding module.

    Raises:
        PluginError: Its keys cannot be moved.
    """

    def __init__(self, rotary: Any) -> None:
        # What another plug-in has registered in place of a class says in place of which.
        kind = getattr(type(rotary), "stands_in_for", type(rotary)).__name__
        if kind not in KINDS:
            raise PluginError(
                "--plugin kvshare",
                f"cannot move keys that were rotated by {kind}",
                "use a model with plain, linear, NTK, Llama-3, YaRN or M-RoPE position embedding",
            )
        half = rotary.rotary_dim // 2
        table = rotary.cos_sin_cache.float()
        self._table = torch.complex(table[:, :half].contiguous(), table[:, half:].contiguous())
        self._rotary_dim: int = rotary.rotary_dim
        self._neox: bool = rotary.is_neox_style

    def __call__(
        self, keys: torch.Tensor, source: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """Return keys as they would have been rotated at other positions.

        Args:
            keys: Shape (n, kv heads, head size).
            source: Position at which each was computed, int64, shape (n,).
            target: Position at which each is needed, of the same shape.
        """
        there, here = self._table[target], self._table[source]
        factor = (there * here.conj() / (here.real**2 + here.imag**2))[:, None]
        rotated = keys[..., : self._rotary_dim].float()
        if self._neox:
            real, imaginary = rotated.chunk(2, dim=-1)
        else:
            real, imaginary = rotated[..., 0::2], rotated[..., 1::2]
        moved = torch.complex(real.contiguous(), imaginary.contiguous()) * factor
        parts = (moved.real, moved.imag)
        rotated = torch.cat(parts, -1) if self._neox else torch.stack(parts, -1).flatten(-2)
        result = torch.cat((rotated.to(keys.dtype), keys[..., self._rotary_dim :]), dim=-1)
        # There and back again is one only within rounding.
        return torch.where((source == target)[:, None, None], keys, result)
