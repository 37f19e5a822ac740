"""How plug-ins' options travel to every process: inside vLLM's own ``additional_config``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_plugins.errors import PluginError
from vllm_plugins.registry import Enabled, enable, waiting_order_owners
from vllm_plugins.spec import PluginSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "vllm_plugins"


class PluginSettings(str):
    """All options of all enabled plug-ins; as a string, only those that change the graph.

    vLLM puts the JSON text of ``additional_config`` into its compile-cache key. A scheduler's
    options change no graph and must not cost a recompilation, yet have to reach every process.
    As a JSON value this object is the text of the graph options alone; pickled, copied or printed
    it carries everything. ``docs/adr/0001-settings-in-additional-config.md`` says what else was
    tried.
    """

    options: dict[str, dict[str, Any]]
    from_command: bool
    """Whether a vLLM command is to start the engine, which then refuses without a traceback."""

    def __new__(
        cls, graph: str, options: dict[str, dict[str, Any]], from_command: bool = False
    ) -> PluginSettings:
        """Make the settings from the graph options' text and all options by plug-in name."""
        self = super().__new__(cls, graph)
        self.options = options
        self.from_command = from_command
        return self

    @classmethod
    def of(cls, enabled: Sequence[Enabled]) -> PluginSettings:
        """Collect the options of enabled plug-ins."""
        graph = {item.plugin.name: item.options.graph_values() for item in enabled}
        graph = {name: values for name, values in graph.items() if values}
        options = {item.plugin.name: item.options.model_dump(mode="json") for item in enabled}
        return cls(json.dumps(graph, sort_keys=True), options)

    def __reduce__(
        self,
    ) -> tuple[Any, tuple[str, dict[str, dict[str, Any]], bool]]:
        return (_received, (str(self), self.options, self.from_command))

    def __repr__(self) -> str:
        return repr(self.options)


def _received(graph: str, options: dict[str, dict[str, Any]], from_command: bool) -> PluginSettings:
    """Return settings in the process that they were sent to, which plug-ins enter first.

    Of an engine's processes only the workers know plug-ins otherwise, and the engine's own asks
    vLLM for the model's class.
    """
    for item in enable([PluginSpec(name, values) for name, values in options.items()]):
        item.plugin.enter_process(item.options)
    return PluginSettings(graph, options, from_command)


def requested(additional_config: Any) -> list[PluginSpec]:
    """Return the plug-ins named in ``additional_config``, in whichever form they came.

    Raises:
        PluginError: The entry is not a mapping from plug-in names to options.
    """
    entry = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if entry is None:
        return []
    options = entry.options if isinstance(entry, PluginSettings) else entry
    if not isinstance(options, Mapping) or not all(
        isinstance(value, Mapping) for value in options.values()
    ):
        raise PluginError(
            f"--additional-config {KEY}",
            "is not a mapping from plug-in names to their options",
            'write {"vllm_plugins": {"sarathi": {"tbt_slo_ms": 40}}}',
        )
    return [PluginSpec(name, dict(value)) for name, value in options.items()]


def enabled_plugins(config: VllmConfig) -> list[Enabled]:
    """Return the plug-ins that are on in an engine, in the order they were named.

    Raises:
        PluginError: One of them cannot run in this engine.
    """
    enabled = enable(requested(config.additional_config))
    for item in enabled:
        _check_platform(item, config)
        item.plugin.check(item.options, config)
    _check_order(enabled, config)
    return enabled


def _check_order(enabled: Sequence[Enabled], config: VllmConfig) -> None:
    policy = config.scheduler_config.policy
    for name in waiting_order_owners(enabled) if policy != "fcfs" else []:
        raise PluginError(
            f"--plugin {name}",
            f"orders the waiting queue, and so does --scheduling-policy {policy}",
            f"drop --scheduling-policy or --plugin {name}",
        )


def _check_platform(item: Enabled, config: VllmConfig) -> None:
    from vllm.platforms import current_platform

    requires, where = item.plugin.requires, f"--plugin {item.plugin.name}"
    platform = current_platform.device_type
    if requires.platforms is not None and platform not in requires.platforms:
        names = ", ".join(sorted(requires.platforms))
        raise PluginError(where, f"does not run on '{platform}'", f"use one of: {names}")
    runner = "V2" if config.use_v2_model_runner else "V1"
    if requires.runners is not None and runner not in requires.runners:
        raise PluginError(
            where,
            f"does not support model runner {runner}",
            f"set VLLM_USE_V2_MODEL_RUNNER={int(runner == 'V1')}",
        )
