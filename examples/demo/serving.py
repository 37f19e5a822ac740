"""A real `vllm serve` for the length of a `with` block, with its client and its metrics."""

from __future__ import annotations

import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_plugins.bench.server import Server, serve

if TYPE_CHECKING:
    from openai import OpenAI
    from prometheus_client.samples import Sample


@dataclass
class Served:
    """A running server."""

    server: Server

    @property
    def url(self) -> str:
        """Root of the server, without `/v1`."""
        return self.server.url

    @property
    def model(self) -> str:
        """The name under which the server offers its model."""
        return self.server.model

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The leading process; its group holds the engine and the workers."""
        return self.server.process

    @property
    def log(self) -> str:
        """Everything that the server has printed so far."""
        return self.server.log.read_text(errors="replace")

    @cached_property
    def openai(self) -> OpenAI:
        """An OpenAI client of this server that never retries, so that a failure shows."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def metrics(self) -> list[Sample]:
        """Return the samples of the server's `/metrics`."""
        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as reply:
            families = text_string_to_metric_families(reply.read().decode())
        return [sample for family in families for sample in family.samples]

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples called `name` that carry these labels.

        Raises:
            KeyError: there is none.
        """
        values = [
            sample.value
            for sample in self.metrics()
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        if not values:
            raise KeyError(f"{self.url}/metrics has no {name} with labels {labels}")
        return sum(values)


@contextmanager
def serving(
    model: Path | str, *arguments: str, label: str, log: Path, ready_s: float = 300
) -> Iterator[Served]:
    """Serve `model` on a free loopback port; its processes are gone when the block ends.

    Args:
        model: what `vllm serve` is to load.
        *arguments: further arguments of `vllm serve`.
        label: name of this server in messages.
        log: file for its output.
        ready_s: seconds until the start counts as failed.

    Raises:
        ProcessFailedError: it ended or did not get ready; the message holds the log's tail.
    """
    with serve(str(model), arguments, label, log, ready_s) as server:
        served = Served(server)
        try:
            yield served
        finally:
            if "openai" in vars(served):
                served.openai.close()
