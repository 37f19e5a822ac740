"""``vllm-plugins describe NAME``: everything that a plug-in declares, and its stock spelling."""

from __future__ import annotations

import argparse
import ast
import json
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_plugins.activation import configure
from vllm_plugins.arguments import flag
from vllm_plugins.cli.list import source
from vllm_plugins.errors import PluginError
from vllm_plugins.metrics import PREFIX
from vllm_plugins.plugin import Options, Plugin
from vllm_plugins.registry import Enabled, entry_points, load, validate_options
from vllm_plugins.settings import KEY
from vllm_plugins.spec import PluginSpec, parse_specs

HELP = "Show one plug-in: options, requirements, metrics and the stock spelling."
BOUNDS = {
    "minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<",
}  # fmt: skip
WIDTH = 96


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``describe``."""
    parser.add_argument(
        "plugin",
        metavar="NAME[:key=value,...]",
        help="plug-in, as for --plugin; with options, the stock spelling is printed for those",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the description."""
    specs = parse_specs([args.plugin])
    if len(specs) != 1:
        raise PluginError(f"describe {args.plugin}", "names several plug-ins", "describe one")
    described = describe(specs[0])
    print(json.dumps(described, indent=1) if args.json else as_text(described))
    return 0


def describe(spec: PluginSpec) -> dict[str, Any]:
    """Return a plug-in's declaration, and the stock spelling of these options, as JSON values.

    Raises:
        PluginError: There is no such plug-in, or an option is wrong.
    """
    plugin = load(spec.name)
    spelt = PluginSpec(spec.name, {**_first_choices(plugin.Options), **spec.options})
    options = validate_options(plugin, spelt.options)
    distribution, version = source(entry_points()[spec.name])
    needs = plugin.requires
    return {
        "name": plugin.name,
        "family": plugin.family,
        "summary": plugin.summary,
        "exactness": plugin.exactness,
        "distribution": distribution,
        "version": version,
        "papers": [{"title": p.title, "arxiv": p.arxiv} for p in plugin.papers],
        "requires": {
            "vllm": needs.vllm,
            "platforms": sorted(needs.platforms or ()),
            "runners": sorted(needs.runners or ()),
        },
        "conflicts": dict(plugin.conflicts),
        "options": option_table(plugin.Options),
        "metrics": list(metrics_of(plugin)),
        "stands_for": " ".join([spec.name, *(f"{k}={v}" for k, v in spelt.options.items())]),
        "stock_arguments": stock_arguments(Enabled(plugin, options)),
    }


def _first_choices(options: type[Options]) -> dict[str, Any]:
    """Return a value for each option that has none by default, so that there is a spelling."""
    table = options.model_json_schema()["properties"] if options.model_fields else {}
    required = (name for name, field in options.model_fields.items() if field.is_required())
    choices = {name: table[name].get("enum", table[name].get("examples")) for name in required}
    return {name: values[0] for name, values in choices.items() if values}


def option_table(options: type[Options]) -> list[dict[str, Any]]:
    """Return name, type, default, bounds and description of each option, from the JSON schema."""
    schema = options.model_json_schema()
    rows = []
    for name, raw in schema.get("properties", {}).items():
        field = _resolved(raw, schema)
        variants = [_resolved(item, schema) for item in field.get("anyOf", [field])]
        rows.append(
            {
                "name": name,
                "type": " or ".join(_type(variant) for variant in variants),
                "default": field.get("default"),
                "required": name in schema.get("required", ()),
                "bounds": ", ".join(_bounds(variants)),
                "description": field.get("description", ""),
                "graph": bool(field.get("graph", False)),
            }
        )
    return rows


