"""Measure the source against the project's norms; fail on a breach that is not excepted.

    python scripts/check_norms.py [--report]

An exception stands in `norms_exceptions.toml` with a date and a reason. The list may only shrink:
one that is no longer needed is an error, so it goes in the change that made it needless.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import sys
import tokenize
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXCEPTIONS = Path(__file__).with_name("norms_exceptions.toml")
# The package; tests and examples keep only the length norms.
PACKAGE = ("vllm_plugins", "schedulers", "attention_backends", "kv_connectors", "spec_decode",
           "visual_tokens", "expert_offload", "quantization", "models", "patches")  # fmt: skip
LENGTH_ONLY = ("scripts", "examples", "tests")
SKIPPED_FOLDERS = {"__pycache__", ".venv", ".cache", "build"}

MEDIAN_LINES, P90_LINES, MAX_LINES = 10, 35, 80
FILE_LINES = 400
COMMENTS_PER_100 = (5.0, 10.0)


@dataclass(frozen=True)
class Function:
    """One function or method; lines from `def` to its end, decorators not counted."""

    name: str
    lines: int


@dataclass(frozen=True)
class Measured:
    """What one file measures.

    Attributes:
        undocumented: Modules, classes and public functions without a docstring.
        unannotated: Functions with a parameter or a result that has no annotation.
    """

    path: str
    lines: int
    code_lines: int
    comments: int
    functions: tuple[Function, ...]
    undocumented: tuple[str, ...]
    unannotated: tuple[str, ...]


@dataclass(frozen=True)
class Breach:
    """A norm that does not hold somewhere; `norm` and `where` name it in the exceptions."""

    norm: str
    where: str
    text: str


def measure(source: str, path: str) -> Measured:
    """Measure one file's text."""
    tree = ast.parse(source)
    named = list(_definitions(tree, ""))
    functions = [(name, node) for name, node in named if not isinstance(node, ast.ClassDef)]
    undocumented = [] if ast.get_docstring(tree) is not None else ["module"]
    undocumented += [
        name
        for name, node in named
        if ast.get_docstring(node) is None and _needs_docstring(name, node)
    ]
    comments = sum(
        token.type == tokenize.COMMENT
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
    )
    return Measured(
        path,
        len(source.splitlines()),
        sum(bool(line.strip()) for line in source.splitlines()),
        comments,
        tuple(Function(name, _length(node)) for name, node in functions),
        tuple(undocumented),
        tuple(name for name, node in functions if not _annotated(node, "." in name)),
    )


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            name = f"{prefix}{child.name}"
            yield name, child
            yield from _definitions(child, f"{name}.")
        else:
            yield from _definitions(child, prefix)


def _needs_docstring(name: str, node: Definition) -> bool:
    """Every class, and every function that callers of its module or class may see."""
    private = any(part.startswith("_") for part in name.split("."))
    local = isinstance(node, ast.FunctionDef) and "." in name and not _is_method(name)
    return not local and (isinstance(node, ast.ClassDef) or not private)


def _is_method(name: str) -> bool:
    """Whether the name's owner is a class, by the convention that classes are capitalised."""
    return name.split(".")[-2].lstrip("_")[:1].isupper()


def _length(node: Definition) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _annotated(node: Definition, inner: bool) -> bool:
    assert not isinstance(node, ast.ClassDef)
    spec = node.args
    parameters = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
    parameters += [extra for extra in (spec.vararg, spec.kwarg) if extra is not None]
    if inner and parameters and parameters[0].arg in ("self", "cls"):
        parameters = parameters[1:]
    return node.returns is not None and all(p.annotation is not None for p in parameters)


def breaches(files: Iterable[Measured], length_only: Iterable[Measured] = ()) -> list[Breach]:
    """Return what breaks a norm; medians and percentiles are over all functions of `files`."""
    package = list(files)
    found = list(_percentiles([f.lines for item in package for f in item.functions]))
    for item in [*package, *length_only]:
        found += _lengths(item)
    for item in package:
        for name in item.undocumented:
            found.append(Breach("docstring", f"{item.path}:{name}", "has no docstring"))
        for name in item.unannotated:
            found.append(Breach("annotation", f"{item.path}:{name}", "is not fully annotated"))
    return found


