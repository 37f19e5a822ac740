"""The language of ``--plugin``: ``NAME[:key=value,...]``, or JSON where that is too small."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_plugins.errors import PluginError

FORM = 'write NAME[:key=value,...] or a JSON object such as \'{"name": "sarathi", ...}\''
_OPENING, _CLOSING = "[{", "]}"


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
    if text[:1] in _OPENING and text:
        yield from _from_json(text, _load_json(text))
    else:
        yield _from_short_form(text)


def _load_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PluginError(f"--plugin {text}", f"is not JSON ({error})", FORM) from None


def _from_json(text: str, value: Any) -> Iterator[PluginSpec]:
    if isinstance(value, list):
        for item in value:
            if isinstance(item, str):
                yield from _parse(item)
            else:
                yield from _from_json(text, item)
    elif isinstance(value, Mapping) and isinstance(value.get("name"), str):
        yield PluginSpec(value["name"], {k: v for k, v in value.items() if k != "name"})
    elif isinstance(value, Mapping) and all(isinstance(v, Mapping | None) for v in value.values()):
        # The form that a nested mapping in a YAML configuration file arrives in.
        for name, options in value.items():
            yield PluginSpec(name, dict(options or {}))
    else:
        raise PluginError(f"--plugin {text}", "has no plug-in name", FORM)


def _from_short_form(text: str) -> PluginSpec:
    name, _, rest = text.partition(":")
    if not name or "=" in name:
        raise PluginError(f"--plugin {text}", "has no plug-in name", FORM)
    options: dict[str, Any] = {}
    for item in _split_commas(rest):
        key, equals, value = item.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise PluginError(f"--plugin {text}", f"'{item}' is not key=value", FORM)
        if key in options:
            raise PluginError(f"--plugin {text}", f"option '{key}' is given twice", "keep one")
        options[key] = _value(value.strip(), text)
    return PluginSpec(name, options)


def _split_commas(text: str) -> Iterator[str]:
    """Split at commas that stand outside quotes and brackets."""
    depth, start, quoted, escaped = 0, 0, False, False
    for i, char in enumerate(text):
        if quoted:
            quoted = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            quoted = True
        elif char in _OPENING:
            depth += 1
        elif char in _CLOSING:
            depth -= 1
        elif char == "," and depth == 0:
            yield text[start:i]
            start = i + 1
    if text[start:]:
        yield text[start:]


def _value(text: str, whole: str) -> Any:
    """Decode what only JSON can say; numbers and booleans are left to the option's own type."""
    if text == "null":
        return None
    if text[:1] in ('"', "[", "{") and text:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise PluginError(
                f"--plugin {whole}", f"'{text}' is not JSON ({error})", FORM
            ) from None
    return text
