"""The weights from which the reader is trained: random, with three attention heads laid out.

From random weights alone, 110 steps left a model of this size at chance: it had yet to find out
that a value belongs to the word before it. The start therefore gives it the heads, which answer
four in ten questions on one document and two in ten on two; training does the rest, and teaches it
to end.

Layer 0, head 0 copies the token before into `PREVIOUS`; layer 0, head 1 copies into the value of a
reference the word of its category, wherever it stands; head 0 of the last two layers finds the
token whose `PREVIOUS` is the key asked for and copies its value. A head that finds nothing attends
to `<s>`, so that nothing else depends on what stands in other documents.
"""

from __future__ import annotations

import torch
from reader_data import BOS, EOS, KEYS, MAX_POSITIONS, NUMBERS, PAD, REFERENCES, VOCABULARY, WORDS
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, HIDDEN, HEADS, HEAD_SIZE = 4, 128, 2, 64
# What the hidden dimensions hold at the start.
CONSTANT, FIRST = 0, 1
KEY, PREVIOUS, VALUE = slice(2, 34), slice(34, 66), slice(66, 98)
CATEGORY, WANTED, OTHER = slice(98, 106), slice(106, 114), slice(114, 128)
# Rotation pairs (i, i + 32) of a head: quick ones tell neighbours apart, slow ones hardly turn
# within a prompt and carry contents.
QUICK, SLOW, SINK = 12, [*range(16, 32), *range(48, 64)], 15
# Length of a hidden state after its norm, over the length of one part of an embedding.
UNIT = (HIDDEN / 2.5) ** 0.5


def config() -> LlamaConfig:
    """Return the model's configuration."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7},
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


@torch.no_grad()
def make_start() -> LlamaForCausalLM:
    """Return the model before training; drawn from torch's seed."""
    model = LlamaForCausalLM(config())
    _lay_out_words(model)
    layers = [layer.self_attn for layer in model.model.layers]
    _attend_to_neighbour(layers[0], model.model.rotary_emb.inv_freq)
    _copy(layers[0], 0, KEY, PREVIOUS)
    _match(layers[0], 1, WANTED, CATEGORY)
    _copy(layers[0], 1, VALUE, VALUE)
    for attention in layers[-2:]:
        _match(attention, 0, KEY, PREVIOUS)
        _copy(attention, 0, VALUE, VALUE)
    return model


def _lay_out_words(model: LlamaForCausalLM) -> None:
    """Give each word a constant and a random direction in the dimensions of its kind."""
    words = model.model.embed_tokens.weight.mul_(0.5)
    drawn = torch.nn.functional.normalize(torch.randn(len(VOCABULARY), 32), dim=1)
    values = [*NUMBERS, *(word for category in WORDS for word in category)]
    other = sorted(set(range(len(VOCABULARY))) - {*KEYS, *values, *REFERENCES, BOS})
    words[:, CONSTANT] = 1
    words[BOS, FIRST] = 1
    words[list(KEYS), KEY] = drawn[list(KEYS)]
    words[values, VALUE] = drawn[values]
    words[other, OTHER] = torch.nn.functional.normalize(drawn[other, :14], dim=1)
    for index, (category, reference) in enumerate(zip(WORDS, REFERENCES, strict=True)):
        words[list(category), CATEGORY.start + index] = 1
        words[reference, WANTED.start + index] = 1
    model.lm_head.weight[values, VALUE] = drawn[values]


def _attend_to_neighbour(attention: torch.nn.Module, turns: torch.Tensor) -> None:
    """Make head 0 attend to the token before: its key is turned one position further."""
    strength, turn = 9 / UNIT, turns[:QUICK]
    attention.q_proj.weight[:QUICK, CONSTANT] = strength
    attention.k_proj.weight[:QUICK, CONSTANT] = strength * turn.cos()
    attention.k_proj.weight[32 : 32 + QUICK, CONSTANT] = strength * turn.sin()


def _match(attention: torch.nn.Module, head: int, asks: slice, offers: slice) -> None:
    """Make a head attend to the token that offers what it asks for, else to `<s>`."""
    strength, sink = 13 / UNIT, 9 / UNIT
    width = asks.stop - asks.start
    rows = [head * HEAD_SIZE + i for i in SLOW[-width:]]
    attention.q_proj.weight[rows, asks] = strength * torch.eye(width)
    attention.k_proj.weight[rows, offers] = strength * torch.eye(width)
    attention.q_proj.weight[head * HEAD_SIZE + SINK, CONSTANT] = sink
    attention.k_proj.weight[head * HEAD_SIZE + SINK, FIRST] = sink


def _copy(attention: torch.nn.Module, head: int, source: slice, target: slice) -> None:
    """Make a head write the `source` part of what it attends to into `target`."""
    rows = slice(head * HEAD_SIZE, head * HEAD_SIZE + 32)
    strength = UNIT**-0.5
    attention.v_proj.weight[rows, source] += strength * torch.eye(32)
    attention.o_proj.weight[target, rows] += strength * torch.eye(32)
