"""What orders the tokens of an image: the trained predictor, or a training-free stand-in.

A scorer sees images of equal size together. A higher score is kept; scores are compared within one
image only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce

from vllm_plugins.visual_tokens.dynamic_llava.predictors import keep_scores

if TYPE_CHECKING:
    from vllm_plugins.engine.block_holes.plan import Choice

QUESTION = 64
"""Most rows behind a request's last image whose attention is read."""

SEED = 20241200876
"""Of the random scorer's order: the paper's number, so that no two engines differ."""


@dataclass(frozen=True)
class Images:
    """Images of equal size in one step.

    Attributes:
        choices: What is to be chosen of each.
        rows: The step's rows of their tokens, int64, shape (images, N).
        hidden: Input of layer l, shape (tokens, h).
        entered: Input of layer l - 1, shape (tokens, h), where the scorer asked for it.
        positions: Of the step's rows, int64, shape (tokens,).
    """

    choices: Sequence[Choice]
    rows: torch.Tensor
    hidden: torch.Tensor
    entered: torch.Tensor | None
    positions: torch.Tensor

    @cached_property
    def tokens(self) -> torch.Tensor:
        """Input of layer l at the images' tokens, shape (images, N, h)."""
        return self.hidden[self.rows]

    def upload(self, values: Any) -> torch.Tensor:
        """Return a host array on the step's device."""
        array = torch.from_numpy(np.ascontiguousarray(values))
        return array.to(self.hidden.device, non_blocking=True)


class Scorer(Protocol):
    """Orders image tokens; ``reads_input`` asks for the input of layer l - 1 as well."""

    reads_input: bool

    def __call__(self, images: Images) -> torch.Tensor:
        """Return scores, float32, shape (images, N)."""
        ...


class PredictorScorer:
    """The trained image predictor, P_I (section 3.2).

    Args:
        predictor: From (images, N, h) to logits (images, N, 2).
    """

    reads_input = False

    def __init__(self, predictor: nn.Module) -> None:
        self._predictor = predictor

    def __call__(self, images: Images) -> torch.Tensor:
        """Return the logarithm of the probability of "keep"."""
        return keep_scores(self._predictor(images.tokens))


class NormScorer:
    """The length of a token's hidden state."""

    reads_input = False

    def __call__(self, images: Images) -> torch.Tensor:
        """Return Euclidean norms."""
        return images.tokens.float().norm(dim=-1)


class RandomScorer:
    """An order that ignores the image: the same for all images of a size, so runs repeat."""

    reads_input = False

    def __init__(self) -> None:
        self._orders: dict[int, torch.Tensor] = {}

    def __call__(self, images: Images) -> torch.Tensor:
        """Return uniform numbers in [0, 1)."""
        count, width = images.rows.shape
        if width not in self._orders:
            order = np.random.default_rng((SEED, width)).random(width, np.float32)
            self._orders[width] = images.upload(order)
        return self._orders[width].expand(count, width)


class AttentionScorer:
    """Attention that the question pays to each image token in layer l - 1, without training.

    In the spirit of FastV (arXiv 2403.06764), which reads the last row; here it is the mean over
    all heads and over the rows behind the request's last image, at most `QUESTION` of the last,
    which is this project's choice. Softmax runs over the request's rows in this step, because keys
    of earlier steps lie in pages. An image whose question is not in the step is ordered by norm.

    Args:
        layer: Decoder layer l - 1.
    """

    reads_input = True

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._norm = NormScorer()

    def __call__(self, images: Images) -> torch.Tensor:
        """Return mean attention probabilities, or norms."""
        asked = np.array([first < last for first, last in (c.after for c in images.choices)])
        if not asked.any():
            return self._norm(images)
        received = self._received(images)
        if asked.all():
            return received
        return torch.where(images.upload(asked)[:, None], received, self._norm(images))

    def _received(self, images: Images) -> torch.Tensor:
        """Return attention that each image's tokens get from its request's question."""
        choices = images.choices
        begins = np.array([c.request_row for c in choices])
        ends = np.array([c.after[1] for c in choices])
        asks = np.clip(np.array([c.after[1] - c.after[0] for c in choices]), 0, QUESTION)
        # Right-aligned questions and left-aligned keys, both clipped to rows of the request.
        questions = ends[:, None] + np.arange(-max(int(asks.max()), 1), 0)
        keys = begins[:, None] + np.arange(int((ends - begins).max()))
        counts = questions >= (ends - asks)[:, None]
        hidden_keys = keys >= ends[:, None]
        keys, questions = np.minimum(keys, ends[:, None] - 1), np.maximum(questions, 0)
        seen = (keys[:, None, :] <= questions[:, :, None]) & ~hidden_keys[:, None, :]
        key_rows, question_rows = images.upload(keys), images.upload(questions)
        attention = self._attention(images, question_rows, key_rows, images.upload(seen))
        weights = images.upload((counts / np.maximum(asks, 1)[:, None]).astype(np.float32))
        received = torch.einsum("iq,iqk->ik", weights, attention)
        return received.gather(1, images.rows - images.upload(begins)[:, None])

    def _attention(
        self, images: Images, questions: torch.Tensor, keys: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        """Return attention probabilities, the mean over the heads of all ranks.

        Args:
            images: The step.
            questions: Rows, int64, shape (images, q).
            keys: Rows, int64, shape (images, k).
            seen: Whether a question sees a key, bool, shape (images, q, k).

        Returns:
            float32, shape (images, q, k).
        """
        module, local = self._layer.self_attn, self._layer.self_attn.num_heads
        query, _ = self._project(images, questions)
        _, key = self._project(images, keys)
        groups = local // key.shape[-2]
        query = query.unflatten(2, (-1, groups)).float() * module.scaling
        logits = torch.einsum("iqhgd,ikhd->ihgqk", query, key.float())
        logits = logits.masked_fill(~seen[:, None, None], float("-inf"))
        total = logits.softmax(-1).nan_to_num_(0.0).sum((1, 2))
        return tensor_model_parallel_all_reduce(total) / module.total_num_heads

    def _project(self, images: Images, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries and keys of rows, shapes (images, n, heads or KV heads, d)."""
        assert images.entered is not None
        module, flat = self._layer.self_attn, rows.flatten()
        normed = self._layer.input_layernorm(images.entered[flat])
        joined, _ = module.qkv_proj(normed)
        query, key, _ = joined.split([module.q_size, module.kv_size, module.kv_size], dim=-1)
        query, key = module.rotary_emb(images.positions[flat], query, key)
        shape = (*rows.shape, -1, module.head_dim)
        return query.reshape(shape), key.reshape(shape)
