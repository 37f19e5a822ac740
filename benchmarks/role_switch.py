"""How long an instance takes to change its role under load.

    python benchmarks/role_switch.py MODEL [--switches 12] [--out FILE.json]

Three instances of either role stand behind `vllm-plugins route --roles soft`, of which one decodes
at first. Load turns from long answers to short prompts into short answers to long prompts and back:
each time the router moves an instance to where the queue is. `/instances` is asked every 20 ms. A
change lasts from when an instance was last seen with new requests in its old role to when it was
first seen in the new one, so that what it had begun is part of it, and an error of up to 40 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from one_core import one_core_each

from vllm_plugins.bench.machine import describe_machine
from vllm_plugins.bench.process import logged_process
from vllm_plugins.bench.server import free_port, serve

SERVE = ("--max-model-len", "2048", "--enforce-eager", "--max-num-seqs", "2", "--dtype", "float32",
         "--plugin", "pd:role=both,min_pull_tokens=1")  # fmt: skip
SOFT = ("--roles", "soft", "--interval-s", "1", "--cooldown-s", "1", "--drain-s", "30")
# Tokens of the prompts and of the answers, by the role that they keep busy.
LOADS = {"decode": (40, 120), "prefill": (1500, 1)}
CLIENTS, POLL_S, LONGEST_S, START_S = 24, 0.02, 120.0, 300.0


@dataclass
class Fleet:
    """Instances behind a router.

    Attributes:
        url: The router's address.
        model: What they serve.
        changes: Instance, role and seconds of each change that was seen.
    """

    url: str
    model: str
    changes: list[tuple[str, str, float]] = field(default_factory=list)

    def watch(self, ended: threading.Event) -> None:
        """Note changes of role until the end."""
        roles = {name: role for name, role, _ in self._shown()}
        up = dict.fromkeys(roles, time.monotonic())
        while not ended.wait(POLL_S):
            asked = time.monotonic()
            for name, role, state in self._shown():
                if role != roles[name]:
                    self.changes.append((name, role, time.monotonic() - up[name]))
                    roles[name] = role
                if state == "up":
                    up[name] = asked

    def _shown(self) -> list[tuple[str, str, str]]:
        with urllib.request.urlopen(f"{self.url}/instances", timeout=30) as answer:
            listed = json.load(answer)["instances"]
        return [(one["id"], one["role"], one["state"]) for one in listed]

    def keep_busy(self, role: str, seed: int, ended: threading.Event) -> int:
        """Send requests one after another that a role has to work on; return how many."""
        draw, (length, wanted) = random.Random(seed), LOADS[role]
        sent = 0
        while not ended.is_set():
            prompt = [draw.randrange(5, 400) for _ in range(length)]
            body = {"model": self.model, "prompt": prompt, "max_tokens": wanted, "temperature": 0,
                    "ignore_eos": True}  # fmt: skip
            request = urllib.request.Request(
                f"{self.url}/v1/completions", json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )  # fmt: skip
            with urllib.request.urlopen(request, timeout=300) as answer:
                json.load(answer)
            sent += 1
        return sent


@contextmanager
def fleet(model: str) -> Iterator[Fleet]:
    """Run three instances and a router."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        logs = Path(folder)
        with ThreadPoolExecutor(3) as pool:
            starting = [serve(model, SERVE, f"{i}", logs / f"{i}", START_S) for i in range(3)]
            servers = list(pool.map(stack.enter_context, starting))
        first, second, third = (server.url for server in servers)
        port = free_port()
        words = ["--prefill", first, second, "--decode", third, "--port", str(port), *SOFT]
        command = [sys.executable, "-m", "vllm_plugins.cli.main", "route", *words]
        stack.enter_context(logged_process(command, logs / "router"))
        url = f"http://127.0.0.1:{port}"
        _await_router(url)
        yield Fleet(url, servers[0].model)


def _await_router(url: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        time.sleep(0.1)
    raise TimeoutError("the router did not start")


def measure(running: Fleet, switches: int, watching: Future[None]) -> int:
    """Turn the load so often, unless the watch ends; return the requests that were answered."""
    answered = 0
    for number in range(switches):
        role, ended = ("decode", "prefill")[number % 2], threading.Event()
        before = len(running.changes)
        with ThreadPoolExecutor(CLIENTS) as pool:
            seeds = range(CLIENTS * number, CLIENTS * (number + 1))
            clients = [pool.submit(running.keep_busy, role, seed, ended) for seed in seeds]
            deadline = time.monotonic() + LONGEST_S
            while (
                len(running.changes) == before
                and not watching.done()
                and time.monotonic() < deadline
            ):
                time.sleep(POLL_S)
            ended.set()
        answered += sum(map(Future.result, clients))
        print(running.changes[before:], flush=True)
    return answered


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--switches", type=int, default=12)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    one_core_each()
    ended = threading.Event()
    with fleet(args.model) as running, ThreadPoolExecutor(1) as pool:
        watching = pool.submit(running.watch, ended)
        try:
            answered = measure(running, args.switches, watching)
        finally:
            ended.set()
        watching.result()
    found = summary(running.changes) | {"requests": answered}
    print(found)
    if args.out is not None:
        result = {"command": shlex.join(["python", *sys.argv]), "machine": describe_machine(),
                  "load_average": os.getloadavg(), "result": found}  # fmt: skip
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def summary(changes: Sequence[tuple[str, str, float]]) -> dict[str, Any]:
    """Return all times by the new role, with least, median and most."""
    found: dict[str, Any] = {}
    for role in LOADS:
        seconds = [round(took, 3) for _, new, took in changes if new == role]
        if seconds:
            found[f"to {role}"] = {"n": len(seconds), "least_s": min(seconds),
                                   "median_s": statistics.median(seconds), "most_s": max(seconds),
                                   "all_s": seconds}  # fmt: skip
    return found


if __name__ == "__main__":
    raise SystemExit(main())
