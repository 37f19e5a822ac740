"""Make a tiny random-weight Llama (or Qwen2, Qwen3) folder that vLLM can load and serve over HTTP.

    python examples/models/tiny.py OUT [--layers N] [--hidden N] [--seed N] ...

For tests in which meaning does not matter. Word `t17` is token 17, so a prompt can be written as
text (`t5 t17 t5`), as a chat message or as ids with the same result. The last four ids are the
special tokens.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build_once import build_once

if TYPE_CHECKING:
    import torch

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
# Only the words of the messages: a chat and a plain prompt of the same words are the same tokens.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
FORMAT = 1
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of the model and the seed of its weights; the head size is hidden / heads."""

    layers: int = 2
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 512
    max_positions: int = 4096
    seed: int = 0
    family: str = "llama"

    def __post_init__(self) -> None:
        if self.family not in ARCHITECTURES:
            raise ValueError(f"family must be one of {', '.join(ARCHITECTURES)}")
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError("hidden must be a multiple of heads, and heads of kv_heads")

    @property
    def head_size(self) -> int:
        """Width of one attention head; vLLM's CPU backend wants a multiple of 32."""
        return self.hidden // self.heads

    @property
    def intermediate(self) -> int:
        """Width of the feed-forward layer."""
        return 2 * self.hidden


def make_tiny_llama(out: Path, **shape: Any) -> Path:
    """Return folder `out` with config, weights and tokenizer; made unless it is there already.

    Args:
        out: folder to make; one of another shape is replaced.
        **shape: fields of `Shape`.
    """
    wanted = Shape(**shape)

    def build(folder: Path) -> None:
        _write_config(wanted, folder)
        _write_weights(wanted, folder)
        _write_tokenizer(wanted, folder)

    return build_once(Path(out), {"format": FORMAT, **asdict(wanted)}, build)


def _write_config(shape: Shape, folder: Path) -> None:
    pad, bos, eos, _ = range(shape.vocab - len(SPECIAL), shape.vocab)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[shape.family]],
        "model_type": shape.family,
        "dtype": "float32",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": shape.max_positions,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "pad_token_id": pad,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _write_weights(shape: Shape, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(_weights(shape), folder / "model.safetensors", metadata={"format": "pt"})


def _weights(shape: Shape) -> dict[str, torch.Tensor]:
    """Draw the weights, each [out, in] with standard deviation gain / sqrt(in).

    The usual initialisation (0.02 everywhere) gives flat attention and a next token that hardly
    depends on the context. Gains above one on query, key, value and output make a wrong KV entry
    show in the very next token.
    """
    import torch

    source = torch.Generator().manual_seed(shape.seed)
    hidden, kv_width = shape.hidden, shape.kv_heads * shape.head_size

    def draw(rows: int, columns: int, gain: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=source) * gain / columns**0.5

    weights = {
        "model.embed_tokens.weight": draw(shape.vocab, hidden, hidden**0.5),
        "lm_head.weight": draw(shape.vocab, hidden, 1.0),
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(shape.layers):
        parts = {
            "self_attn.q_proj": draw(hidden, hidden, 1.5),
            "self_attn.k_proj": draw(kv_width, hidden, 1.5),
            "self_attn.v_proj": draw(kv_width, hidden, 2.0),
            "self_attn.o_proj": draw(hidden, hidden, 2.0),
            "mlp.gate_proj": draw(shape.intermediate, hidden, 1.0),
            "mlp.up_proj": draw(shape.intermediate, hidden, 1.0),
            "mlp.down_proj": draw(hidden, shape.intermediate, 1.0),
            "input_layernorm": torch.ones(hidden),
            "post_attention_layernorm": torch.ones(hidden),
        }
        if shape.family == "qwen3":
            norms = {"self_attn.q_norm": shape.head_size, "self_attn.k_norm": shape.head_size}
            parts |= {name: 1 + draw(width, 1, 0.2).flatten() for name, width in norms.items()}
        weights |= {f"model.layers.{layer}.{name}.weight": t for name, t in parts.items()}
        if shape.family == "qwen2":
            widths = {"q": hidden, "k": kv_width, "v": kv_width}
            weights |= {
                f"model.layers.{layer}.self_attn.{name}_proj.bias": draw(width, 1, 0.3).flatten()
                for name, width in widths.items()
            }
    return weights


def _write_tokenizer(shape: Shape, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"t{i}" for i in range(shape.vocab - len(SPECIAL))] + list(SPECIAL)
    pad, bos, eos, unknown = SPECIAL
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        model_max_length=shape.max_positions,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def main() -> int:
    """Make the folder named on the command line and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("out", type=Path)
    for field in fields(Shape):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    print(make_tiny_llama(options.pop("out"), **options))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
