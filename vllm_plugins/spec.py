"""The language of ``--plugin``: ``NAME[:key=value,...]``, or JSON where that is too small."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_plugins.errors import PluginError

FORM = 'write NAME[:key=value,...] or a JSON object such as \'{"name": "sarathi", ...}\''


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; by itself JSON silently keeps the last of two equal keys."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise PluginError(f"--plugin: {json.dumps(key)}", "is given twice", "keep one")
        found[key] = value
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates)


@dataclass(frozen=True)
class PluginSpec:
    """One requested plug-in: its name and its options, not yet validated."""

    name: str
    options: dict[str, Any]


def parse_specs(texts: Iterable[str]) -> list[PluginSpec]:
    """Parse every value of ``--plugin`` in order.

    Raises:
        PluginError: A text is malformed, or a plug-in is named twice.
    """
    specs = [spec for text in texts for spec in _parse(text)]
    for i, spec in enumerate(specs):
        if any(spec.name == earlier.name for earlier in specs[:i]):
            raise PluginError(
                f"--plugin {spec.name}", "is named twice", "put all its options into one --plugin"
            )
    return specs


def _parse(text: str) -> Iterator[PluginSpec]:
    text = text.strip()
    if text.startswith(("[", "{")):
        yield from _from_json(text, _load(text))
    else:
        yield _from_short_form(text)


def _load(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        problem = error
    try:
        # vLLM passes a mapping inside a YAML list on as Python prints it.
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise PluginError(f"--plugin {text}", f"is not JSON ({problem})", FORM) from None


def _from_json(text: str, value: Any) -> Iterator[PluginSpec]:
    if isinstance(value, list) and value:
        for item in value:
            if isinstance(item, str):
                yield from _parse(item)
            else:
                yield from _from_json(text, item)
    elif isinstance(value, Mapping) and isinstance(value.get("name"), str):
        yield PluginSpec(value["name"], {k: v for k, v in value.items() if k != "name"})
    elif _is_nested(value):
        # The form that a nested mapping in a YAML configuration file arrives in.
        for name, options in value.items():
            yield PluginSpec(name, dict(options or {}))
    else:
        raise PluginError(f"--plugin {text}", "has no plug-in name", FORM)


def _is_nested(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(options, Mapping | None) for options in value.values())
    )


def _from_short_form(text: str) -> PluginSpec:
    name, _, rest = text.partition(":")
    if not name or "=" in name:
        raise PluginError(f"--plugin {text}", "has no plug-in name", FORM)
    options: dict[str, Any] = {}
    while rest:
        item = rest.partition(",")[0]
        key, _, after = rest.partition("=")
        key = key.strip().replace("-", "_")
        if "=" not in item or not key:
            raise PluginError(f"--plugin {text}", f"'{item}' is not key=value", FORM)
        if key in options:
            raise PluginError(f"--plugin {text}", f"option '{key}' is given twice", "keep one")
        options[key], rest = _take_value(after.lstrip(), text)
    return PluginSpec(name.strip(), options)


def _take_value(text: str, whole: str) -> tuple[Any, str]:
    """Return the value that a text begins with, and the text after its comma.

    Only JSON strings, lists and objects may contain commas. Numbers and booleans are left to the
    option's own type, since only that knows whether ``1`` is a number or a word.
    """
    if not text.startswith(('"', "[", "{")):
        bare, _, rest = text.partition(",")
        bare = bare.strip()
        return (None if bare == "null" else bare), rest
    try:
        value, end = _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        raise PluginError(f"--plugin {whole}", f"'{text}' is not JSON ({error})", FORM) from None
    rest = text[end:].lstrip()
    if rest and not rest.startswith(","):
        raise PluginError(
            f"--plugin {whole}", f"'{rest}' follows the value {text[:end]}", "put a comma there"
        )
    return value, rest[1:]
