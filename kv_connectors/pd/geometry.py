"""Which part of the KV a worker holds, and what two workers' parts share.

A worker holds an interval of layers (pipeline parallel) and, of each, an interval of KV heads
(tensor parallel). So unequal parallelism of the two sides is only the intersection of intervals
(DistServe's migration kernel does the same with layer and head ranges). The states of recurrent
layers are divided in ways of their own; they come whole from the worker of the same tensor rank,
for which both sides need equally many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_plugins.engine.kv_heads import heads_of_rank

MAX_LAYERS = 4096
MAX_HEADS = 1 << 16


@dataclass(frozen=True)
class Heads:
    """KV heads ``[first, last)`` of all the model's."""

    first: int
    last: int

    def __and__(self, other: Heads) -> Heads:
        first = max(self.first, other.first)
        return Heads(first, max(first, min(self.last, other.last)))

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    @classmethod
    def of_rank(cls, total: int, rank: int, size: int) -> Heads:
        """Return the heads of a tensor-parallel rank; arguments are those of `heads_of_rank`."""
        own = heads_of_rank(total, rank, size)
        return cls(own.start, own.stop)


@dataclass(frozen=True)
class Shard:
    """What one worker holds.

    Attributes:
        layers: Names of its layers, in the order of the model.
        heads: Its KV heads; the same in every layer that has them.
        block_size: Tokens of a block.
        bytes_per_head: Bytes of one block of one head, by layer.
        identity: Digest of what must be equal on both sides: model, types, layout.
        states: Each recurrent layer, with the form of its state.
        tensor_rank: Of the worker, which says which part of the states it has.
        tensor_size: Number of tensor ranks.
    """

    layers: tuple[str, ...]
    heads: Heads
    block_size: int
    bytes_per_head: tuple[int, ...]
    identity: str
    states: tuple[tuple[str, str], ...] = ()
    tensor_rank: int = 0
    tensor_size: int = 1

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "layers": list(self.layers),
            "heads": [self.heads.first, self.heads.last],
            "block_size": self.block_size,
            "bytes_per_head": list(self.bytes_per_head),
            "identity": self.identity,
            "states": [list(state) for state in self.states],
            "tensor": [self.tensor_rank, self.tensor_size],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Shard:
        """Return the shard of a peer's JSON object.

        Raises:
            ValueError: It is malformed.
        """
        fields = ("layers", "heads", "bytes_per_head", "block_size", "identity", "states", "tensor")
        given: list[Any] = [value.get(name) for name in fields]
        layers, heads, sizes, block_size, identity, states, tensor = given
        if not (
            _is_list(layers, str, 1, MAX_LAYERS)
            and _is_list(heads, int, 2, 2)
            and 0 <= heads[0] < heads[1] <= MAX_HEADS
            and _is_list(sizes, int, len(layers), len(layers))
            and type(block_size) is int
            and isinstance(identity, str)
            and _is_list(states, list, 0, len(layers))
            and all(_is_list(state, str, 2, 2) for state in states)
            and _is_list(tensor, int, 2, 2)
            and 0 <= tensor[0] < tensor[1] <= MAX_HEADS
        ):
            raise ValueError("malformed description of a worker's KV")
        named = tuple((name, form) for name, form in states)
        return cls(tuple(layers), Heads(*heads), block_size, tuple(sizes), identity, named, *tensor)


def _is_list(value: Any, kind: type, least: int, most: int) -> bool:
    return (
        isinstance(value, list)
        and least <= len(value) <= most
        and all(type(item) is kind for item in value)
    )


@dataclass(frozen=True)
class Pull:
    """What a reader takes from one writer.

    Attributes:
        writer: Index of the writer.
        layers: Names of the layers.
        heads: The heads.
    """

    writer: int
    layers: tuple[str, ...]
    heads: Heads


def plan_pulls(reader: Shard, writers: Sequence[Shard]) -> list[Pull]:
    """Return what a reader takes from whom, so that each of its heads comes exactly once.

    Where writers replicate heads, the first that has one gives it. States come with all heads.

    Raises:
        ValueError: The sides do not fit, or the writers lack something.
    """
    for writer in writers:
        _check_fit(reader, writer)
    states = dict(reader.states)
    pulls: list[Pull] = []
    missing = dict.fromkeys(reader.layers, reader.heads)
    for index, writer in enumerate(writers):
        held = set(writer.layers)
        # Writers come in order of rank, so the heads of a layer arrive from the first on.
        by_part: dict[Heads, list[str]] = {}
        for layer in reader.layers:
            part = missing[layer] & writer.heads
            if layer in states and writer.tensor_rank != reader.tensor_rank:
                continue
            if layer in held and len(part) and part.first == missing[layer].first:
                by_part.setdefault(part, []).append(layer)
                missing[layer] = Heads(part.last, missing[layer].last)
        pulls += [Pull(index, tuple(layers), heads) for heads, layers in by_part.items()]
    lacking = [layer for layer, heads in missing.items() if len(heads)]
    if lacking:
        raise ValueError(f"the prefill instance lacks heads of {lacking[0]}")
    return pulls


def readers_of(writer: int, readers: Sequence[Shard], writers: Sequence[Shard]) -> int:
    """Return how many readers take anything from a writer, of all of which it waits to hear.

    Args:
        writer: Index of the writer.
        readers: All readers of an instance.
        writers: All writers of an instance.
    """
    return sum(
        any(pull.writer == writer for pull in plan_pulls(reader, writers)) for reader in readers
    )


def _check_fit(reader: Shard, writer: Shard) -> None:
    if reader.identity != writer.identity:
        raise ValueError("the two instances' models, numeric types or KV layouts differ")
    if reader.block_size != writer.block_size:
        raise ValueError(
            f"block sizes differ: {writer.block_size} on the prefill instance, "
            f"{reader.block_size} here"
        )
    _check_states(reader, writer)
    sizes = dict(zip(writer.layers, writer.bytes_per_head, strict=True))
    for layer, size in zip(reader.layers, reader.bytes_per_head, strict=True):
        if sizes.get(layer, size) != size:
            raise ValueError(f"the blocks of {layer} have another size")


def _check_states(reader: Shard, writer: Shard) -> None:
    if (reader.states or writer.states) and reader.tensor_size != writer.tensor_size:
        raise ValueError(
            f"recurrent states are divided over {writer.tensor_size} tensor ranks on the prefill "
            f"instance and over {reader.tensor_size} here; both need the same tensor parallel size"
        )
    forms = dict(writer.states)
    for layer, form in reader.states:
        # Other pipeline ranks have other layers.
        if layer in writer.layers and forms.get(layer) != form:
            raise ValueError(f"the state of {layer} has another form")
