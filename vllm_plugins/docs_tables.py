"""Fills the generated tables of documentation pages from what plug-ins declare.

    python -m vllm_plugins.docs_tables README.md docs/*.md

replaces what stands between ``<!-- options:NAME -->`` and ``<!-- /options:NAME -->``, and likewise
``metrics:NAME``, with the table of that plug-in, ``metrics:core`` with the metrics that belong to
none, and ``plugins`` with the list of the plug-ins of this package. A package with plug-ins of its
own can run it over its own pages. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vllm_plugins.cli.describe import metrics_of, option_table
from vllm_plugins.compat.combinations import own_plugins
from vllm_plugins.errors import PluginError
from vllm_plugins.metrics import ACTIVE, PREFIX
from vllm_plugins.plugin import Plugin
from vllm_plugins.registry import load

BLOCK = re.compile(
    r"(?P<begin><!-- (?P<what>options|metrics|plugins)(?P<name>:[\w-]+)? -->\n)"
    r".*?(?P<end><!-- /(?P=what)(?P=name)? -->)",
    re.DOTALL,
)
CORE = "core"


def fill(text: str) -> str:
    """Return a page's text with every generated table written anew.

    Raises:
        PluginError: A table is for a plug-in that is not installed.
    """
    return BLOCK.sub(lambda m: f"{m['begin']}{table(m['what'], m['name'])}{m['end']}", text)


def table(what: str, name: str | None) -> str:
    """Return one generated table, as Markdown."""
    of = (name or "").removeprefix(":")
    if what == "plugins":
        return plugin_rows()
    if not of:
        raise PluginError(f"<!-- {what} -->", "names no plug-in", f"write <!-- {what}:NAME -->")
    if what == "options":
        return option_rows(load(of))
    return metric_rows(core_metrics() if of == CORE else metrics_of(load(of)))


def plugin_rows() -> str:
    """Return name, summary, family and exactness of this package's plug-ins, as a table."""
    head = ("Plug-in", "What it does", "Family", "Outputs")
    rows = [
        (f"[{plugin.name}]({_folder(plugin)}/README.md)", plugin.summary, plugin.family,
         plugin.exactness)
        for plugin in map(load, own_plugins())
    ]  # fmt: skip
    return _markdown(head, rows)


def _folder(plugin: Plugin) -> str:
    # The folders at the root of the repository are the subpackages.
    return "/".join(type(plugin).__module__.split(".")[1:-1])


def option_rows(plugin: Plugin) -> str:
    """Return the table of a plug-in's options."""
    head = ("Option", "Type", "Default", "Meaning")
    return _markdown(head, [_option(option) for option in option_table(plugin.Options)])


def _option(option: Mapping[str, Any]) -> tuple[str, ...]:
    kind = ", ".join(part for part in (option["type"], option["bounds"]) if part)
    default = "required" if option["required"] else f"`{json.dumps(option['default'])}`"
    meaning = option["description"]
    if option["graph"]:
        meaning += " Part of the compile-cache key."
    return (f"`{option['name']}`", kind, default, meaning)


def core_metrics() -> list[dict[str, str]]:
    """Return the metrics that every engine with a plug-in has."""
    text = f"{ACTIVE.help} Label `{ACTIVE.label}`: its name."
    return [{"name": PREFIX + ACTIVE.name, "kind": ACTIVE.kind, "help": text}]


def metric_rows(metrics: Iterable[Mapping[str, str]]) -> str:
    """Return the table of metrics."""
    rows = [(f"`{metric['name']}`", metric["kind"], metric["help"]) for metric in metrics]
    return _markdown(("Metric", "Type", "Meaning"), rows)


def _markdown(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def main() -> int:
    """Rewrite the pages that changed and print their names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("pages", nargs="+", type=Path, help="Markdown files")
    for page in parser.parse_args().pages:
        text = page.read_text()
        filled = fill(text)
        if filled != text:
            page.write_text(filled)
            print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
