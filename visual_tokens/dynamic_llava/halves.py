"""The two halves of a decoder between which tokens are dropped.

Each half is a compiled graph of its own, because what happens between them depends on the batch.
Both borrow the layers of a model that vLLM has built, whose own forward pass is never called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden": 0})
class LowerHalf(nn.Module):
    """Layers 0 to l - 1, which compute and cache all tokens.

    Args:
        vllm_config: The engine's configuration.
        layers: The model's.
        reads_input: Whether the input of the last of them is returned too.
        prefix: Unused; vLLM gives it to every compiled module.
    """

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        layers: Sequence[nn.Module],
        reads_input: bool,
        prefix: str = "",
    ) -> None:
        super().__init__()
        # In a tuple they are no children, so that their parameters have one name each.
        self.layers = tuple(layers)
        self.reads_input = reads_input

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the layers.

        Args:
            positions: int64, shape (tokens,).
            hidden: Embeddings, shape (tokens, h).

        Returns:
            Output and residual of layer l - 1, whose sum is the input of layer l, and if wanted
            that of layer l - 1; each of shape (tokens, h).
        """
        residual = None
        for layer in self.layers[:-1]:
            hidden, residual = layer(positions, hidden, residual)
        entered: tuple[torch.Tensor, ...] = ()
        if self.reads_input:
            # A new tensor: normalisation adds to the residual in place.
            entered = (hidden.clone() if residual is None else hidden + residual,)
        hidden, residual = self.layers[-1](positions, hidden, residual)
        return (hidden, residual, *entered)


@support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden": 0, "residual": 0})
class UpperHalf(nn.Module):
    """Layers l and above with the last normalisation, on the rows that are left.

    Args:
        vllm_config: The engine's configuration.
        layers: The model's.
        norm: The model's last normalisation.
        prefix: Unused; vLLM gives it to every compiled module.
    """

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.last_norm = (norm,)

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        """Run the layers.

        Args:
            positions: Of the rows in their own request, int64, shape (rows,).
            hidden: Output of layer l - 1, shape (rows, h).
            residual: Its residual, shape (rows, h).

        Returns:
            What the head reads, shape (rows, h).
        """
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        hidden, _ = self.last_norm[0](hidden, residual)
        return hidden


def attention_names(layers: Sequence[Any]) -> list[str]:
    """Return the names of decoder layers' attentions, by which vLLM finds their KV."""
    return [layer.self_attn.attn.layer_name for layer in layers]
