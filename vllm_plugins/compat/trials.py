"""How a plug-in is tried where its defaults, or the tiny text model, do not do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_plugins.spec import PluginSpec

DRAFTER = str(Path(".cache/models/tiny-llava-128-2-1024-drafter").resolve())
"""What examples/models/drafter.py makes for the tiny model that reads images."""
# Options without a default, and one whose default needs more layers than the tiny model has.
OPTIONS: dict[str, dict[str, Any]] = {
    "dynamic_llava": {"prune_layer": 1},
    "epd": {"role": "colocated"},
    "pd": {"role": "both"},
    "specvlm": {"model": DRAFTER},
}
# Engine arguments under which outputs are stock's for a prompt of 150 tokens: zipcache leaves alone
# what stays within one block.
EXACT_WITH: dict[str, dict[str, Any]] = {"zipcache": {"block_size": 256}}
# Plug-ins for models that read images.
VISION = frozenset({"dynamic_llava", "epd", "specvlm"})


def spec(name: str) -> PluginSpec:
    """Return what is asked for when a plug-in is tried."""
    return PluginSpec(name, dict(OPTIONS.get(name, {})))


def flag_word(name: str) -> str:
    """Return the same as a word of ``--plugin``."""
    options = ",".join(f"{key}={value}" for key, value in OPTIONS.get(name, {}).items())
    return f"{name}:{options}" if options else name


def exact_with(names: Sequence[str]) -> dict[str, Any]:
    """Return the engine arguments under which these plug-ins' outputs are stock's."""
    return {k: v for name in names for k, v in EXACT_WITH.get(name, {}).items()}


def needs_vision(names: Sequence[str]) -> bool:
    """Whether one of these plug-ins needs a model that reads images."""
    return not VISION.isdisjoint(names)
