"""The predictors of Dynamic-LLaVA: which image tokens and which answer tokens are worth keeping.

Both read the input of decoder layer l and give two logits for each token (paper, section 3.2 and
appendix A.1; sizes from the published code). Index 0 is "keep", as in the published code, although
the paper says the second. Training and serving use these modules. Their parameters are named::

    image_predictor.norm.{weight,bias}              LayerNorm over the hidden state
    image_predictor.project.{weight,bias}           hidden size -> d_model
    image_predictor.blocks.N.attention_norm.*       LayerNorm
    image_predictor.blocks.N.query_key_value.weight d_model -> 3 d_model, no bias
    image_predictor.blocks.N.out.{weight,bias}
    image_predictor.blocks.N.feed_forward_norm.*    LayerNorm
    image_predictor.blocks.N.up.*, .down.*          d_model -> dim_feedforward -> d_model
    image_predictor.head.{0,2,4}.*                  d_model -> d_model/2 -> d_model/4 -> 2
    text_predictor.norm.*, .project.*, .head.{0,2,4}.*

Every rank of a tensor-parallel group holds them whole.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from vllm_plugins.visual_tokens.dynamic_llava.sparse_config import SparseConfig

KEEP, DROP = 0, 1
"""Index of each class in the predictors' logits."""


class Block(nn.Module):
    """A pre-norm vision-transformer block, in which all tokens of an image see one another.

    Args:
        width: Of a token, d_model.
        heads: Of the attention.
        feed_forward: Width between the two linear maps.
    """

    def __init__(self, width: int, heads: int, feed_forward: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, feed_forward)
        self.down = nn.Linear(feed_forward, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the tokens after the block.

        Args:
            tokens: Shape (images, N, d_model).
        """
        joined = self.query_key_value(self.attention_norm(tokens))
        # (3, images, heads, N, head size)
        query, key, value = joined.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.out(seen.transpose(1, 2).flatten(-2))
        return tokens + self.down(functional.gelu(self.up(self.feed_forward_norm(tokens))))


class ImagePredictor(nn.Module):
    """P_I: logits of each token of an image, from all of its tokens.

    Half of the channels behind the blocks stay the token's own; the other half is replaced by its
    mean over the image.

    Args:
        hidden_size: Of the language model, h.
        config: Sizes.
    """

    def __init__(self, hidden_size: int, config: SparseConfig) -> None:
        super().__init__()
        width = config.d_model
        self.norm = nn.LayerNorm(hidden_size)
        self.project = nn.Linear(hidden_size, width)
        self.blocks = nn.ModuleList(
            Block(width, config.nhead, config.dim_feedforward) for _ in range(config.num_layers)
        )
        self.head = _head(width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits.

        Args:
            hidden: Input of layer l at the images' tokens, shape (images, N, h).

        Returns:
            Shape (images, N, 2).
        """
        tokens = functional.gelu(self.project(self.norm(hidden)))
        for block in self.blocks:
            tokens = block(tokens)
        own, shared = tokens.chunk(2, dim=-1)
        shared = shared.mean(dim=-2, keepdim=True).expand_as(own)
        return self.head(torch.cat((own, shared), dim=-1))


class TextPredictor(nn.Module):
    """P_OT: logits of each answer token, from its own hidden state alone.

    So what training decides for whole answers, decoding decides token by token.

    Args:
        hidden_size: Of the language model, h.
        config: Sizes.
    """

    def __init__(self, hidden_size: int, config: SparseConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.project = nn.Linear(hidden_size, config.d_model)
        self.head = _head(config.d_model)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits.

        Args:
            hidden: Input of layer l, shape (..., h).

        Returns:
            Shape (..., 2).
        """
        return self.head(functional.gelu(self.project(self.norm(hidden))))


def _head(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, width // 2),
        nn.GELU(),
        nn.Linear(width // 2, width // 4),
        nn.GELU(),
        nn.Linear(width // 4, 2),
    )


class Predictors(nn.Module):
    """The predictors of one checkpoint; one whose keep rate is 1 does not exist.

    Args:
        hidden_size: Of the language model, h.
        config: Keep rates and sizes.
    """

    def __init__(self, hidden_size: int, config: SparseConfig) -> None:
        super().__init__()
        self.config = config
        self.image_predictor: ImagePredictor | None = None
        self.text_predictor: TextPredictor | None = None
        if config.image_keep_rate < 1:
            self.image_predictor = ImagePredictor(hidden_size, config)
        if config.text_keep_rate < 1:
            self.text_predictor = TextPredictor(hidden_size, config)


def keep_scores(logits: torch.Tensor) -> torch.Tensor:
    """Return how much each token should be kept: the logarithm of the probability of "keep".

    Args:
        logits: Shape (..., 2).

    Returns:
        At least float32, shape (...).
    """
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)[..., KEEP]


def keeps(logits: torch.Tensor) -> torch.Tensor:
    """Return the decision on each answer token (equation 6); of equal logits "drop" wins.

    Args:
        logits: Shape (..., 2).

    Returns:
        bool, shape (...).
    """
    return logits[..., KEEP] > logits[..., DROP]


def wanted_tokens(tokens: int, rate: float) -> int:
    """Return how many of an image's tokens a keep rate leaves, rounded down as published."""
    return int(tokens * rate)


def choose(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the tokens with the highest scores, in their original order.

    Of equal scores the earlier token wins.

    Args:
        scores: Shape (images, N).
        count: Tokens to choose of each image.

    Returns:
        Indices, ascending, int64, shape (images, count).
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[:, :count].sort(dim=-1).values
