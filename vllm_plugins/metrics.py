"""Metrics of plug-ins, written in the engine's process and read by the server's ``/metrics``.

The engine runs in a process of its own, and the statistics that it sends to the front end have
no room for others. So an engine writes its values into memory-mapped files in the format of
prometheus_client's multi-process mode (no lock, no system call per value), and the front end
registers a collector over those files. When vLLM itself is in multi-process mode (several API
servers) the files lie in its own directory and its own ``/metrics`` picks them up.
"""

from __future__ import annotations

import bisect
import functools
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from prometheus_client.mmap_dict import MmapedDict

PREFIX = "vllm_plugins:"
VLLM_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
OWN_DIRECTORY = "VLLMPLUGINS_METRICS_DIR"

# Step times from a tiny model on an accelerator to a long prompt on a small CPU.
SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5,
                   0.75, 1.0, 2.0, 5.0, 10.0)  # fmt: skip
TOKEN_BUCKETS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class MetricSpec:
    """A metric that a plug-in writes.

    Args:
        name: Without the prefix; counters end in ``_total``.
        kind: Prometheus type.
        help: One sentence with the unit.
        buckets: Upper bounds of a histogram.
        label: Name of the one label that the metric has besides engine and model.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    buckets: Sequence[float] = ()
    label: str = ""


ACTIVE = MetricSpec(
    "active", "gauge", "1 for each plug-in that is on in this engine.", (), "plugin"
)

_directory: tempfile.TemporaryDirectory[str] | None = None
_published = False


def metrics_directory() -> Path:
    """Return the directory of this server's metric files, made on first use."""
    for name in (VLLM_DIRECTORY, OWN_DIRECTORY):
        if name in os.environ:
            return Path(os.environ[name])
    return _own_directory()


def _own_directory() -> Path:
    """Return the directory that this process has made, or makes now."""
    global _directory
    if _directory is None:
        _directory = tempfile.TemporaryDirectory(prefix="vllm-plugins-metrics-")
    # Child processes inherit the environment, which is how an engine finds its server.
    os.environ[OWN_DIRECTORY] = _directory.name
    return Path(_directory.name)


def publish_in_this_process() -> None:
    """Make this process's default Prometheus registry show the plug-ins' metrics."""
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    global _published
    if VLLM_DIRECTORY not in os.environ and not _published:
        # Not the one that a server inherits from a parent with plug-ins, whose values are not its
        # own.
        REGISTRY.register(MultiProcessCollector(None, str(_own_directory())))
        _published = True


class Metrics:
    """Writer of one engine's metrics; one instance per engine process.

    Args:
        specs: What may be written; any other name is an error.
        labels: Labels that every value carries.
    """

    def __init__(self, specs: Iterable[MetricSpec], labels: Mapping[str, str]) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._labels = dict(labels)
        self._slots: dict[tuple[str, str], _Slot] = {}
        # Everything exists from the start: a series that appears late hides its first increase.
        for spec in self._specs.values():
            if not spec.label:
                for label in (*map(_bound, spec.buckets), "+Inf", "sum") if spec.buckets else ("",):
                    self._slot(spec.name, label)

    def inc(self, name: str, amount: float = 1.0, label: str = "") -> None:
        """Add to a counter."""
        slot = self._slot(name, label)
        slot.write(slot.value + amount)

    def set(self, name: str, value: float, label: str = "") -> None:
        """Set a gauge."""
        self._slot(name, label).write(value, time.time())

    def observe(self, name: str, value: float) -> None:
        """Add an observation to a histogram."""
        buckets = self._specs[name].buckets
        i = bisect.bisect_left(buckets, value)
        bound = _bound(buckets[i]) if i < len(buckets) else "+Inf"
        bucket, total = self._slot(name, bound), self._slot(name, "sum")
        bucket.write(bucket.value + 1)
        total.write(total.value + value)

    def observe_counts(self, name: str, counts: Sequence[int], total: float) -> None:
        """Add observations to a histogram that were counted elsewhere.

        Args:
            name: The histogram.
            counts: Observations in each bucket, and last those above all bounds.
            total: Sum of their values.
        """
        bounds = (*map(_bound, self._specs[name].buckets), "+Inf")
        for bound, count in zip(bounds, counts, strict=True):
            if count:
                bucket = self._slot(name, bound)
                bucket.write(bucket.value + count)
        slot = self._slot(name, "sum")
        slot.write(slot.value + total)

    def _slot(self, name: str, label: str) -> _Slot:
        slot = self._slots.get((name, label))
        if slot is None:
            slot = self._slots[name, label] = self._new_slot(self._specs[name], label)
        return slot

    def _new_slot(self, spec: MetricSpec, label: str) -> _Slot:
        from prometheus_client.mmap_dict import mmap_key

        sample, labels = PREFIX + spec.name, dict(self._labels)
        # The exposition format adds a counter's suffix to its family's name again.
        full = sample.removesuffix("_total")
        if spec.kind == "histogram":
            sample = full + ("_sum" if label == "sum" else "_bucket")
            if label != "sum":
                labels["le"] = label
        elif spec.label:
            labels[spec.label] = label
        key = mmap_key(full, sample, list(labels), list(labels.values()), spec.help)
        return _Slot(self._file(spec.kind), key)

    def _file(self, kind: str) -> MmapedDict:
        stem = "gauge_mostrecent" if kind == "gauge" else kind
        # The suffix keeps apart from a file that prometheus_client itself may write here.
        return _open_file(str(metrics_directory() / f"{stem}_{os.getpid()}-plugins.db"))


@functools.cache
def _open_file(path: str) -> MmapedDict:
    """Open a metric file once in a process: two views of one would overwrite each other's."""
    from prometheus_client.mmap_dict import MmapedDict

    return MmapedDict(path)


class _Slot:
    """One value in a metric file, with a copy here so that adding needs no read."""

    __slots__ = ("_file", "_key", "value")

    def __init__(self, file: MmapedDict, key: str) -> None:
        self._file = file
        self._key = key
        self.value: float = file.read_value(key)[0]

    def write(self, value: float, timestamp: float = 0.0) -> None:
        self.value = value
        self._file.write_value(self._key, value, timestamp)


def _bound(value: float) -> str:
    return str(float(value))


def engine_labels(config: Any) -> dict[str, str]:
    """Return the labels that vLLM's own engine metrics carry."""
    return {
        "model_name": str(config.model_config.served_model_name),
        "engine": str(config.parallel_config.data_parallel_index),
    }
