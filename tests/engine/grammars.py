"""Grammars for tiny models, and a tokenizer with words in which they can be followed."""

import json
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_once import CACHE, build_once
from vision import VOCAB, tiny_llava

EOS = 2
SPECIAL = 4
"""The tokenizer's first words."""
WORDS = [*'{}[]":,', *string.digits, *string.ascii_lowercase, "true", "false", "null"]
FORMAT = 1
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 1, "maximum": 9999},
        "b": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
        "c": {"enum": ["cat", "dog"]},
    },
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}
REGEX = "[a-f]{3}[0-9]{2,9}"
CHOICE = ["cat", "catfish", "dog9"]


@dataclass(frozen=True)
class Grammar:
    """What an answer has to be.

    Attributes:
        constraint: Arguments of vLLM's `StructuredOutputsParams`.
        accepts: Whether a text is such an answer.
    """

    constraint: dict[str, Any]
    accepts: Callable[[str], bool]


def _is_of_schema(text: str) -> bool:
    made = json.loads(text)
    return (
        list(made) == ["a", "b", "c"]
        and type(made["a"]) is int
        and 1 <= made["a"] <= 9999
        and 1 <= len(made["b"]) <= 4
        and all(type(item) is bool for item in made["b"])
        and made["c"] in ("cat", "dog")
    )


GRAMMARS = {
    "json": Grammar({"json": SCHEMA}, _is_of_schema),
    "regex": Grammar({"regex": REGEX}, lambda text: re.fullmatch(REGEX, text) is not None),
    "choice": Grammar({"choice": CHOICE}, lambda text: text in CHOICE),
}
KINDS = (None, *GRAMMARS)


def json_words() -> Path:
    """Return a tokenizer for tiny LLaVAs, whose words are pieces of JSON and not `t4` to `t63`."""
    return build_once(CACHE / "tiny-llava-json-words", {"format": FORMAT}, _build)


def _build(folder: Path) -> None:
    for path in tiny_llava().glob("tokenizer*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    described = json.loads((folder / "tokenizer.json").read_text())
    old = sorted(described["model"]["vocab"], key=described["model"]["vocab"].get)
    assert len(old) == VOCAB
    words = [*old[:SPECIAL], *WORDS, *old[SPECIAL + len(WORDS) :]]
    described["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    (folder / "tokenizer.json").write_text(json.dumps(described))


def constrained(sampling: Any, kind: str | None) -> Any:
    """Return sampling parameters of which the answer follows a grammar, or none."""
    from vllm.sampling_params import StructuredOutputsParams

    made = sampling.clone()
    if kind is not None:
        made.structured_outputs = StructuredOutputsParams(**GRAMMARS[kind].constraint)
        # It ends where the grammar does.
        made.ignore_eos = False
    return made


def assert_follows(output: Any, kind: str | None) -> None:
    """Fail unless a request's answer is complete and of its grammar."""
    if kind is None:
        return
    *tokens, last = output.outputs[0].token_ids
    assert last == EOS, tokens
    assert all(token >= SPECIAL for token in tokens), tokens
    text = "".join(WORDS[token - SPECIAL] for token in tokens)
    assert GRAMMARS[kind].accepts(text), (kind, text)
