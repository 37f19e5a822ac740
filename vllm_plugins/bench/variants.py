"""Variants: what each compared server is started with."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_plugins.bench.errors import BenchError

STOCK = "stock"
NO_PLUGIN = "none"
BUDGET_FLAG = "--max-num-batched-tokens"


@dataclass(frozen=True)
class Variant:
    """One way to start the server: a name and the arguments that only this variant gets."""

    name: str
    arguments: tuple[str, ...] = ()


def static_variants(budgets: Sequence[int]) -> list[Variant]:
    """Stock vLLM with its default token budget and with each given one."""
    swept = [Variant(f"{STOCK}-{b}", (BUDGET_FLAG, str(b))) for b in budgets]
    return [Variant(STOCK), *swept]


def plugin_variant(spec: str, extra: str = "") -> Variant | None:
    """The plug-in under test, or None for ``none``.

    Args:
        spec: Value of ``--plugin``.
        extra: Further arguments of ``vllm serve`` for this variant alone.
    """
    if spec == NO_PLUGIN:
        return None
    return Variant(plugin_label(spec), ("--plugin", spec, *shlex.split(extra)))


def plugin_label(spec: str) -> str:
    """Short name of a ``--plugin`` value, for tables."""
    from vllm_plugins.spec import parse_specs

    return "+".join(parsed.name for parsed in parse_specs([spec]))


def named_variant(text: str) -> Variant:
    """Read ``name=extra arguments of vllm serve``.

    Raises:
        BenchError: There is no name.
    """
    name, equals, arguments = text.partition("=")
    if not name.strip() or not equals:
        raise BenchError(f"--variant {text!r}: write name='arguments of vllm serve'")
    return Variant(name.strip(), tuple(shlex.split(arguments)))


def check_names(variants: Sequence[Variant]) -> None:
    """Refuse two variants of one name, whose results could not be told apart."""
    names = [variant.name for variant in variants]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BenchError(f"two variants are named '{twice[0]}': give --variant another name")


def alternate(variants: Sequence[Variant], rounds: int) -> list[list[Variant]]:
    """Order of servers per round: as given, then reversed, and so on (ABBA).

    A drift of the machine then falls on both sides of each pair alike.
    """
    there, back = list(variants), list(reversed(variants))
    return [there if i % 2 == 0 else back for i in range(rounds)]
