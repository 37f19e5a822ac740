"""Bad requests, vanishing clients and a killed engine: a server with plug-ins behaves as stock."""

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.serving import WORKER_PROCESS, served

pytestmark = pytest.mark.serve

PLUGINS = ("--plugin", "sarathi:tbt_slo_ms=200,min_budget=16", "--plugin", "spf")
BAD_BODIES = (
    b"not json",
    b"[]",
    b"{}",
    b'{"prompt": 1}',
    b'{"prompt": [], "max_tokens": 4}',
    b'{"prompt": [99999999], "max_tokens": 4}',
    b'{"prompt": "t1", "max_tokens": -1}',
    b'{"prompt": "t1", "n": 0}',
    b'{"prompt": "t1", "temperature": -3}',
    b'{"prompt": "t1", "model": "nobody"}',
    b'{"prompt": "t1", "vllm_xargs": 5}',
    json.dumps({"prompt": [1] * 3000}).encode(),
)
ENGINE_LOSS_S = 60.0
"""Seconds within which a server ends after its engine was killed; stock takes under five."""


def post(server, body: bytes) -> tuple[int, str]:
    """Return the status and the error's type; 0 where the connection broke."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/v1/completions", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, ""
    except urllib.error.HTTPError as error:
        return error.code, str(json.loads(error.read())["error"]["type"])
    except (urllib.error.URLError, ConnectionError) as error:
        return 0, type(error).__name__


def body_of(server, tokens: int, **more) -> bytes:
    body = {"model": server.model, "prompt": "t1 t2 t3", "max_tokens": tokens, "temperature": 0}
    return json.dumps({**body, "ignore_eos": True, **more}).encode()


def wait_until(condition, seconds: float) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "the condition did not come true in time"
        time.sleep(0.05)
    return time.monotonic() - start


@contextmanager
def streaming(server):
    """Send a request over a bare socket; it closes in mid-stream, after the first bytes came."""
    host, port = server.url.removeprefix("http://").split(":")
    body = body_of(server, 1500, stream=True)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert connection.recv(200).startswith(b"HTTP/1.1 200")
        yield


def engine_process(server) -> int:
    """Return the id of the engine's process, found by name among the server's children."""
    (task,) = Path(f"/proc/{server.process.pid}/task").glob(f"{server.process.pid}/children")
    for child in task.read_text().split():
        if b"EngineCore" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise AssertionError(f"no engine among {task.read_text()}")


def faults(model, *arguments: str) -> dict[str, object]:
    """Return what a server does under every fault, in comparable terms."""
    seen: dict[str, object] = {}
    with served(model, *arguments, environment=WORKER_PROCESS) as server:
        seen["bad requests"] = [post(server, body) for body in BAD_BODIES]
        for _ in range(4):
            with streaming(server):
                pass
        wait_until(lambda: server.metric("vllm:num_requests_running") == 0, 30)
        seen["KV usage after hang-ups"] = server.metric("vllm:kv_cache_usage_perc")
        seen["served after faults"] = post(server, body_of(server, 8))
        engine = engine_process(server)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(post, server, body_of(server, 1900, n=8))
            time.sleep(0.3)
            # The stream has begun, and over a thousand steps are left when the engine is killed.
            with streaming(server):
                os.kill(engine, signal.SIGKILL)
                # The class: which of two error texts a client gets is a race in stock itself.
                seen["in flight"] = waiting.result()[0] // 100
        seen["seconds to end"] = wait_until(
            lambda: server.process.poll() is not None, ENGINE_LOSS_S
        )
        seen["exit code"] = server.process.returncode
        seen["said why"] = "EngineDeadError" in server.log
    return seen


def test_every_fault_ends_as_in_stock(tiny_llama):
    stock = faults(tiny_llama)
    plugged = faults(tiny_llama, *PLUGINS)
    seconds = stock.pop("seconds to end"), plugged.pop("seconds to end")
    assert plugged == stock
    assert [status for status, _ in stock["bad requests"]].count(400) >= 8
    assert stock["served after faults"] == (200, "")
    assert stock["KV usage after hang-ups"] == 0
    assert stock["in flight"] != 2
    assert seconds[1] <= seconds[0] + 10
