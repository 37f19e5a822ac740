"""Finding plug-ins through the entry-point group and turning what was asked for into objects."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pydantic import ValidationError

from vllm_plugins.errors import PluginError
from vllm_plugins.plugin import AttentionPlugin, Options, Plugin, SchedulerPlugin
from vllm_plugins.spec import PluginSpec
from vllm_plugins.versions import require_supported_vllm

GROUP = "vllm_plugins.plugins"


@dataclass(frozen=True)
class Enabled:
    """A plug-in that is on, with its validated options."""

    plugin: Plugin
    options: Options


def entry_points() -> dict[str, metadata.EntryPoint]:
    """Return the installed plug-ins' entry points by name, loading none of them.

    Raises:
        PluginError: Two distributions offer the same name.
    """
    return dict(_scanned(metadata.entry_points, tuple(sys.path)))


@lru_cache(maxsize=1)
def _scanned(scan: Callable[..., Any], path: tuple[str, ...]) -> Mapping[str, metadata.EntryPoint]:
    # Every distribution's metadata is read for it, 10 ms each time; who asks for one plug-in after
    # another would pay that for each. Another path, or another way to look, is looked at anew.
    found: dict[str, metadata.EntryPoint] = {}
    for point in scan(group=GROUP):
        if point.name in found and found[point.name].value != point.value:
            raise PluginError(
                f"--plugin {point.name}",
                f"is offered by both {found[point.name].value} and {point.value}",
                "uninstall one of the two packages",
            )
        found[point.name] = point
    return dict(sorted(found.items()))


def load(name: str) -> Plugin:
    """Load one plug-in's declaration.

    Raises:
        PluginError: No such plug-in, its package does not import, or its class is not complete.
    """
    points = entry_points()
    if name not in points:
        close = difflib.get_close_matches(name, points, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        if "/" in name:
            # `vllm serve --plugin spf MODEL`: the flag takes all the words that follow it.
            hint = "a model goes before --plugin; "
        raise PluginError(
            f"--plugin {name}", "no such plug-in", f"{hint}installed: {', '.join(points)}"
        )
    try:
        declaration = points[name].load()
    except Exception as error:
        raise PluginError(
            f"--plugin {name}",
            f"{points[name].value} does not load ({type(error).__name__}: {error})",
            "reinstall the package that provides it",
        ) from error
    if not (isinstance(declaration, type) and issubclass(declaration, Plugin)):
        raise PluginError(
            f"--plugin {name}",
            f"{points[name].value} is not a subclass of vllm_plugins.plugin.Plugin",
            "point the entry point at the plug-in's class",
        )
    missing = ", ".join(sorted(getattr(declaration, "__abstractmethods__", ())))
    if missing:
        raise PluginError(
            f"--plugin {name}",
            f"{points[name].value} leaves out {missing}",
            "complete the plug-in's class",
        )
    return declaration()


def enable(specs: Sequence[PluginSpec]) -> list[Enabled]:
    """Validate what was asked for: names, options, versions and combinations.

    Raises:
        PluginError: The first thing that cannot work.
    """
    version = require_supported_vllm()
    enabled = [_enable_one(spec, version) for spec in specs]
    _check_conflicts(enabled)
    _check_one_order(enabled)
    _check_one_attention(enabled)
    return enabled


def _check_conflicts(enabled: Sequence[Enabled]) -> None:
    names = {item.plugin.name for item in enabled}
    for item in enabled:
        name, conflicts = item.plugin.name, item.plugin.conflicts
        for other in sorted(names & conflicts.keys()):
            raise PluginError(
                f"--plugin {name}",
                f"cannot run beside '{other}' ({conflicts[other]})",
                f"drop {name} or {other}",
            )


def waiting_order_owners(enabled: Sequence[Enabled]) -> list[str]:
    """Return the names of the plug-ins that decide the order of waiting requests."""
    return [
        item.plugin.name
        for item in enabled
        if isinstance(item.plugin, SchedulerPlugin) and item.plugin.orders_waiting(item.options)
    ]


def _check_one_order(enabled: Sequence[Enabled]) -> None:
    """Let one plug-in order the waiting queue, and one more refine its order."""
    owners = waiting_order_owners(enabled)
    refining = {
        item.plugin.name
        for item in enabled
        if isinstance(item.plugin, SchedulerPlugin)
        and item.plugin.refines_order_of & set(owners) - {item.plugin.name}
    }
    for alike in (
        [name for name in owners if name not in refining],
        [name for name in owners if name in refining],
    ):
        if len(alike) > 1:
            raise PluginError(
                f"--plugin {alike[1]}",
                f"orders the waiting queue, and so does '{alike[0]}'",
                "drop one of the two, or the option that makes it order the queue",
            )


def _check_one_attention(enabled: Sequence[Enabled]) -> None:
    names = [item.plugin.name for item in enabled if isinstance(item.plugin, AttentionPlugin)]
    if len(names) > 1:
        raise PluginError(
            f"--plugin {names[1]}",
            f"is an attention backend, and so is '{names[0]}'",
            "drop one of the two",
        )


def unmet_version(plugin: Plugin, version: Version) -> str:
    """Return the range of vLLM that a plug-in needs where this is outside of it, else nothing."""
    wanted = SpecifierSet(plugin.requires.vllm, prereleases=True)
    return "" if Version(version.public) in wanted else str(wanted)


def _enable_one(spec: PluginSpec, version: Version) -> Enabled:
    plugin = load(spec.name)
    wanted = unmet_version(plugin, version)
    if wanted:
        raise PluginError(
            f"--plugin {spec.name}", f"needs vLLM {wanted}, found {version}", "install one of those"
        )
    return Enabled(plugin, validate_options(plugin, spec.options))


def validate_options(plugin: Plugin, values: dict[str, Any]) -> Options:
    """Return the plug-in's options object.

    Raises:
        PluginError: An option is unknown, ill-typed or out of range.
    """
    try:
        return plugin.Options.model_validate(values)
    except ValidationError as error:
        raise _option_error(plugin, error) from None


def _option_error(plugin: Plugin, error: ValidationError) -> PluginError:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    fields = plugin.Options.model_fields
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, fields, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        known = ", ".join(fields) or "none"
        return PluginError(
            f"--plugin {plugin.name}: {key}", "unknown option", f"{hint}options: {known}"
        )
    where = f"--plugin {plugin.name}" + (f": {key}={first['input']}" if key else "")
    message = first["msg"].removeprefix("Value error, ")
    mend = f"see `vllm-plugins describe {plugin.name}`"
    return PluginError(where, message[:1].lower() + message[1:], mend)
