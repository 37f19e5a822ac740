"""Plug-ins that tests offer through entry points of their own."""

from importlib import metadata
from typing import ClassVar

import pytest
from pydantic import Field

from vllm_plugins.plugin import Options, Plugin, Requirements, SchedulerPlugin, WorkerPlugin
from vllm_plugins.registry import GROUP


class GraphOptions(Options):
    """One option that changes the graph, and one that does not."""

    rank: int = Field(4, ge=1, le=8, json_schema_extra={"graph": True})
    label: str = "x"


class GraphPlugin(Plugin):
    """Has an option that takes part in the compile-cache key."""

    name = "graphy"
    family = "quantization"
    summary = "A fake."
    exactness = "exact"
    Options: ClassVar[type[Options]] = GraphOptions


class LonerPlugin(Plugin):
    """Does not run beside Sarathi."""

    name = "loner"
    family = "scheduler"
    summary = "A fake."
    exactness = "exact"
    conflicts: ClassVar[dict[str, str]] = {"sarathi": "both own the step"}


class CudaPlugin(Plugin):
    """Runs on one platform only."""

    name = "cudaonly"
    family = "attention backend"
    summary = "A fake."
    exactness = "exact"
    requires = Requirements(platforms=frozenset({"cuda", "rocm"}))


class RunnerV2Plugin(Plugin):
    """Supports only the new model runner."""

    name = "newrunner"
    family = "attention backend"
    summary = "A fake."
    exactness = "exact"
    requires = Requirements(runners=frozenset({"V2"}))


class NewerPlugin(Plugin):
    """Needs a vLLM that does not exist yet."""

    name = "newer"
    family = "attention backend"
    summary = "A fake."
    exactness = "exact"
    requires = Requirements(vllm=">=99")


class SchedulerSetter(Plugin):
    """Claims the scheduler class for something else."""

    name = "setter"
    family = "scheduler"
    summary = "A fake."
    exactness = "exact"

    def configure(self, options, arguments):
        arguments.set("scheduler_cls", "some.other.Scheduler")


NOT_A_PLUGIN = {"a": "dictionary"}


class WithoutPolicy(SchedulerPlugin):
    name = "without_policy"
    summary = "Leaves out what a scheduler plug-in is for."
    exactness = "exact"


class WithoutListener(WorkerPlugin):
    name = "without_listener"
    family = "kv connector"
    summary = "Leaves out what a worker plug-in is for."
    exactness = "exact"


def offer(patch: pytest.MonkeyPatch, **plugins: str) -> None:
    """Add entry points, name=value, to those that are installed.

    A value without a colon is an attribute of this module.
    """
    stock = metadata.entry_points
    added = [
        metadata.EntryPoint(name, value if ":" in value else f"{__name__}:{value}", GROUP)
        for name, value in plugins.items()
    ]

    def entry_points(**wanted):
        found = stock(**wanted)
        return [*found, *added] if wanted.get("group") == GROUP else found

    patch.setattr(metadata, "entry_points", entry_points)
