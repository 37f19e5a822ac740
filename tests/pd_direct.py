"""Caches that another process maps: memory files in place of a device's, and workers over them.

Storages are real mappings of a `memfd` that the other end opens by its owner's process id, so that
what is shared between two processes is shared indeed, as with CUDA IPC.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.pd_problem import (
    ALL_HEADS,
    BLOCKS,
    GROUPS,
    MODEL,
    NEXT,
    PROMPT,
    TIMEOUT_S,
    Reader,
    Writer,
    part,
)
from vllm_plugins.kv_connectors.pd.decode_worker import DecodeWorker
from vllm_plugins.kv_connectors.pd.direct import StorageHandle, UnavailableError, export_caches
from vllm_plugins.kv_connectors.pd.direct_peers import DirectPeers
from vllm_plugins.kv_connectors.pd.geometry import Heads
from vllm_plugins.kv_connectors.pd.outbox import Outbox
from vllm_plugins.kv_connectors.pd.prefill_worker import PrefillWorker
from vllm_plugins.kv_connectors.pd.reference import Peer

MEMORY_NAME = "pd-direct-test"


class MemfdCaches:
    """Storages in memory files.

    Attributes:
        opened: How many storages were opened.
    """

    device = "this host's memory"

    def __init__(self) -> None:
        self._files: dict[int, int] = {}
        self.opened = 0

    def storage(self, size: int) -> torch.UntypedStorage:
        """Make a storage of so many bytes that others can map."""
        file = os.memfd_create(MEMORY_NAME)
        os.ftruncate(file, size)
        made = torch.UntypedStorage.from_file(f"/proc/self/fd/{file}", True, size)
        self._files[made.data_ptr()] = file
        return made

    def move(self, caches: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the same caches in such storages; those that shared one still do."""
        places: dict[int, torch.UntypedStorage] = {}
        moved = {}
        for name, cache in caches.items():
            old = cache.untyped_storage()
            if old.data_ptr() not in places:
                places[old.data_ptr()] = self.storage(old.nbytes()).copy_(old)
            empty = torch.empty(0, dtype=cache.dtype)
            place = places[old.data_ptr()]
            moved[name] = empty.set_(place, cache.storage_offset(), cache.shape, cache.stride())
        return moved

    def export(self, storage: torch.UntypedStorage) -> StorageHandle:
        file = self._files.get(storage.data_ptr())
        if file is None:
            raise UnavailableError("it is no memory file")
        return StorageHandle(f"{os.getpid()}/fd/{file}".encode(), storage.nbytes(), 0)

    def open(self, handle: StorageHandle, device: str) -> torch.UntypedStorage:
        if device != self.device:
            raise UnavailableError("it is on another host")
        try:
            file = Path("/proc") / handle.key.decode()
            opened = torch.UntypedStorage.from_file(str(file), True, handle.size)
        except (OSError, RuntimeError, UnicodeDecodeError):
            raise UnavailableError("it cannot be opened") from None
        self.opened += 1
        return opened

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


def mapped_bytes() -> int:
    """Return how many bytes of such files this process has mapped."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if MEMORY_NAME in line:
            first, last = line.split()[0].split("-")
            total += int(last, 16) - int(first, 16)
    return total


class DirectWriter(Writer):
    """A prefill worker whose caches can be mapped; further arguments as of `Writer`."""

    def __init__(
        self,
        caches: dict[str, torch.Tensor],
        heads: Heads = ALL_HEADS,
        groups: Mapping[str, int] = GROUPS,
        *,
        lease_s: float = 30.0,
        serve: Any = None,
        **changes: Any,
    ) -> None:
        self.direct = MemfdCaches()
        self.caches = self.direct.move(caches)
        super().__init__(self.caches, heads, groups, lease_s=lease_s, serve=serve, **changes)
        groups = {name: groups[name] for name in caches}
        self.handles = export_caches(self.pages, self.direct)
        self.worker = PrefillWorker(self.pages, groups, self.generation, lease_s, self.handles)
        self.worker.outbox = Outbox(groups, lease_s, announce_s=0.1)
        self._serve = serve or self.worker.serve

    def close(self) -> None:
        super().close()
        self.direct.close()


class DirectReader(Reader):
    """A decode worker that maps caches; further arguments as of `Reader`."""

    def __init__(
        self,
        caches: dict[str, torch.Tensor],
        heads: Heads = ALL_HEADS,
        groups: Mapping[str, int] = GROUPS,
        *,
        rank: int = 0,
        required: bool = False,
        direct: MemfdCaches | None = None,
        **changes: Any,
    ) -> None:
        super().__init__(caches, heads, groups, rank=rank, **changes)
        self.direct = direct or MemfdCaches()
        self.peers = DirectPeers(self.direct, self.pages, self.connections, required=required)
        self.worker = DecodeWorker(
            self.pages, self.groups, rank, self.connections, share_memory=True, direct=self.peers
        )


class Child:
    """A prefill worker in a process of its own, which has the model and holds two prompts.

    Args:
        context: Starts processes.
        port: Where it listens; 0 takes a free one.
        generation: Of its run.
    """

    def __init__(self, context: Any, port: int = 0, generation: str = "a" * 16) -> None:
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, port, generation))
        self.process.start()
        theirs.close()
        self.peer: Peer = self._pipe.recv()

    def say(self, word: str) -> Any:
        """Have it do something; return its answer."""
        self._pipe.send(word)
        return self._pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        self.kill()
        self.process.close()
        self._pipe.close()


def _serve(parent: Connection, port: int, generation: str) -> None:
    """Serve until this process is killed."""
    writer = DirectWriter(
        part(MODEL, ALL_HEADS), port=port, generation=generation, timeout_s=10 * TIMEOUT_S
    )
    for prompt in (PROMPT, NEXT):
        writer.hold(prompt)
    parent.send(writer.peer(unix=True))
    freed: set[str] = set()
    while True:
        word = parent.recv()
        if word == "freed":
            freed |= writer.outbox.take_freed()
            parent.send(sorted(freed))
        elif word == "overwrite":
            for cache in writer.caches.values():
                cache.fill_(BLOCKS)
            parent.send("done")
