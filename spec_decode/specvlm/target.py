"""The frozen target, as training and the reference use it: embeddings, features, head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_plugins.errors import PluginError


@dataclass(frozen=True)
class TargetRows:
    """What the target makes of a batch.

    Attributes:
        embeddings: Of its tokens, images merged in; shape (batch, n, hidden).
        features: Hidden states behind the final norm, which enter the head; as ``embeddings``.
    """

    embeddings: torch.Tensor
    features: torch.Tensor


class FrozenTarget(nn.Module):
    """A vision-language model of transformers that is not trained.

    Args:
        model: With a ``language_model`` inside; the whole of it is frozen.

    Raises:
        PluginError: It has no language model beside a vision part.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self._body: Any = getattr(model, "model", model)
        if not hasattr(self._body, "language_model"):
            raise PluginError(
                "target", f"{type(model).__name__} has no image modality", "use a LLaVA"
            )

    def train(self, mode: bool = True) -> FrozenTarget:
        """Stay in evaluation mode, whatever is asked."""
        return super().train(False)

    @property
    def text_config(self) -> Any:
        """Config of the language model."""
        config: Any = self.model.config
        return config.get_text_config()

    @property
    def image_token(self) -> int:
        """Token that stands for a patch."""
        config: Any = self.model.config
        return int(config.image_token_id)

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits of features, (..., hidden) to (..., vocabulary)."""
        model: Any = self.model
        return model.get_output_embeddings()(features)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of text tokens."""
        model: Any = self.model
        return model.get_input_embeddings()(tokens)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        pixels: Mapping[str, torch.Tensor],
    ) -> TargetRows:
        """Run the target.

        Args:
            input_ids: int64, shape (batch, n).
            attention_mask: 0 where a row is padding, which stands on the right; or None.
            pixels: What its processor made of the images.
        """
        with self._merged_embeddings() as seen:
            out = self._body(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **pixels
            )
        return TargetRows(seen[0], out.last_hidden_state)

    @contextmanager
    def _merged_embeddings(self) -> Iterator[list[torch.Tensor]]:
        """Collect what the language model is given, however this kind of model merges images."""
        seen: list[torch.Tensor] = []

        def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            seen.append(kwargs["inputs_embeds"])

        hook = self._body.language_model.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield seen
        finally:
            hook.remove()


def load_target(path: str, device: str, dtype: torch.dtype) -> FrozenTarget:
    """Load a target by name or folder.

    Raises:
        PluginError: It cannot be loaded, or has no image modality.
    """
    from transformers import AutoModelForImageTextToText

    try:
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PluginError(path, f"cannot be loaded ({reason})", "name a LLaVA") from None
    return FrozenTarget(model.to(device))
