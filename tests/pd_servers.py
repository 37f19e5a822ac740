"""Prefill and decode instances as real servers, and requests that go through both."""

import contextlib
import copy
import json
import os
import random
import re
import signal
import sys
import time
import urllib.parse
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.serving import Served, served
from vllm_plugins.bench.process import logged_process
from vllm_plugins.bench.server import free_port
from vllm_plugins.kv_connectors.pd.reference import KEY
from vllm_plugins.wire.address import Address

# Blocks of 32 tokens and chunks of 128, so that short prompts have several of both.
COMMON = ("--block-size", "32", "--max-num-batched-tokens", "128")
OUTPUT_TOKENS = 8
PREFILL = {"do_remote_decode": True}


@contextlib.contextmanager
def instances(model: Path, *arguments: Sequence[str]) -> Iterator[list[Served]]:
    """Serve a model several times; the servers start side by side."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(arguments)) as pool:
        starting = [served(model, *COMMON, *words) for words in arguments]
        futures = [pool.submit(context.__enter__) for context in starting]
        for context, future in zip(starting, futures, strict=True):
            if future.exception() is None:
                stack.push(context)
        yield [future.result() for future in futures]


def prompt(length: int, seed: int = 0) -> list[int]:
    """Return a prompt of token ids, another for each seed and length."""
    draw = random.Random(f"{seed} {length}").randrange
    return [draw(5, 500) for _ in range(length)]


def post(
    url: str, body: dict[str, Any], path: str = "/v1/completions", timeout: float = 120
) -> dict[str, Any]:
    """Post JSON and return the answer."""
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)


@dataclass
class Pair:
    """A prefill and a decode instance."""

    prefill: Served
    decode: Served

    def body(self, tokens: list[int], max_tokens: int, **more: Any) -> dict[str, Any]:
        """Return the body of a greedy request."""
        fixed = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return {"model": self.prefill.model, "prompt": tokens, "max_tokens": max_tokens,
                **fixed, **more}  # fmt: skip

    def prefilled(self, tokens: list[int], **more: Any) -> dict[str, Any]:
        """Prefill, and return the reference."""
        params = PREFILL | more
        answer = post(self.prefill.url, self.body(tokens, 1, kv_transfer_params=params))
        return answer["kv_transfer_params"]

    def decoded(self, tokens: list[int], params: dict[str, Any] | None, **more: Any) -> list[int]:
        """Decode, and return the generated tokens."""
        asked = {"max_tokens": OUTPUT_TOKENS} | more
        body = self.body(tokens, kv_transfer_params=params, **asked)
        return post(self.decode.url, body)["choices"][0]["token_ids"]

    def colocated(self, tokens: list[int]) -> list[int]:
        """Return what one engine alone generates."""
        return post(self.prefill.url, self.body(tokens, OUTPUT_TOKENS))["choices"][0]["token_ids"]

    def streamed(self, tokens: list[int], peers: list[Any]) -> list[int]:
        """Decode a prompt whose prefill starts only once somebody waits for its layers."""
        name = uuid.uuid4().hex
        reference = {"version": 1, "transfer_id": name, "peers": peers}
        with ThreadPoolExecutor(1) as pool:
            params = {"do_remote_prefill": True, KEY: reference}
            answer: Future[list[int]] = pool.submit(self.decoded, tokens, params)
            while not self.decode.metric("vllm_plugins:pd_accepted_blocks") and not answer.done():
                time.sleep(0.005)
            self.prefilled(tokens, **{KEY: {"transfer_id": name, "stream": True}})
            return answer.result()

    def recomputed(self) -> dict[str, float]:
        """Return how many prompts the decode instance computed itself, by reason."""
        name = "vllm_plugins:pd_recomputed_total"
        return {s.labels["reason"]: s.value for s in self.decode.metrics()
                if s.name == name and s.value}  # fmt: skip

    def await_metric(self, server: Served, name: str, least: float, **labels: str) -> None:
        """Wait until a metric of pd has reached a value."""
        until(lambda: server.metric(f"vllm_plugins:pd_{name}", **labels) >= least, 30)

    def complaints(self) -> list[str]:
        """Return what the connectors have said in the logs."""
        lines = f"{self.prefill.log}\n{self.decode.log}".splitlines()
        return [line for line in lines if "] pd: " in line or "vllm-plugins: pd:" in line]

    def await_empty(self, seconds: float) -> None:
        """Wait until no block is in use or kept on either side."""
        deadline = time.monotonic() + seconds
        while self.blocks_in_use():
            assert time.monotonic() < deadline, self.blocks_in_use()
            time.sleep(0.05)

    def blocks_in_use(self) -> dict[str, float]:
        """Return what is not zero of all that says that blocks are taken."""
        names = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running",
                 "vllm:num_requests_waiting", "vllm_plugins:pd_held_blocks",
                 "vllm_plugins:pd_queued", "vllm_plugins:pd_accepted_blocks")  # fmt: skip
        sides = {
            name: server
            for name, server in (("prefill", self.prefill), ("decode", self.decode))
            if server.process.poll() is None
        }
        values = {f"{side} {name}": server.metric(name) for side, server in sides.items()
                  for name in names}  # fmt: skip
        return {name: value for name, value in values.items() if value}


def until(true: Callable[[], bool], seconds: float) -> None:
    """Wait for something that a server does."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@contextlib.contextmanager
