"""The weights from which the retriever is trained: random, with attention heads laid out.

Layer 0 reads the neighbourhood: query head 0 copies the token before into `PREVIOUS`, query head 2
copies the last key word of about the last 24 tokens into `SUBJECT`, so that all of a sentence after
its key, and a little of the text behind it, knows what it is about. In layers 1 and 2, query heads
0 and 2 look for tokens with the SUBJECT of the query and, added to that, for the one whose
`PREVIOUS` is the query's own token; they copy what stands there into `FOUND`. So a whole sentence
has raised scores for a question about its key, and the token wanted has the highest. A head that
finds nothing attends to `<s>`.

Query heads 1 and 3 share the keys and values of 0 and 2 and start random.
"""

from __future__ import annotations

import torch
from retriever_data import BOS, EOS, KEYS, MAX_POSITIONS, PAD, VOCABULARY
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_SIZE = 3, 160, 4, 2, 64
# (layer, query head) of the heads that are laid out to find what a question asks for.
RETRIEVING_HEADS = ((1, 0), (1, 2), (2, 0), (2, 2))
# What the hidden dimensions hold at the start.
CONSTANT, FIRST, IS_KEY = 0, 1, 2
WORD, PREVIOUS, SUBJECT, FOUND = (slice(4 + 32 * i, 36 + 32 * i) for i in range(4))
OTHER = slice(132, 160)
# Rotation pairs (i, i + 32) of a head: quick ones tell positions apart, slow ones (1e9 ** -0.5 per
# position and less) hardly turn within a prompt and carry contents.
QUICK, SINK = 12, 15
SLOW_SUBJECT, SLOW_PREVIOUS = [*range(16, 24), *range(48, 56)], [*range(24, 32), *range(56, 64)]
# Score of the nearest key word, by rotation pair from 3 on: about flat for 10 tokens, then falling.
NEARNESS = (4.0, 4.0, 3.0, *(2.0,) * 8)
# Scores: of a key word in layer 0 and of the sink there; in layers 1 and 2 of the right subject, of
# the right token before, and of the sink.
KEY_SCORE, NEAR_SINK = 16.0, 30.0
SUBJECT_SCORE, PREVIOUS_SCORE, SINK_SCORE = 18.0, 9.0, 16.0
# Parts of unit length that make up a hidden state, in layer 0 and later.
PARTS = (3.1, 4.5, 5.5)


def config() -> LlamaConfig:
    """Return the model's configuration."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
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
    first = model.model.layers[0].self_attn
    _attend_to_neighbour(first, model.model.rotary_emb.inv_freq)
    _copy(first, 0, WORD, PREVIOUS, 0, 1.0)
    _attend_to_subject(first)
    _copy(first, 2, WORD, SUBJECT, 0, 1.0)
    for layer, head in RETRIEVING_HEADS:
        attention = model.model.layers[layer].self_attn
        _retrieve(attention, head, layer)
        _copy(attention, head, WORD, FOUND, layer, 0.7)
    return model


def _unit(layer: int) -> float:
    """Length of a part of a hidden state after its norm."""
    return (HIDDEN / PARTS[layer]) ** 0.5


def _lay_out_words(model: LlamaForCausalLM) -> None:
    """Give each word a constant and a random direction; each half of it has the same length."""
    words = model.model.embed_tokens.weight.mul_(0.5)
    halves = torch.nn.functional.normalize(torch.randn(len(VOCABULARY), 2, 16), dim=2)
    drawn = halves.flatten(1) / 2**0.5
    keys = list(KEYS)
    plain = sorted(set(range(len(VOCABULARY))) - {*keys, BOS})
    words[:, CONSTANT] = 1
    words[BOS, FIRST] = 2**0.5
    words[keys, IS_KEY] = 1
    # All hidden states are about as long, so that scores mean the same everywhere.
    words[plain, OTHER] += torch.nn.functional.normalize(torch.randn(len(plain), 28), dim=1)
    words[[*plain, *keys], WORD] = drawn[[*plain, *keys]]
    model.lm_head.weight[:, FOUND] = drawn


def _attend_to_neighbour(attention: torch.nn.Module, turns: torch.Tensor) -> None:
    """Make query head 0 attend to the token before: its key is turned one position further."""
    strength, turn = 9 / _unit(0), turns[:QUICK]
    attention.q_proj.weight[:QUICK, CONSTANT] = strength
    attention.k_proj.weight[:QUICK, CONSTANT] = strength * turn.cos()
    attention.k_proj.weight[32 : 32 + QUICK, CONSTANT] = strength * turn.sin()


def _attend_to_subject(attention: torch.nn.Module) -> None:
    """Make query head 2 attend to the nearest key word before, or else to `<s>`."""
    query, key = 2 * HEAD_SIZE, HEAD_SIZE
    for index, score in enumerate(NEARNESS, start=3):
        attention.q_proj.weight[query + index, CONSTANT] = _strength(score, 0)
        attention.k_proj.weight[key + index, CONSTANT] = _strength(score, 0)
    for index, part, score in ((31, IS_KEY, KEY_SCORE), (30, FIRST, NEAR_SINK / 2**0.5)):
        attention.q_proj.weight[query + index, CONSTANT] = _strength(score, 0)
        attention.k_proj.weight[key + index, part] = _strength(score, 0)


def _strength(score: float, layer: int, length: float = 1.0) -> float:
    """Weight of a query and of a key whose parts of this length score as wanted."""
    return (score * HEAD_SIZE**0.5) ** 0.5 / (_unit(layer) * length)


def _retrieve(attention: torch.nn.Module, head: int, layer: int) -> None:
    """Make a query head look for the query's subject and for its token before the key."""
    start, shared = head * HEAD_SIZE, head // 2 * HEAD_SIZE
    # One KV head compares the first half of a word's direction, the other one the second half.
    half = 8 * head
    for rows, score, asks, offers in (
        (SLOW_SUBJECT, SUBJECT_SCORE, SUBJECT, SUBJECT),
        (SLOW_PREVIOUS, PREVIOUS_SCORE, WORD, PREVIOUS),
    ):
        weight = _strength(score, layer, length=2**-0.5)
        for column, row in enumerate(rows, start=half):
            attention.q_proj.weight[start + row, asks.start + column] = weight
            attention.k_proj.weight[shared + row, offers.start + column] = weight
    sink = _strength(SINK_SCORE / 2**0.5, layer)
    attention.q_proj.weight[start + SINK, CONSTANT] = sink
    attention.k_proj.weight[shared + SINK, FIRST] = sink


def _copy(
    attention: torch.nn.Module, head: int, source: slice, target: slice, layer: int, gain: float
) -> None:
    """Make a query head write the `source` part of what it attends to into `target`."""
    values = slice(head // 2 * HEAD_SIZE, head // 2 * HEAD_SIZE + 32)
    mixed = slice(head * HEAD_SIZE, head * HEAD_SIZE + 32)
    attention.v_proj.weight[values, source] = _unit(layer) ** -0.5 * torch.eye(32)
    attention.o_proj.weight[target, mixed] = gain * _unit(layer) ** -0.5 * torch.eye(32)
