"""The decode side in a worker: pulls prompts' KV into blocks that vLLM has set aside for it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_plugins.kv_connectors.pd.geometry import Pull, Shard, plan_pulls, readers_of
from vllm_plugins.kv_connectors.pd.protocol import (
    PIECE_BYTES,
    SLOTS,
    Kind,
    PullRequest,
    says_gone,
)
from vllm_plugins.kv_connectors.pd.receivers import CancelledError, DirectReceiver, Receiver
from vllm_plugins.wire.errors import WireError, WireRefusedError
from vllm_plugins.wire.shared_memory import SharedBuffer

if TYPE_CHECKING:
    from vllm_plugins.kv_connectors.pd.direct_peers import DirectPeers
    from vllm_plugins.kv_connectors.pd.orders import Load
    from vllm_plugins.kv_connectors.pd.pages import Pages
    from vllm_plugins.kv_connectors.pd.peers import PeerConnections
    from vllm_plugins.kv_connectors.pd.reference import Peer

logger = init_logger("vllm.vllm_plugins.pd")

# Prompts that are pulled at a time, so that a slow peer does not hold up another's.
PARALLEL_PULLS = 4
# Prefill instances that are remembered; each restart makes another one.
MAX_PLANS = 256


class DecodeWorker:
    """Pulls KV for one worker.

    Args:
        pages: The worker's KV cache.
        groups: KV cache group of each layer.
        rank: The worker's number among all of the instance.
        connections: Connections to prefill workers, which it owns from now on.
        share_memory: Whether data may come through shared memory on one host.
        direct: The prefill workers whose caches are mapped, which it owns from now on; None where
            none are.
    """

    def __init__(
        self,
        pages: Pages,
        groups: dict[str, int],
        rank: int,
        connections: PeerConnections,
        *,
        share_memory: bool,
        direct: DirectPeers | None = None,
    ) -> None:
        self._pages, self._groups, self._rank = pages, groups, rank
        self._connections, self._share_memory = connections, share_memory
        self._direct = direct
        self._readers: tuple[Shard, ...] = (pages.shard,)
        self._plans: dict[tuple[Peer, ...], _Plan] = {}
        self._pool = ThreadPoolExecutor(PARALLEL_PULLS, thread_name_prefix="pd-pull")
        # It starts its threads as they are needed; the first one must be there whatever comes.
        self._pool.submit(int)
        # Guards what follows.
        self._lock = threading.Lock()
        self._cancel: dict[str, threading.Event] = {}
        self._one_came = threading.Event()
        self._finished: set[str] = set()
        self._failed: set[str] = set()
        self._received: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._seconds: list[float] = []

    def introduce(self, readers: Sequence[Shard]) -> None:
        """Learn what all workers of this instance hold."""
        self._readers = tuple(readers)

    def start(self, load: Load) -> None:
        """Pull a prompt in the background."""
        cancelled = threading.Event()
        with self._lock:
            self._cancel[load.request_id] = cancelled
        # Where no further thread can be started, one of those that there are comes to it.
        with suppress(RuntimeError):
            self._pool.submit(self._run, load, cancelled)

    @property
    def is_busy(self) -> bool:
        """Whether a prompt is being pulled."""
        return bool(self._cancel)

    def await_one(self, seconds: float) -> None:
        """Wait until a pull is over that `take_finished` has yet to return, but not for longer."""
        self._one_came.wait(seconds)

    def take_finished(self, ended: set[str]) -> tuple[set[str], set[str]]:
        """Return the requests whose pull is over, and those of them that failed.

        Args:
            ended: Requests that vLLM has ended; their pulls stop.
        """
        with self._lock:
            for request_id in ended & self._cancel.keys():
                self._cancel[request_id].set()
            results = self._finished, self._failed
            self._finished, self._failed = set(), set()
            self._one_came.clear()
            return results

    def take_counts(self) -> tuple[Counter[str], Counter[str], list[float]]:
        """Return bytes by way, failures by reason and durations in s since the last call."""
        with self._lock:
            counts = self._received, self._failures, self._seconds
            self._received, self._failures, self._seconds = Counter(), Counter(), []
            return counts

    def close(self) -> None:
        """Stop pulling."""
        with self._lock:
            for cancelled in self._cancel.values():
                cancelled.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._direct is not None:
            self._direct.close()
        self._connections.close()

    def _run(self, load: Load, cancelled: threading.Event) -> None:
        start, reason = time.monotonic(), ""
        unread: tuple[Peer, ...] = ()
        try:
            if cancelled.is_set():
                # While it waited for its turn, as behind peers that do not answer.
                raise CancelledError
            plan = self._plan(load.reference.peers)
            unread = plan.unread
            for part in plan.parts:
                self._pull(load, part, cancelled)
        except CancelledError:
            reason = "cancelled"
        except WireError as error:
            reason = _reason(error)
            logger.warning("vllm-plugins: pd: %s: %s", load.request_id, error)
        except ValueError as error:
            reason = "incompatible"
            logger.warning("vllm-plugins: pd: %s: %s", load.request_id, error)
        except Exception:
            # The request must come back whatever happens: vLLM waits for it.
            reason = "error"
            logger.exception("vllm-plugins: pd: %s: the pull broke off", load.request_id)
        with self._lock:
            del self._cancel[load.request_id]
            self._finished.add(load.request_id)
            self._one_came.set()
            if reason:
                self._failed.add(load.request_id)
                self._failures[reason] += 1
            else:
                self._seconds.append(time.monotonic() - start)
        if reason:
            self._connections.release_later(load.reference)
        elif unread and self._rank == 0:
            self._connections.release_later(replace(load.reference, peers=unread))

    def _plan(self, peers: tuple[Peer, ...]) -> _Plan:
        plan = self._plans.get(peers)
        if plan is None:
            writers = [self._describe(peer) for peer in peers]
            counts = [readers_of(index, self._readers, writers) for index in range(len(peers))]
            plan = _Plan(
                [
                    _Part(peers[i := pull.writer], writers[i], pull, counts[i])
                    for pull in plan_pulls(self._pages.shard, writers)
                ],
                tuple(peer for peer, count in zip(peers, counts, strict=True) if not count),
            )
            with self._lock:
                self._plans[peers] = plan
                if len(self._plans) > MAX_PLANS:
                    del self._plans[next(iter(self._plans))]
        return plan

    def _describe(self, peer: Peer) -> Shard:
        with self._connections.to(peer) as connection:
            header = {"generation": peer.generation}
            return Shard.from_json(connection.request(Kind.DESCRIBE, header).header)

    def _pull(self, load: Load, part: _Part, cancelled: threading.Event) -> None:
        peer, pull = part.peer, part.pull
        source = self._direct.caches_of(peer, part.shard) if self._direct is not None else None
        what = self._pages, self._groups, load, pull, cancelled
        with self._connections.to(peer) as connection:
            if source is not None:
                receiver: Receiver = DirectReceiver(*what, source)
                receiver.run(connection, self._request(load, part, direct=True), peer.generation)
                way = "cuda_ipc"
            elif self._share_memory and connection.local:
                with SharedBuffer.create(SLOTS * self._slot_bytes(pull)) as shared:
                    receiver = Receiver(*what, self._slot_bytes(pull), shared)
                    request = self._request(load, part, shared=shared.size)
                    receiver.run(connection, request, peer.generation)
                way = "shared_memory"
            else:
                receiver = Receiver(*what, self._slot_bytes(pull))
                receiver.run(connection, self._request(load, part), peer.generation)
                way = "unix" if connection.local else "tcp"
        with self._lock:
            self._received[way] += self._size(load, pull)

    def _request(
        self, load: Load, part: _Part, *, shared: int = 0, direct: bool = False
    ) -> PullRequest:
        pull = part.pull
        return PullRequest(
            load.reference.transfer_id,
            load.digest,
            load.spans,
            tuple((layer, self._groups[layer]) for layer in pull.layers),
            (pull.heads.first, pull.heads.last),
            self._rank,
            part.readers,
            shared,
            direct,
        )

    def _slot_bytes(self, pull: Pull) -> int:
        sizes = (self._pages.block_bytes(layer, pull.heads) for layer in pull.layers)
        return max(PIECE_BYTES, *sizes)

    def _size(self, load: Load, pull: Pull) -> int:
        return sum(
            len(load.spans[self._groups[layer]]) * self._pages.block_bytes(layer, pull.heads)
            for layer in pull.layers
        )


@dataclass(frozen=True)
class _Part:
    """What comes from one worker of a prefill instance.

    Attributes:
        peer: The worker.
        shard: What it holds.
        pull: What of it this worker takes.
        readers: How many of this instance's workers read there.
    """

    peer: Peer
    shard: Shard
    pull: Pull
    readers: int


@dataclass(frozen=True)
class _Plan:
    """How a prompt comes from the workers of a prefill instance.

    Attributes:
        parts: What this worker takes from whom.
        unread: Workers whose heads others have as well, so that nobody reads there.
    """

    parts: list[_Part]
    unread: tuple[Peer, ...]


def _reason(error: WireError) -> str:
    """Return the name under which a failure is counted."""
    if isinstance(error, WireRefusedError):
        return "gone" if says_gone(error) else "refused"
    name = type(error).__name__
    return {"WireTimeoutError": "timeout", "WireDamagedError": "damaged"}.get(name, "closed")
