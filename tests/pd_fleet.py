"""Instances that change places, behind a network that can stall, and what a killed one leaves."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.pd_servers import COMMON, until
from tests.serving import Served, served
from tests.wire_faults import DOWN, NO_FAULT, Fault, FaultyProxy
from vllm_plugins.wire.address import Address

LEASE_S = 20.0
BLOCKS, TOKENS_OF_A_BLOCK = 1000, 32
# Two prompts of 1600 tokens fill it, so that further ones wait for their pull.
ACCEPTED_BLOCKS = 100
PLUGIN = (
    f"pd:role=both,transport=tcp,lease_s={LEASE_S},advertise_host=127.0.0.2,"
    f"waiting_block_prop_threshold={ACCEPTED_BLOCKS / BLOCKS}"
)
# A prompt of 1600 tokens has 1.6 MB of KV: some of it has come when its pull stalls.
STALLED_BYTES = 200_000
STALL = Fault("stall", at=STALLED_BYTES, direction=DOWN)
_SHARED = re.compile(r"/dev/shm/\S+")


@dataclass(eq=False)
class Member:
    """An instance of either role, and the proxy through which others read its KV."""

    server: Served
    proxy: FaultyProxy

    def metric(self, name: str, **labels: str) -> float:
        """Return a metric of pd, or one of vLLM's by its whole name."""
        whole = name if name.startswith("vllm:") else f"vllm_plugins:pd_{name}"
        return self.server.metric(whole, **labels)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.server.process.poll() is None


@dataclass(frozen=True)
class Traces:
    """What a killed instance had: processes, named shared memory, a port."""

    group: int
    files: frozenset[str]
    port: int

    def left(self) -> list[str]:
        """Return what of it is still there."""
        found = [name for name in self.files if Path(name).exists()]
        if any(map(self._is_ours, psutil.process_iter())):
            found.append(f"processes of group {self.group}")
        listening = [one for one in psutil.net_connections("tcp") if one.status == "LISTEN"]
        return found + [f"port {self.port}" for one in listening if one.laddr.port == self.port]

    def _is_ours(self, process: psutil.Process) -> bool:
        """Whether a process is of the group; a zombie is gone, whether or not it is reaped."""
        try:
            dead = process.status() == psutil.STATUS_ZOMBIE
            return not dead and os.getpgid(process.pid) == self.group
        except (psutil.NoSuchProcess, ProcessLookupError):
            return False


def kill(server: Served) -> Traces:
    """Kill all processes of a server at once, and return where traces of it could be."""
    group = server.process.pid
    # What they are at does not end while their traces are looked for.
    os.killpg(group, signal.SIGSTOP)
    traces = Traces(group, shared_files(group), int(server.url.rsplit(":", 1)[1]))
    os.killpg(group, signal.SIGKILL)
    server.process.wait()
    return traces


def shared_files(group: int) -> frozenset[str]:
    """Return the named shared memory that only a process and its children have mapped or open."""
    mine = {group, *(one.pid for one in psutil.Process(group).children(recursive=True))}
    names: dict[bool, set[str]] = {True: set(), False: set()}
    for process in psutil.pids():
        with contextlib.suppress(OSError):
            folder = Path(f"/proc/{process}")
            links = (str(link.readlink()) for link in (folder / "fd").iterdir())
            text = "\n".join([(folder / "maps").read_text(), *links])
            names[process in mine].update(_SHARED.findall(text))
    return frozenset(names[True] - names[False])


class Fleet:
    """Instances that can be killed and are replaced when they are next asked for.

    Args:
        model: Its folder.
        stack: Ends them.
        *plugins: What is on beside pd.
        words: Further arguments of an instance.
    """

    def __init__(
        self, model: Path, stack: contextlib.ExitStack, *plugins: str, words: Sequence[str] = ()
    ) -> None:
        self._model, self._stack = model, stack
        self._plugins, self._words = plugins, words
        self._members: list[Member] = []

    def members(self, count: int = 3) -> list[Member]:
        """Return instances that run, after starting what is missing side by side."""
        self._members = [one for one in self._members if one.alive]
        missing = count - len(self._members)
        if missing:
            with ThreadPoolExecutor(missing) as pool:
                self._members += pool.map(lambda _: self._start(), range(missing))
        return self._members

    def _start(self) -> Member:
        words = (*COMMON, "--num-gpu-blocks-override", str(BLOCKS), *self._words)
        with socket.socket() as place:
            # Nobody else gets the port while the server starts, and the server still does.
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(("127.0.0.1", 0))
            port = place.getsockname()[1]
            proxy = FaultyProxy(Address("127.0.0.1", port), listen=("127.0.0.2", port))
            plugins = ("--plugin", f"{PLUGIN},port={port}", *self._plugins)
            context = served(self._model, *words, *plugins)
            server = self._stack.enter_context(context)
        # Gauges are there from the first step on.
        server.server.warm_up([40])
        return Member(server, self._stack.enter_context(proxy))


@contextlib.contextmanager
def stalled(members: Sequence[Member]) -> Iterator[None]:
    """Let pulls from these instances stall amid the blocks; they fail when the block ends."""
    _set(members, STALL)
    try:
        yield
    finally:
        _set(members, NO_FAULT)


def _set(members: Sequence[Member], fault: Fault) -> None:
    for one in members:
        one.proxy.fault = fault
        # Connections are kept for the next pull, and would not have the fault.
        one.proxy.cut()


def await_empty(members: Sequence[Member], seconds: float) -> None:
    """Wait until no instance runs a request, keeps a block or has one promised."""
    names = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running",
             "vllm:num_requests_waiting", "held_blocks", "queued", "accepted_blocks")  # fmt: skip
    until(lambda: not any(one.metric(name) for one in members for name in names), seconds)
