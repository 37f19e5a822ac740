"""A tiny random LFM2: four gated short convolutions and two layers of attention."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from build_once import CACHE, build_once
from tiny import Shape, _write_tokenizer

FORMAT = 2
CONV, ATTENTION = "conv", "full_attention"
LAYERS = (CONV, CONV, ATTENTION, CONV, ATTENTION, CONV)
HIDDEN, VOCAB = 256, 512
GAINS = {"in_proj": 1.2, "self_attn.out": 4.0, "v_proj": 3.0}


def tiny_lfm2() -> Path:
    """Return the model's folder, made unless it is there already."""
    made_from = {"format": FORMAT, "layers": LAYERS, "hidden": HIDDEN, "vocab": VOCAB}
    return build_once(CACHE / "tiny-lfm2", json.loads(json.dumps(made_from)), _build)


def _build(folder: Path) -> None:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    shape = Shape(hidden=HIDDEN, vocab=VOCAB)
    config = Lfm2Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN,
        num_hidden_layers=len(LAYERS), num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=shape.max_positions, layer_types=list(LAYERS),
        block_auto_adjust_ff_dim=False, tie_word_embeddings=True, dtype="float32",
        pad_token_id=VOCAB - 4, bos_token_id=VOCAB - 3, eos_token_id=VOCAB - 2,
    )  # fmt: skip
    model = Lfm2ForCausalLM(config)
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _draw(name, parameter, numbers)
    model.save_pretrained(folder)
    path = folder / "config.json"
    # vLLM reads two keys that released checkpoints have, and the class of transformers has not.
    keys = {"conv_dim": HIDDEN, "block_dim": HIDDEN}
    path.write_text(json.dumps(json.loads(path.read_text()) | keys, indent=1))
    _write_tokenizer(shape, folder)


def _draw(name: str, parameter: torch.Tensor, numbers: torch.Generator) -> None:
    """Draw weights so that the next token depends on the whole context, states included.

    With the usual initialisation (0.02 everywhere) it hardly does: the products in a convolution
    are of almost nothing, and attention is flat.
    """
    if parameter.dim() == 1:
        parameter.fill_(1.5 if "q_layernorm" in name or "k_layernorm" in name else 1.0)
        return
    # A convolution's three taps are not scaled down.
    columns = 1 if "conv.conv" in name else parameter.shape[-1]
    gain = next((value for part, value in GAINS.items() if part in name), 1.0)
    parameter.copy_(torch.randn(parameter.shape, generator=numbers) * gain / columns**0.5)


@cache
def reference() -> Any:
    """Return transformers' own model in float32, loaded once."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_lfm2(), dtype=torch.float32).eval()
    # As requests with `ignore_eos`.
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def greedy(tokens: list[int], count: int) -> list[int]:
    """Return what transformers' own model generates."""
    ids = torch.tensor([tokens])
    made = reference().generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return made[0, len(tokens) :].tolist()
