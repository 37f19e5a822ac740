"""EagleVLM's drafter in plain torch: one decoder layer over fused rows (paper, section 3).

Draft row t joins the embedding of token t + 1 with the target's feature f_t, its hidden state
behind the final norm. The layer's output at row t is at once the predicted feature f_{t+1} and,
through the target's own head, the draft of token t + 2. Unlike in EAGLE the layer keeps its input
norm, as the paper has it. Embeddings and head are the target's and not stored.

Parameters are named as in the class that serves the drafter: ``fc``, ``layers.0.*`` as in
transformers' Llama and Qwen2, ``compressor.*`` and ``gate.*``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from vllm_plugins.errors import PluginError
from vllm_plugins.spec_decode.specvlm.compressor import VisualCompressor
from vllm_plugins.spec_decode.specvlm.gate import QuestionGate, gate_inputs, mixture, restrict
from vllm_plugins.spec_decode.specvlm.settings import OPERATORS, Choice, SpecVLMSettings

# Whether q, k and v have a bias where the config does not say.
MODEL_TYPES = {"llama": False, "qwen2": True}
KeysValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class DrafterShape:
    """Shape of the decoder layer, as the target's language model has it.

    Attributes:
        model_type: ``llama`` or ``qwen2``.
        vocab_size: Of the target, whose embeddings and head are used.
        hidden_size: Width of a row.
        intermediate_size: Of the gated perceptron.
        num_attention_heads: Of queries.
        num_key_value_heads: Of keys and values; divides the heads of queries.
        head_dim: Width of a head.
        rms_norm_eps: Of both norms.
        max_position_embeddings: Of the target.
        attention_bias: Whether q, k and v have a bias.
        rope_parameters: As in transformers' configs; ``rope_theta`` and ``rope_type`` among them.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    attention_bias: bool
    rope_parameters: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_target(cls, text: Any) -> DrafterShape:
        """Return the shape of a layer of a target's text config.

        Raises:
            PluginError: It is neither a Llama nor a Qwen2, or rotates positions in a way that is
                not made of frequencies alone.
        """
        if text.model_type not in MODEL_TYPES:
            known = " and ".join(MODEL_TYPES)
            raise PluginError("target", f"is a {text.model_type}", f"only {known} can be drafted")
        rope = dict(getattr(text, "rope_parameters", None) or {})
        rope.setdefault("rope_theta", getattr(text, "rope_theta", 10000.0))
        rope.setdefault("rope_type", "default")
        if rope["rope_type"] not in ("default", "linear", "llama3") or "mrope_section" in rope:
            kind = "mrope" if "mrope_section" in rope else rope["rope_type"]
            raise PluginError(
                "target", f"has {kind} positions", "use one with one-dimensional RoPE"
            )
        bias = getattr(text, "attention_bias", None)
        heads = text.num_attention_heads
        return cls(
            text.model_type,
            text.vocab_size,
            text.hidden_size,
            text.intermediate_size,
            heads,
            text.num_key_value_heads,
            getattr(text, "head_dim", None) or text.hidden_size // heads,
            text.rms_norm_eps,
            text.max_position_embeddings,
            MODEL_TYPES[text.model_type] if bias is None else bool(bias),
            rope,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields under the names of transformers' configs."""
        return asdict(self)


def frequencies(shape: DrafterShape) -> torch.Tensor:
    """Return RoPE's angle for each step of a position; float32, shape (head_dim / 2,)."""
    rope, half = shape.rope_parameters, torch.arange(0, shape.head_dim, 2).float()
    base = 1.0 / (rope["rope_theta"] ** (half / shape.head_dim))
    if rope["rope_type"] == "linear":
        return base / rope["factor"]
    if rope["rope_type"] == "llama3":
        return _llama3_frequencies(base, rope)
    return base


def _llama3_frequencies(base: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    """Slow the long waves by a factor, keep the short ones, and blend between (Llama 3.1)."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * base / (2 * torch.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return base * (share + (1 - share) / rope["factor"])


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight, in the rows' type or float32, whichever is wider."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(rows.dtype)


class Attention(nn.Module):
    """Causal attention with grouped heads and rotary positions that are given."""

    def __init__(self, shape: DrafterShape) -> None:
        super().__init__()
        size, head = shape.hidden_size, shape.head_dim
        heads, shared = shape.num_attention_heads, shape.num_key_value_heads
        self.head_dim = head
        self.q_proj = nn.Linear(size, heads * head, bias=shape.attention_bias)
        self.k_proj = nn.Linear(size, shared * head, bias=shape.attention_bias)
        self.v_proj = nn.Linear(size, shared * head, bias=shape.attention_bias)
        # Llama's attention_bias means the output too; Qwen2 has a bias before attention alone.
        out_bias = shape.attention_bias and shape.model_type == "llama"
        self.o_proj = nn.Linear(heads * head, size, bias=out_bias)
        self.register_buffer("frequencies", frequencies(shape), persistent=False)

    def forward(
        self,
        rows: torch.Tensor,
        positions: torch.Tensor,
        past: Sequence[KeysValues] = (),
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, KeysValues]:
        """Attend.

        Args:
            rows: Shape (batch, n, hidden).
            positions: Of RoPE, int64, shape (batch, n).
            past: Keys and values of earlier passes over these rows, before this pass's own.
            mask: Which keys a row sees, bool, shape (n, n * passes); causal without.

        Returns:
            The output, shape (batch, n, hidden), and this pass's keys and values.
        """
        query = self._rotate(self._split(self.q_proj(rows)), positions)
        key = self._rotate(self._split(self.k_proj(rows)), positions)
        own = (key, self._split(self.v_proj(rows)))
        keys, values = (torch.cat(parts, 2) for parts in zip(*past, own, strict=True))
        out = functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), own

    def _split(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

    def _rotate(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(heads.dtype, torch.float32)
        angles = positions[:, None, :, None].to(wide) * self.frequencies.to(wide)
        cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
        left, right = heads.chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class GatedPerceptron(nn.Module):
    """Llama's SwiGLU."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows of (..., size)."""
        return self.down_proj(functional.silu(self.gate_proj(rows)) * self.up_proj(rows))


class DecoderLayer(nn.Module):
    """One pre-norm layer under the names of transformers' Llama and Qwen2."""

    def __init__(self, shape: DrafterShape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = GatedPerceptron(shape.hidden_size, shape.intermediate_size)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(
        self,
        rows: torch.Tensor,
        positions: torch.Tensor,
        past: Sequence[KeysValues] = (),
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, KeysValues]:
        """Run the layer; arguments and results as of :meth:`Attention.forward`."""
        attended, own = self.self_attn(self.input_layernorm(rows), positions, past, mask)
        rows = rows + attended
        return rows + self.mlp(self.post_attention_layernorm(rows)), own


class EagleDrafter(nn.Module):
    """The drafter with its compressor and gate.

    Args:
        shape: Of the decoder layer.
        settings: Of compressor and gate.
    """

    def __init__(self, shape: DrafterShape, settings: SpecVLMSettings) -> None:
        super().__init__()
        self.shape, self.settings = shape, settings
        self.fc = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=False)
        self.layers = nn.ModuleList([DecoderLayer(shape)])
        heads = shape.num_attention_heads
        # The layer's heads may not divide the width where head_dim is its own.
        resampler_heads = heads if shape.hidden_size % heads == 0 else 1
        self.compressor = VisualCompressor(shape.hidden_size, settings, resampler_heads)
        self.gate = QuestionGate(shape.hidden_size, settings.gate_width)

    def fuse(self, embeddings: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Join embeddings of tokens t + 1 and features of rows t; each (..., hidden)."""
        return self.fc(torch.cat([embeddings, features], -1))

    def forward(
        self,
        rows: torch.Tensor,
        positions: torch.Tensor,
        past: Sequence[KeysValues] = (),
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, KeysValues]:
        """Predict the next features from fused, compressed rows.

        Args:
            rows: Shape (batch, n, hidden); padding, if any, is on the right.
            positions: int64, shape (batch, n).
            past: Keys and values of earlier passes over these rows.
            mask: Which keys of all passes a row sees, shape (n, n * passes); causal without.

        Returns:
            Predicted features, shape (batch, n, hidden), and this pass's keys and values.
        """
        return self.layers[0](rows, positions, past, mask)

    @torch.no_grad()
    def decide(
        self, features: torch.Tensor, prompt_length: int, image_end: int
    ) -> tuple[Choice | None, torch.Tensor | None]:
        """Return what is done to the images of one prompt, as serving decides it.

        Args:
            features: Of the target, shape (at least prompt_length, hidden).
            prompt_length: Tokens of the prompt.
            image_end: Position behind its last image.

        Returns:
            The choice, and for ``weighted`` the weights of its parts, shape (3,).
        """
        if self.settings.mode not in ("select", "weighted"):
            return self.settings.choice(), None
        logits = self.gate(*(x[None] for x in gate_inputs(features, prompt_length, image_end)))[0]
        picked = OPERATORS[int(restrict(logits, self.settings.select_from).argmax())]
        return self.settings.choice(picked), mixture(logits)
