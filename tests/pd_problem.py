"""Prefill and decode workers in one process, on small tensors that stand for KV caches.

The KV of a whole model is made once (`whole_model`), and each worker gets its part of it, so that
what a reader has pulled can be compared with what the model has, whatever the parallelism.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tests.unit.wire_ends import SECRET, held, wait_until
from vllm_plugins.kv_connectors.pd.decode_worker import DecodeWorker
from vllm_plugins.kv_connectors.pd.geometry import Heads
from vllm_plugins.kv_connectors.pd.orders import Load
from vllm_plugins.kv_connectors.pd.outbox import Outbox
from vllm_plugins.kv_connectors.pd.pages import Pages
from vllm_plugins.kv_connectors.pd.peers import PeerConnections
from vllm_plugins.kv_connectors.pd.prefill_worker import PrefillWorker
from vllm_plugins.kv_connectors.pd.protocol import Span
from vllm_plugins.kv_connectors.pd.reference import Peer, Reference
from vllm_plugins.wire.address import Address
from vllm_plugins.wire.connection import Connection
from vllm_plugins.wire.server import Server

BLOCKS, TOKENS, WIDTH = 64, 4, 8
HEADS = 4
# Of one head.
BLOCK_BYTES = 2 * TOKENS * WIDTH
GROUPS = {"layer.0": 0, "layer.1": 1, "layer.2": 0}
GENERATION, DIGEST = "0123456789abcdef", "ab" * 16
# Of one message; a fault that shows only as silence costs a test this much.
TIMEOUT_S = 1.0


def whole_model(seed: int, groups: Mapping[str, int] = GROUPS) -> dict[str, torch.Tensor]:
    """Return random KV: blocks x heads x tokens x width of each layer."""
    numbers = torch.Generator().manual_seed(seed)
    shape = (BLOCKS, HEADS, TOKENS, WIDTH)
    return {name: torch.randint(-999, 999, shape, generator=numbers).short() for name in groups}


def part(
    whole: Mapping[str, torch.Tensor], heads: Heads, layers: Sequence[str] | None = None
) -> dict[str, torch.Tensor]:
    """Return a worker's own copy of some heads of some layers."""
    return {
        name: cache[:, heads.first : heads.last].clone()
        for name, cache in whole.items()
        if layers is None or name in layers
    }


ALL_HEADS = Heads(0, HEADS)


