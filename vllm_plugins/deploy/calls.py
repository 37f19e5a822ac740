"""Short HTTP calls of a deployment to its own servers."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from vllm_plugins.router.observed import Observed, parse_metrics

# Metrics of a server with many label values are some hundred kB.
MAX_ANSWER_BYTES = 16 << 20
TIMEOUT_S = 5.0
# A proxy of the environment has no way to these servers.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class CallError(Exception):
    """A server did not answer, or refused.

    Args:
        reason: What happened.
        status: HTTP status; 0 where there was no answer.
    """

    def __init__(self, reason: str, status: int = 0) -> None:
        super().__init__(reason)
        self.status = status


def call(
    url: str,
    method: str = "GET",
    body: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """Send a request and return the answer; blocks for at most about 5 s.

    Args:
        url: Whole address.
        method: Of HTTP.
        body: Sent as JSON.
        headers: Beside those of JSON.

    Raises:
        CallError: There was no answer, or one above 299.
    """
    data = None if body is None else json.dumps(body).encode()
    wanted = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, data, wanted, method=method)
    try:
        with _OPENER.open(request, timeout=TIMEOUT_S) as answer:
            return bytes(answer.read(MAX_ANSWER_BYTES))
    except urllib.error.HTTPError as error:
        text = error.read(500).decode(errors="replace")
        raise CallError(f"{error.code}: {text}", error.code) from None
    except OSError as error:
        raise CallError(str(error)) from None


def is_healthy(url: str) -> bool:
    """Return whether a server's ``/health`` says so."""
    try:
        call(f"{url}/health")
    except CallError:
        return False
    return True


def observe(url: str) -> Observed:
    """Return what a server's ``/metrics`` say.

    Raises:
        CallError: There was no answer.
    """
    return parse_metrics(call(f"{url}/metrics"))


def is_idle(url: str) -> bool:
    """Return whether an instance has no requests, and no KV that others have yet to pull."""
    try:
        seen = observe(url)
    except CallError:
        return False
    return not (seen.running or seen.waiting or seen.held_blocks)


def free_port(host: str) -> int:
    """Return a port that nobody listens on at an address of this host."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
