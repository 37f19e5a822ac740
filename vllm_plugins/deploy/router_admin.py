"""The router's routes for operators, from outside: what instances it has, and changes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_plugins.deploy.calls import CallError, call
from vllm_plugins.deploy.launch import read_key
from vllm_plugins.deploy.members import Seen, Step
from vllm_plugins.router.admin import KEY_HEADER
from vllm_plugins.routing import Role, State


class RouterAdmin:
    """A client of one router; its methods block for a few seconds at most.

    Args:
        url: Base address of the router.
        key_file: Holds the operator's key.

    Raises:
        PluginError: The key cannot be read.
    """

    def __init__(self, url: str, key_file: Path) -> None:
        self._url = url
        self._headers = {KEY_HEADER: read_key(key_file)}

    def status(self) -> dict[str, Any]:
        """Return what the router's status page shows: queues by role, and instances.

        Raises:
            CallError: The router does not answer, or refuses the key.
        """
        values = json.loads(call(f"{self._url}/status.json", headers=self._headers))
        if not isinstance(values, dict):
            raise CallError("the router's status is no object")
        return values

    def take(self, step: Step) -> None:
        """Do one step.

        Raises:
            CallError: The router does not answer, or refuses.
        """
        body = {"url": step.url, "role": step.role.value} if step.verb == "add" else None
        method, path = {
            "add": ("POST", "/instances"),
            "drain": ("POST", f"/instances/{step.id}/drain"),
            "resume": ("POST", f"/instances/{step.id}/resume"),
            "remove": ("DELETE", f"/instances/{step.id}"),
        }[step.verb]
        call(self._url + path, method, body, self._headers)


def seen(status: dict[str, Any]) -> Iterator[Seen]:
    """Yield the instances of a router's status."""
    for one in status.get("instances", []):
        yield Seen(one["id"], one["url"], Role(one["role"]), State(one["state"]))