def _percentiles(lengths: list[int]) -> Iterator[Breach]:
    median, p90 = quantiles(lengths)
    if median > MEDIAN_LINES:
        yield Breach("function-median", "package", f"is {median:g} lines, over {MEDIAN_LINES}")
    if p90 > P90_LINES:
        yield Breach("function-p90", "package", f"is {p90:g} lines, over {P90_LINES}")


def quantiles(lengths: list[int]) -> tuple[float, float]:
    """Return median and 90th percentile of function lengths, in lines."""
    if len(lengths) < 2:
        return (float(lengths[0]),) * 2 if lengths else (0.0, 0.0)
    return statistics.median(lengths), statistics.quantiles(lengths, n=10)[-1]


def _lengths(item: Measured) -> Iterator[Breach]:
    if item.lines > FILE_LINES:
        yield Breach("file-length", item.path, f"has {item.lines} lines, over {FILE_LINES}")
    for function in item.functions:
        if function.lines > MAX_LINES:
            where = f"{item.path}:{function.name}"
            yield Breach("function-length", where, f"has {function.lines} lines, over {MAX_LINES}")


def judge(found: Iterable[Breach], exceptions: Iterable[dict[str, object]]) -> list[str]:
    """Return what is wrong: breaches that are not excepted, and exceptions that are not needed.

    Args:
        found: Breaches of the norms.
        exceptions: Tables with `norm`, `where`, `date` and `reason`.
    """
    wrong = []
    open_breaches = {(item.norm, item.where): item for item in found}
    for entry in exceptions:
        name = f"{entry.get('norm')} of {entry.get('where')}"
        if not isinstance(entry.get("date"), date) or not str(entry.get("reason", "")).strip():
            wrong.append(f"exception for {name}: needs a date and a reason")
        key = (str(entry.get("norm")), str(entry.get("where")))
        if open_breaches.pop(key, None) is None:
            wrong.append(f"exception for {name}: no longer needed, remove it")
    wrong += [f"{item.norm}: {item.where} {item.text}" for item in open_breaches.values()]
    return wrong


def report(files: list[Measured]) -> str:
    """Return the measurements as text, comment density among them."""
    lengths = [function.lines for item in files for function in item.functions]
    median, p90 = quantiles(lengths)
    comments = sum(item.comments for item in files)
    density = 100 * comments / max(1, sum(item.code_lines for item in files))
    low, high = COMMENTS_PER_100
    longest = max(files, key=lambda item: item.lines)
    return (
        f"{len(files)} files, {len(lengths)} functions\n"
        f"function lines: median {median:g}, p90 {p90:g}, max {max(lengths)}\n"
        f"longest file: {longest.path}, {longest.lines} lines\n"
        f"comments: {density:.1f} per 100 lines (aim: {low:g} to {high:g})"
    )


def measure_folders(root: Path, folders: Iterable[str]) -> list[Measured]:
    """Measure every Python file below these folders."""
    paths = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    names = [path.relative_to(root) for path in paths]
    return [
        measure((root / name).read_text(), name.as_posix())
        for name in names
        if not SKIPPED_FOLDERS & set(name.parts)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Check the project."""
    parser = argparse.ArgumentParser(description="Measure the source against the project's norms.")
    parser.add_argument("--report", action="store_true", help="print the measurements too")
    args = parser.parse_args(arguments)
    package = measure_folders(ROOT, PACKAGE)
    exceptions = tomllib.loads(EXCEPTIONS.read_text()).get("exception", [])
    wrong = judge(breaches(package, measure_folders(ROOT, LENGTH_ONLY)), exceptions)
    if args.report or wrong:
        print(report(package))
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
