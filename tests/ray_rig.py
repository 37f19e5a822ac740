"""A deployment on a Ray cluster of a test's own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.serving import SERVE_DEFAULTS
from vllm_plugins.deploy.calls import CallError, free_port
from vllm_plugins.deploy.router_admin import RouterAdmin, seen
from vllm_plugins.routing import Role

HOST = "127.0.0.1"
NEEDS_RAY = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="ray is not installed: pip install 'ray[serve]'",
)
OUTPUT_TOKENS = 120
SECONDS = 240.0


@dataclass
class Deployed:
    """A running `vllm-plugins deploy`."""

    process: subprocess.Popen[bytes]
    admin: RouterAdmin
    url: str
    model: str
    started: dict[int, psutil.Process]

    def up(self, role: Role) -> list[str]:
        """Return the addresses of the instances of a role that get requests."""
        return [
            one.url for one in seen(self.admin.status()) if one.role is role and one.state == "up"
        ]

    def note_processes(self) -> None:
        """Remember all processes that belong to the deployment now."""
        # Ray's and vLLM's processes write their titles over the environment that would tell; they
        # are below others. Guards are below nobody.
        for one in psutil.process_iter(["environ"]):
            if (one.info["environ"] or {}).get("DEPLOY_TEST") == str(os.getpid()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.started |= {p.pid: p for p in [one, *one.children(recursive=True)]}

    def server_of(self, url: str) -> psutil.Process:
        """Return the leading process of an instance."""
        port = url.rsplit(":", 1)[1]
        (found,) = [
            one
            for one in psutil.process_iter(["cmdline"])
            if {"serve", "--port", port} <= set(one.info["cmdline"] or [])
            and "vllm_plugins.deploy.guard" not in one.info["cmdline"]
        ]
        return found

    def tokens(self, url: str, tokens: list[int], stream: bool) -> list[int]:
        """Ask for an answer, and return its tokens."""
        body = {
            "model": self.model, "prompt": tokens, "max_tokens": OUTPUT_TOKENS, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True, "stream": stream,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            text = answer.read().decode()
        if not stream:
            return json.loads(text)["choices"][0]["token_ids"]
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert lines[-1] == "[DONE]"
        chunks = [json.loads(line) for line in lines[:-1]]
        return [t for chunk in chunks for one in chunk["choices"] for t in one["token_ids"] or []]


@contextlib.contextmanager
def deploying(
    model: Path, folder: Path, words: list[str], serve_args: list[str]
) -> Iterator[Deployed]:
    """Deploy a model, and leave no process behind.

    Args:
        model: Its folder.
        folder: For the log and the operator's key.
        words: Further arguments of `vllm-plugins deploy`.
        serve_args: Further arguments of `vllm serve`.
    """
    key = folder / "admin.key"
    key.write_text("0123456789abcdef")
    port = free_port(HOST)
    command = [
        sys.executable, "-m", "vllm_plugins.cli.main", "deploy", "--ray", str(model), "--address",
        "local", "--device", "cpu", "--num-cpus", "0.1", "--port", str(port), "--admin-key-file",
        str(key), "--drain-s", "20", "--router-args", "--probe-s 0.2", *words, "--serve-args",
        shlex.join((*SERVE_DEFAULTS, *serve_args)),
    ]  # fmt: skip
    log = folder / "deploy.log"
    # Short, as Ray's sockets lie below it.
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short,
        log.open("wb") as stream,
    ):
        own = {"DEPLOY_TEST": str(os.getpid()), "RAY_TMPDIR": short, "RAY_USAGE_STATS_ENABLED": "0"}
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=os.environ | own, start_new_session=True
        )
        url = f"http://{HOST}:{port}"
        made = Deployed(process, RouterAdmin(url, key), url, str(model), {})
        with ended(made):
            wait_for(lambda: "serving on" in log.read_text() or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield made


@contextlib.contextmanager
def ended(made: Deployed) -> Iterator[None]:
    """Leave no process, whatever happens in the block."""
    try:
        yield
    finally:
        made.note_processes()
        for one in [made.process, *made.started.values()]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                one.kill()
        made.process.wait()


def wait_for(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    """Wait until something holds; what cannot be asked yet does not hold."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(CallError):
            if condition():
                return
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.1)


def busy(deployed: Deployed, url: str, requests: int) -> Callable[[], bool]:
    """Return whether an instance has so many requests, by what the router sent."""

    def has_them() -> bool:
        shown = deployed.admin.status()["instances"]
        return any(one["url"] == url and one["requests"] >= requests for one in shown)

    return has_them


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def alive(process: psutil.Process) -> bool:
    """Return whether a process runs."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