class Writer:
    """A prefill worker and its server.

    Args:
        caches: The worker's KV.
        heads: Its heads.
        groups: KV cache group of each layer.
        lease_s: Of its leases.
        generation: Of its run.
        port: Where it listens; 0 takes a free one.
        serve: Talks with a client in place of the worker.
        timeout_s: Of a message.

    Attributes:
        served: Connections since the start.
        left: Those that have ended.
    """

    def __init__(
        self,
        caches: dict[str, torch.Tensor],
        heads: Heads = ALL_HEADS,
        groups: Mapping[str, int] = GROUPS,
        *,
        lease_s: float = 30.0,
        generation: str = GENERATION,
        port: int = 0,
        serve: Callable[[Connection], None] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        groups = {name: groups[name] for name in caches}
        self.pages = Pages(caches, BLOCKS, TOKENS, heads, "same")
        self.worker = PrefillWorker(self.pages, groups, generation, lease_s)
        self.worker.outbox = Outbox(groups, lease_s, announce_s=0.1)
        self.served = self.left = 0
        self._serve = serve or self.worker.serve
        self.server = Server(
            self._count, SECRET, port=port, timeout_s=timeout_s, idle_timeout_s=20.0, name="pd"
        )
        self.server.start()
        self.generation = generation

    @property
    def outbox(self) -> Outbox:
        return self.worker.outbox

    def peer(self, *, unix: bool = False, address: Address | None = None) -> Peer:
        own = self.server.address
        return Peer(address or (own if unix else replace(own, unix="")), self.generation)

    def hold(self, prompt: Prompt) -> None:
        self.outbox.hold(prompt.name, f"held-{prompt.name}", DIGEST, prompt.source)

    def close(self) -> None:
        self.server.stop()

    def _count(self, connection: Connection) -> None:
        self.served += 1
        try:
            self._serve(connection)
        finally:
            self.left += 1


class Reader:
    """A decode worker.

    Args:
        caches: The worker's KV.
        heads: Its heads.
        groups: KV cache group of each layer.
        rank: The worker's number.
        share_memory: Whether data may come through shared memory.
        secret: Of the wire.
        timeout_s: For what a writer sends.
    """

    def __init__(
        self,
        caches: dict[str, torch.Tensor],
        heads: Heads = ALL_HEADS,
        groups: Mapping[str, int] = GROUPS,
        *,
        rank: int = 0,
        share_memory: bool = True,
        secret: bytes = SECRET,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.caches, self.heads = caches, heads
        self.before = {name: cache.clone() for name, cache in caches.items()}
        self.pages = Pages(caches, BLOCKS, TOKENS, heads, "same")
        self.connections = PeerConnections(secret, 0.5, timeout_s)
        groups = {name: groups[name] for name in caches}
        self.groups = groups
        self.worker = DecodeWorker(
            self.pages, groups, rank, self.connections, share_memory=share_memory
        )
        self.came: Counter[str] = Counter()
        self.failed: set[str] = set()

    def pull(self, *prompts: Prompt, peers: Sequence[Peer], streams: bool = False) -> None:
        """Start pulls of prompts."""
        for prompt in prompts:
            self.worker.start(prompt.load(peers, streams=streams))

    def wait(self, count: int, seconds: float = 5.0) -> set[str]:
        """Wait until so many requests came back in all; return those that failed."""
        wait_until(lambda: self.look() >= count, seconds)
        assert not self.look() - count, "a request came back that was not started"
        assert set(self.came.values()) <= {1}, "a request came back twice"
        return self.failed

    def look(self) -> int:
        """Take what has come back; return how many requests have in all."""
        finished, failed = self.worker.take_finished(set())
        assert failed <= finished
        self.came.update(finished)
        self.failed |= failed
        return self.came.total()

    def reasons(self) -> dict[str, int]:
        """Return the reasons of failures since the last call."""
        return dict(self.worker.take_counts()[1])

    def check(
        self,
        whole: Mapping[str, torch.Tensor],
        *prompts: Prompt,
        broken: Sequence[Prompt] = (),
    ) -> None:
        """Assert that the blocks of these prompts are the model's, and all others untouched.

        Args:
            whole: The model.
            prompts: Those that came.
            broken: Those that failed: each of their blocks came whole or not at all.
        """
        for name, cache in self.caches.items():
            expected = self.before[name].clone()
            model = whole[name][:, self.heads.first : self.heads.last]
            for prompt in (*broken, *prompts):
                group = self.groups[name]
                span = prompt.spans[group]
                source = prompt.source[group][span.first : span.last]
                for block, origin in zip(prompt.targets[group], source, strict=True):
                    if prompt in prompts or not torch.equal(cache[block], expected[block]):
                        expected[block] = model[origin]
            assert torch.equal(cache, expected), name

    def close(self) -> None:
        self.worker.close()


@dataclass(frozen=True)
class Prompt:
    """A prompt's KV on both sides.

    Attributes:
        name: Of the transfer and of the request.
        source: Its blocks on the prefill instance, by group.
        targets: Blocks for the wanted positions on the decode instance, by group.
        spans: The wanted positions, by group.
    """

    name: str
    source: tuple[list[int], ...]
    targets: tuple[list[int], ...]
    spans: tuple[Span, ...]

    @classmethod
    def of(
        cls, name: str, lengths: Sequence[int] = (7, 5), skip: int = 1, offset: int = 0
    ) -> Prompt:
        """Return a prompt of so many blocks by group, of which the first few are not wanted."""
        # Scattered on both sides, and elsewhere on each; block 0 is nobody's.
        own = BLOCKS - 2
        source = tuple([1 + (3 * i + offset) % own for i in range(n)] for n in lengths)
        targets = tuple([1 + (5 * i + offset + 1) % own for i in range(skip, n)] for n in lengths)
        return cls(name, source, targets, tuple(Span(skip, n) for n in lengths))

    def load(self, peers: Sequence[Peer], *, streams: bool = False) -> Load:
        tokens, digest = (None, None) if streams else (100, DIGEST)
        reference = Reference(self.name, tokens, digest, tuple(peers))
        return Load(self.name, reference, DIGEST, self.spans, self.targets)


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Check that neither threads nor descriptors are left over."""
    descriptors, threads = held()

    def gone() -> bool:
        now = held()
        return now[0] <= descriptors and now[1] <= threads

    yield
    wait_until(gone)


PIECE_BYTES = 2 * HEADS * BLOCK_BYTES
PROMPT = Prompt.of("t")
# In blocks that the first one has nothing of, on either side.
NEXT = replace(
    Prompt.of("next"),
    source=([50, 51, 52, 53, 54, 56, 57], [60, 59, 58, 62, 63]),
    targets=([40, 41, 43, 44, 45, 46], [50, 51, 53, 54]),
)
MODEL, OLD = whole_model(1), whole_model(2)
LEASE_S = 0.8
# A request that takes longer to come back than all its messages may take hangs.
SOON_S = 6 * TIMEOUT_S


Ends = list[Any]


def honest_writer(ends: Ends, **changes: Any) -> Writer:
    """Return a worker that has the model, among the ends that are closed later."""
    writer = Writer(part(MODEL, ALL_HEADS), **{"lease_s": LEASE_S, **changes})
    ends.append(writer)
    return writer


def new_reader(ends: Ends, **changes: Any) -> Reader:
    """Return a worker with other KV, among the ends that are closed later."""
    reader = Reader(part(OLD, ALL_HEADS), **changes)
    ends.append(reader)
    return reader


def fails(reader: Reader, writers: Sequence[Peer], seconds: float = SOON_S) -> str:
    """Pull a prompt that must come back as failed, in time; return the reason."""
    start = time.monotonic()
    reader.pull(PROMPT, peers=writers)
    assert reader.wait(1, seconds) == {PROMPT.name}
    assert time.monotonic() - start < seconds
    (reason,) = reader.reasons()
    return reason


def goes_on(reader: Reader, writer: Writer, *, unix: bool = False) -> None:
    """Pull another prompt, which must come whole."""
    writer.hold(NEXT)
    before = reader.look()
    reader.pull(NEXT, peers=[writer.peer(unix=unix)])
    assert NEXT.name not in reader.wait(before + 1)
    reader.check(MODEL, NEXT, broken=[PROMPT])


def frees(writer: Writer, *names: str) -> None:
    """Wait until a writer has freed these and no other prompts' blocks."""
    came: list[str] = []
    wait_until(lambda: came.extend(writer.outbox.take_freed()) or len(came) >= len(names))
    assert sorted(came) == sorted(f"held-{name}" for name in names)
    assert len(writer.outbox) == 0