def _resolved(field: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    reference = field.get("$ref", "").rpartition("/")[2]
    return {**schema["$defs"][reference], **field} if reference else dict(field)


def _type(variant: Mapping[str, Any]) -> str:
    if "enum" in variant:
        return "one of " + ", ".join(json.dumps(value).strip('"') for value in variant["enum"])
    if "const" in variant:
        return json.dumps(variant["const"]).strip('"')
    if variant.get("type") == "array":
        return f"list of {_type(variant.get('items', {}))}"
    other = "object" if "$ref" in variant else "any"
    return str(variant.get("format") or variant.get("type") or other)


def _bounds(variants: list[dict[str, Any]]) -> Iterator[str]:
    for variant in variants:
        for key, sign in BOUNDS.items():
            if key in variant:
                yield f"{sign} {variant[key]:g}"


def metrics_of(plugin: Plugin) -> Iterator[dict[str, str]]:
    """Yield the metrics that a plug-in's own modules declare, read from their source.

    A policy's module imports the engine, which takes seconds and may not be installed, so no
    module is imported: a declaration is a ``MetricSpec`` call with literal arguments.
    """
    for path in _modules(type(plugin).__module__):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("MetricSpec"):
                name, kind, text = (ast.literal_eval(argument) for argument in node.args[:3])
                yield {"name": PREFIX + name, "kind": kind, "help": text}


def _modules(name: str) -> list[Path]:
    """Return the files of a plug-in: its folder where it declares itself in ``plugin.py``."""
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None, f"{name} was imported a moment ago"
    origin = Path(spec.origin)
    return sorted(origin.parent.glob("*.py")) if name.endswith(".plugin") else [origin]


def stock_arguments(item: Enabled) -> list[str]:
    """Return the stock `vllm serve` arguments that do the same as ``--plugin``."""
    # Nothing is set beside the plug-in, so there is no default to compare with.
    arguments = configure([item], {}, {})
    given = item.options.model_dump(mode="json", exclude_unset=True)
    changes = {**arguments.changes, "additional_config": {KEY: {item.plugin.name: given}}}
    middleware = [word for name in arguments.middleware for word in _words("middleware", name)]
    return [word for name, value in changes.items() for word in _words(name, value)] + middleware


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag(name) if value else flag(f"no_{name}")]
    if isinstance(value, list | tuple):
        return [flag(name), *(str(item) for item in value)]
    return [flag(name), json.dumps(value) if isinstance(value, dict) else str(value)]


def as_text(d: Mapping[str, Any]) -> str:
    """Return a description for people."""
    lines = [f"{d['name']} ({d['family']}, {d['exactness']}): {d['summary']}", ""]
    for paper in d["papers"]:
        link = f", arXiv {paper['arxiv']}" if paper["arxiv"] else ""
        lines += textwrap.wrap(
            f"source: {paper['title']}{link}", WIDTH, subsequent_indent="        "
        )
    lines.append(f"package: {d['distribution']} {d['version']}")
    lines.append(f"requires: {_requirements(d['requires'])}")
    lines += [f"conflicts with {name}: {reason}" for name, reason in d["conflicts"].items()]
    lines += ["", "options:" if d["options"] else "options: none"]
    for option in d["options"]:
        lines += _option_lines(option)
    lines += ["", "metrics:" if d["metrics"] else "metrics: none"]
    for metric in d["metrics"]:
        lines.append(f"  {metric['name']} ({metric['kind']})")
        lines += _indented(metric["help"])
    stock = shlex.join(d["stock_arguments"])
    lines += ["", f"{d['stands_for']} with stock arguments:", f"  vllm serve MODEL {stock}"]
    return "\n".join(lines)


def _requirements(needs: Mapping[str, Any]) -> str:
    parts = [f"vLLM {needs['vllm']}"] if needs["vllm"] else []
    parts += [f"platform {' or '.join(needs['platforms'])}"] if needs["platforms"] else []
    parts += [f"model runner {' or '.join(needs['runners'])}"] if needs["runners"] else []
    return ", ".join(parts) or "any supported vLLM, platform and model runner"


def _option_lines(option: Mapping[str, Any]) -> list[str]:
    default = "required" if option["required"] else f"default {json.dumps(option['default'])}"
    facts = [option["type"], option["bounds"], default]
    facts += ["part of the compile-cache key"] if option["graph"] else []
    head = f"  {option['name']} ({'; '.join(fact for fact in facts if fact)})"
    return [head, *_indented(option["description"])]


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="      ", subsequent_indent="      ")
