"""Starts ``vllm serve`` on a free loopback port and stops it with all its processes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_plugins.bench.errors import ProcessFailedError
from vllm_plugins.bench.process import logged_process

HOST = "127.0.0.1"
VLLM = (sys.executable, "-m", "vllm_plugins.bench.vllm_command")
POLL_S = 0.25


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: Base address.
        model: Name under which the model is served.
        label: Name of the variant, for messages.
        log: Its log file.
        process: Its leading process.
        startup_s: Time from start to healthy.
    """

    url: str
    model: str
    label: str
    log: Path
    process: subprocess.Popen[bytes]
    startup_s: float

    def check(self) -> None:
        """Raise when the server has died.

        Raises:
            ProcessFailedError: It has, with the tail of its log.
        """
        code = self.process.poll()
        if code is not None:
            raise ProcessFailedError(
                f"the server of '{self.label}' died with exit code {code}", self.log
            )

    def max_model_len(self) -> int:
        """Ask for the longest prompt plus output that the server accepts, in tokens."""
        answer = self._ask("/v1/models")
        return int(answer["data"][0]["max_model_len"])

    def warm_up(self, lengths: Sequence[int], output_tokens: int = 8) -> None:
        """Send prompts of the given lengths at once, so that first-time costs fall here.

        Raises:
            ProcessFailedError: The server has died or refuses them.
        """
        bodies = [
            {
                "model": self.model,
                # Token ids that every vocabulary has; different first ids defeat prefix caching.
                "prompt": [3 + (i + j) % 200 for j in range(length)],
                "max_tokens": output_tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            for i, length in enumerate(lengths)
        ]
        with ThreadPoolExecutor(len(bodies)) as pool:
            list(pool.map(lambda body: self._ask("/v1/completions", body), bodies))

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            return _request(f"{self.url}{path}", body)
        except OSError as error:
            self.check()
            raise ProcessFailedError(
                f"the server of '{self.label}' did not answer {path}: {error}", self.log
            ) from None


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(
    model: str, arguments: Sequence[str], label: str, log: Path, timeout_s: float
) -> Iterator[Server]:
    """Run ``vllm serve`` until the block ends.

    Args:
        model: Model path or name.
        arguments: Further arguments of ``vllm serve``.
        label: Name of the variant, for messages.
        log: File for the server's output.
        timeout_s: Longest wait for the server to get healthy.

    Raises:
        ProcessFailedError: It ended or did not get healthy in time.
    """
    port = free_port()
    command = [*VLLM, "serve", model, "--host", HOST, "--port", str(port), *arguments]
    with logged_process(command, log) as process:
        url = f"http://{HOST}:{port}"
        waited = _wait_until_healthy(url, process, label, log, timeout_s)
        yield Server(url, model, label, log, process, waited)


def _wait_until_healthy(
    url: str, process: subprocess.Popen[bytes], label: str, log: Path, timeout_s: float
) -> float:
    start = time.monotonic()
    while not _is_healthy(url):
        if process.poll() is not None:
            code = process.returncode
            raise ProcessFailedError(
                f"the server of '{label}' did not start (exit code {code})", log
            )
        if time.monotonic() - start > timeout_s:
            raise ProcessFailedError(
                f"the server of '{label}' was not healthy after {timeout_s:.0f} s "
                "(--start-timeout)",
                log,
            )
        time.sleep(POLL_S)
    return time.monotonic() - start


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _request(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        parsed: dict[str, Any] = json.load(answer)
        return parsed
