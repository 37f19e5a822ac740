"""Run a real `vllm serve` on a free loopback port for the length of a `with` block."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openai import OpenAI
    from prometheus_client.samples import Sample

# Beside the interpreter, so that an environment need not be activated.
VLLM = Path(sys.executable).with_name("vllm")
HOST = "127.0.0.1"
TAIL_LINES = 40


class ServerDiedError(RuntimeError):
    """The server ended, or did not come up in time; the message ends with its last log lines."""


@dataclass
class Server:
    """A running `vllm serve`."""

    process: subprocess.Popen[bytes]
    port: int
    log_file: Path

    @property
    def url(self) -> str:
        """Root of the server, without `/v1`."""
        return f"http://{HOST}:{self.port}"

    @property
    def log(self) -> str:
        """Everything that the server has printed so far."""
        return self.log_file.read_text(errors="replace")

    @cached_property
    def openai(self) -> OpenAI:
        """An OpenAI client of this server that never retries, so that a failure shows."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    @cached_property
    def model(self) -> str:
        """The name under which the server offers its model."""
        return self.openai.models.list().data[0].id

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

    def wait_until_ready(self, seconds: float) -> None:
        """Return when `/health` answers.

        Raises:
            ServerDiedError: the process ended, or time ran out.
        """
        deadline = time.monotonic() + seconds
        while not self._is_healthy():
            if self.process.poll() is not None:
                raise ServerDiedError(f"vllm serve ended ({self.process.returncode}){self._tail()}")
            if time.monotonic() > deadline:
                raise ServerDiedError(f"vllm serve not ready after {seconds:.0f} s{self._tail()}")
            time.sleep(0.2)

    def stop(self, grace_s: float = 30) -> int:
        """Ask the server to end, kill what is left of its process group, return its status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=grace_s)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            self._kill_group()

    def _kill_group(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait()

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _tail(self) -> str:
        lines = self.log.splitlines()[-TAIL_LINES:]
        return "; its last lines:\n" + "\n".join(lines)


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(
    model: Path | str,
    *arguments: str,
    log_file: Path,
    environment: Mapping[str, str] | None = None,
    ready_s: float = 300,
) -> Iterator[Server]:
    """Serve `model`; the process group is gone when the block ends, whatever happened in it.

    Args:
        model: what `vllm serve` is to load.
        *arguments: further arguments of `vllm serve`.
        log_file: where its output goes.
        environment: variables on top of this process's own.
        ready_s: seconds until the start counts as failed.
    """
    port = free_port()
    command = [str(VLLM), "serve", str(model), "--host", HOST, "--port", str(port), *arguments]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    server = Server(process, port, log_file)
    try:
        server.wait_until_ready(ready_s)
        yield server
    finally:
        server.stop()
