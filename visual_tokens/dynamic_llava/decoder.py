"""The decoder of an unmodified transformers LLaVA, run layer by layer.

The modules are transformers' own, weights and all; only the loop over the layers is here, because
the predictors sit between two of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_plugins.errors import PluginError

if TYPE_CHECKING:
    from transformers import Cache, LlavaForConditionalGeneration

DECODERS = frozenset({"llama", "mistral", "qwen2"})
"""Types of language model whose layers take (hidden, mask, cache, rotation) and nothing more."""


def check_model(config: Any, sparse_layer: int, where: str) -> None:
    """Refuse a model that cannot be trained or run layer by layer.

    Args:
        config: transformers' configuration of the whole model.
        sparse_layer: Layer whose input the predictors read.
        where: What an error names.

    Raises:
        PluginError: The model is no LLaVA on a known decoder with full attention, or has too few
            layers.
    """
    if config.model_type != "llava" or config.text_config.model_type not in DECODERS:
        raise PluginError(
            where,
            f"is of type {config.model_type}, or its decoder is not a known one",
            f"use a llava model on one of {', '.join(sorted(DECODERS))}",
        )
    text = config.text_config
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    windowed = text.model_type == "mistral" and getattr(text, "sliding_window", None)
    if windowed or kinds != {"full_attention"}:
        raise PluginError(where, "has layers with windowed attention", "use full attention")
    if sparse_layer >= text.num_hidden_layers:
        raise PluginError(
            where,
            f"has {text.num_hidden_layers} layers, so none at sparse_layer {sparse_layer}",
            f"choose a layer from 1 to {text.num_hidden_layers - 1}",
        )


class Decoder:
    """The language model's layers, embeddings and head.

    Args:
        model: transformers' LLaVA; see `check_model`.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self._model = model
        self._stack = model.model.language_model

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self._stack.layers)

    def image_rows(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return which tokens are image tokens, bool, of the shape of ``input_ids``."""
        return input_ids == self._model.config.image_token_id

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the projected features of images, in their order.

        Args:
            pixels: Shape (images, channels, height, width).

        Returns:
            Shape (images, N, h).
        """
        return torch.stack(tuple(self._model.get_image_features(pixel_values=pixels).pooler_output))

    def embed(self, input_ids: torch.Tensor, features: torch.Tensor | None) -> torch.Tensor:
        """Return embeddings with the images' features in their places.

        Args:
            input_ids: Shape (batch, n).
            features: Shape (images, N, h), in the order of the images in the batch.

        Returns:
            Shape (batch, n, h).

        Raises:
            ValueError: There are not as many features as image tokens.
        """
        embedded = self._model.get_input_embeddings()(input_ids)
        rows = self.image_rows(input_ids)
        given = 0 if features is None else features.shape[0] * features.shape[1]
        if int(rows.sum()) != given:
            raise ValueError(f"{int(rows.sum())} image tokens, but features for {given}")
        if features is None:
            return embedded
        return embedded.masked_scatter(rows[..., None], features.to(embedded.dtype))

    def run(
        self,
        hidden: torch.Tensor,
        layers: range,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None = None,
        **attention: Any,
    ) -> torch.Tensor:
        """Run some layers.

        Args:
            hidden: Their input, shape (batch, n, h).
            layers: Which ones.
            positions: Of the tokens, int64, shape (batch, n) or (1, n).
            mask: True where a query may see a key, bool, shape (batch, 1, n, keys). None lets a
                single query see all.
            cache: Keys and values of earlier tokens, which gains those of these.
            **attention: For the attention implementation.

        Returns:
            Their output, of the shape of ``hidden``.
        """
        rotation = self._stack.rotary_emb(hidden, position_ids=positions)
        for index in layers:
            hidden = self._stack.layers[index](
                hidden,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
                position_embeddings=rotation,
                **attention,
            )
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits of the next token from the last layer's output.

        Args:
            hidden: Shape (..., h).

        Returns:
            Shape (..., vocabulary).
        """
        return self._model.lm_head(self._stack.norm(hidden))
