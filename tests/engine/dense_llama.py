"""A Llama in float64 without pages, passes or slices, to compare partly recomputed KV with."""

import json

import torch
from safetensors.torch import load_file


class DenseLlama:
    """Runs chosen tokens of one prompt through chosen layers.

    Args:
        folder: A model of `examples/models/tiny.py`, family llama.
    """

    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        self.weights = {name: value.double() for name, value in weights.items()}
        self.layers = self.config["num_hidden_layers"]
        self.head_size = self.config["head_dim"]

    def blank(self, count):
        """Keys (rotated) and values of so many tokens: (layers, 2, count, kv heads, head size)."""
        heads = self.config["num_key_value_heads"]
        return torch.zeros(self.layers, 2, count, heads, self.head_size, dtype=torch.float64)

    def embed(self, token_ids):
        return self.weights["model.embed_tokens.weight"][torch.tensor(token_ids)]

    def rotated(self, heads, positions):
        """Heads (n, heads, head size) turned by positions (n,), which may be negative."""
        half = self.head_size // 2
        steps = torch.arange(half, dtype=torch.float64) / half
        angles = positions[:, None].double() * self.config["rope_theta"] ** -steps
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        moved = torch.complex(heads[..., :half], heads[..., half:]) * turn
        return torch.cat((moved.real, moved.imag), dim=-1)

    def write(self, kv, layer, hidden, rows):
        """Compute one layer's keys and values of rows, ascending positions, from its input."""
        normed = self._norm(hidden, f"model.layers.{layer}.input_layernorm")
        kv[layer, 0, rows] = self.rotated(self._heads(normed, layer, "k_proj"), rows)
        kv[layer, 1, rows] = self._heads(normed, layer, "v_proj")

    def through(self, kv, hidden, rows, layers):
        """Run rows through layers, writing their KV; each attends to all up to its own position."""
        for layer in layers:
            self.write(kv, layer, hidden, rows)
            hidden = hidden + self._attention(kv, layer, hidden, rows)
            hidden = hidden + self._feed_forward(layer, hidden)
        return hidden

    def logprobs(self, hidden):
        logits = self._norm(hidden, "model.norm") @ self.weights["lm_head.weight"].T
        return logits.log_softmax(dim=-1)

    def _attention(self, kv, layer, hidden, rows):
        normed = self._norm(hidden, f"model.layers.{layer}.input_layernorm")
        queries = self.rotated(self._heads(normed, layer, "q_proj"), rows)
        grouped = queries.unflatten(1, (kv.shape[3], -1))
        scores = torch.einsum("ngqd,mgd->gqnm", grouped, kv[layer, 0]) / self.head_size**0.5
        later = torch.arange(kv.shape[2]) > rows[:, None]
        weights = scores.masked_fill(later, float("-inf")).softmax(dim=-1)
        mixed = torch.einsum("gqnm,mgd->ngqd", weights, kv[layer, 1]).flatten(1)
        return mixed @ self.weights[f"model.layers.{layer}.self_attn.o_proj.weight"].T

    def _feed_forward(self, layer, hidden):
        name = f"model.layers.{layer}"
        normed = self._norm(hidden, f"{name}.post_attention_layernorm")
        gate, up, down = (
            self.weights[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up", "down")
        )
        return (torch.nn.functional.silu(normed @ gate) * (normed @ up)) @ down

    def _heads(self, normed, layer, projection):
        weight = self.weights[f"model.layers.{layer}.self_attn.{projection}.weight"]
        return (normed @ weight.T).unflatten(1, (-1, self.head_size))

    def _norm(self, hidden, name):
        variance = hidden.square().mean(-1, keepdim=True)
        return (
            hidden
            * torch.rsqrt(variance + self.config["rms_norm_eps"])
            * self.weights[f"{name}.weight"]
        )