def nothing_more(server: Served, seconds: float = 15) -> Iterator[None]:
    """Check that a server holds no more than before of what it must give back.

    That is: descriptors, processes, and mappings of shared memory, with a name or without.
    """

    before = _held(server)
    yield
    deadline = time.monotonic() + seconds
    while more := _held(server) - before:
        assert time.monotonic() < deadline, f"held besides {dict(before)}: {dict(more)}"
        time.sleep(0.1)


def _held(server: Served) -> Counter[str]:
    """Count what a server's processes hold: descriptors by what they are of, and shared memory.

    Connections of HTTP are left out: how long they stay open is their clients' affair.
    """
    port = urllib.parse.urlsplit(server.url).port
    parent = psutil.Process(server.process.pid)
    tree = [parent, *parent.children(recursive=True)]
    held = Counter(processes=len(tree))
    for one in tree:
        maps = Path(f"/proc/{one.pid}/maps").read_text()
        held["shared memory"] += maps.count("/dev/shm/") + maps.count("/memfd:")
        http = {it.fd for it in one.net_connections("tcp") if it.laddr.port == port}
        for link in Path(f"/proc/{one.pid}/fd").iterdir():
            # One that was closed meanwhile is none.
            with contextlib.suppress(FileNotFoundError):
                target = str(link.readlink())
                if int(link.name) not in http:
                    held[re.sub(r"\d+", "N", target)] += 1
    return held


@contextlib.contextmanager
def stopped(*servers: Served) -> Iterator[None]:
    """Stop all processes of servers, so that a phase lasts; they go on, or were killed."""
    for server in servers:
        os.killpg(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for server in servers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGCONT)


def through(params: dict[str, Any], address: Address) -> dict[str, Any]:
    """Return a reference whose only peer is reached at another address, by TCP."""
    changed = copy.deepcopy(params)
    changed[KEY]["peers"][0]["address"] = address.to_json()
    return changed


def routed(pair: Pair, log: Path, *arguments: str) -> contextlib.AbstractContextManager[str]:
    """Run the router in front of a pair, and give its address."""
    return router(log, "--prefill", pair.prefill.url, "--decode", pair.decode.url, *arguments)


@contextlib.contextmanager
def router(log: Path, *arguments: str) -> Iterator[str]:
    """Run the router, and give its address."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "vllm_plugins.cli.main", "route", "--port", str(port),
               *arguments]  # fmt: skip
    with logged_process(command, log) as process:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield url


def router_process(url: str) -> psutil.Process:
    """Return the process of a router that this process runs."""
    port = url.rsplit(":", 1)[1]
    (found,) = (one for one in psutil.Process().children() if port in one.cmdline())
    return found
