"""``vllm-plugins list``: the installed plug-ins, without importing torch or vLLM."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata

from vllm_plugins.errors import PluginError
from vllm_plugins.registry import entry_points, load

HELP = "List the installed plug-ins."
COLUMNS = ("name", "family", "exactness", "distribution", "summary")


@dataclass(frozen=True)
class Row:
    """One installed plug-in; ``error`` is set where its package does not load."""

    name: str
    family: str = ""
    exactness: str = ""
    summary: str = ""
    distribution: str = ""
    version: str = ""
    error: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``list``."""
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run(args: argparse.Namespace) -> int:
    """Print the plug-ins."""
    found = rows()
    if args.json:
        print(json.dumps([asdict(row) for row in found], indent=1))
    else:
        print(as_text(found))
    return 0


def rows() -> list[Row]:
    """Return a row for each installed plug-in, those that do not load included."""
    return [_row(name, point) for name, point in entry_points().items()]


def _row(name: str, point: metadata.EntryPoint) -> Row:
    distribution, version = source(point)
    try:
        plugin = load(name)
    except PluginError as error:
        return Row(name, distribution=distribution, version=version, error=error.reason)
    return Row(
        name, plugin.family, plugin.exactness, plugin.summary, distribution, version
    )  # fmt: skip


def source(point: metadata.EntryPoint) -> tuple[str, str]:
    """Return the name and version of the distribution that offers an entry point."""
    return (point.dist.name, point.dist.version) if point.dist is not None else ("", "")


def as_text(found: Sequence[Row]) -> str:
    """Return the rows as aligned columns."""
    table = [tuple(column.upper() for column in COLUMNS), *(_cells(row) for row in found)]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS) - 1)]
    lines = [
        "  ".join(
            [cell.ljust(width) for cell, width in zip(line, widths, strict=False)] + [line[-1]]
        )
        for line in table
    ]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    summary = f"does not load: {row.error}" if row.error else row.summary
    return (row.name, row.family, row.exactness, f"{row.distribution} {row.version}", summary)
