"""Connections to prefill workers kept open between uses, and the words that end or renew leases."""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm_plugins.kv_connectors.pd.protocol import MAX_TRANSFERS, Kind, says_gone, transfers
from vllm_plugins.wire.connection import connect
from vllm_plugins.wire.errors import WireError

if TYPE_CHECKING:
    from vllm_plugins.kv_connectors.pd.reference import Peer, Reference
    from vllm_plugins.wire.connection import Connection

# A connection that was idle for longer may have been closed by the other side.
IDLE_S = 10.0


class PeerConnections:
    """Connections by peer; thread-safe, each is used by one thread at a time.

    Args:
        secret: The shared secret.
        connect_timeout_s: Time for connecting, in s.
        timeout_s: Time for each message, in s.
        local_only: Whether peers on other hosts are refused.
    """

    def __init__(self, secret: bytes, connect_timeout_s: float, timeout_s: float) -> None:
        self._secret = secret
        self._connect_timeout_s, self._timeout_s = connect_timeout_s, timeout_s
        self._idle: dict[Peer, list[tuple[float, Connection]]] = {}
        self._closed = False
        self._lock = threading.Lock()
        self._releases: queue.SimpleQueue[Reference | None] = queue.SimpleQueue()
        self._releaser: threading.Thread | None = None

    @contextmanager
    def to(self, peer: Peer) -> Iterator[Connection]:
        """Lend a connection to a peer; one that fails while lent is closed.

        Raises:
            WireError: The peer cannot be reached, or refuses.
        """
        connection = self._take_idle(peer) or self.connect(peer)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if self._closed:
                connection.close()
            else:
                self._idle.setdefault(peer, []).append((time.monotonic(), connection))

    def connect(self, peer: Peer) -> Connection:
        """Return a connection of the caller's own.

        Raises:
            WireError: The peer cannot be reached, or refuses.
        """
        return connect(
            peer.address,
            self._secret,
            connect_timeout_s=self._connect_timeout_s,
            timeout_s=self._timeout_s,
        )

    def renew(self, references: Iterable[Reference]) -> set[str]:
        """Prolong leases; return the transfers that some worker has no lease of any more.

        A worker that cannot be reached keeps its leases: it may be back in time. One that was
        restarted has none.
        """
        lost: set[str] = set()
        for peer, names in _by_peer(references):
            try:
                with self.to(peer) as connection:
                    header = {"generation": peer.generation, "transfers": names}
                    answer = connection.request(Kind.RENEW, header)
                    lost |= set(names) - set(transfers(answer.header))
            except WireError as error:
                lost |= set(names) if says_gone(error) else set()
            except ValueError:
                continue
        return lost

    def release(self, references: Iterable[Reference]) -> None:
        """End leases.

        Raises:
            WireError: A worker could not be told; its lease ends by itself.
        """
        failed: WireError | None = None
        for peer, names in _by_peer(references):
            try:
                with self.to(peer) as connection:
                    header = {"generation": peer.generation, "transfers": names}
                    connection.request(Kind.RELEASE, header)
            except WireError as error:
                failed = error
        if failed is not None:
            raise failed

    def release_later(self, reference: Reference) -> None:
        """End a lease from a thread of this object's own, if its workers can be reached."""
        with self._lock:
            if self._releaser is None:
                self._releaser = threading.Thread(
                    target=self._release_queued, name="pd-release", daemon=True
                )
                self._releaser.start()
        self._releases.put(reference)

    def close(self) -> None:
        """Close the idle connections and end the thread."""
        self._releases.put(None)
        with self._lock:
            self._closed = True
            self._close_idle(0.0)

    def _take_idle(self, peer: Peer) -> Connection | None:
        with self._lock:
            # Also those to peers of which nobody will ask any more.
            self._close_idle(IDLE_S)
            idle = self._idle.get(peer)
            while idle:
                connection = idle.pop()[1]
                if connection.is_quiet:
                    return connection
                # The peer, or the network between, has ended it meanwhile.
                connection.close()
            return None

    def _close_idle(self, least_s: float) -> None:
        """Close the connections that were idle for so long."""
        now = time.monotonic()
        for peer, connections in list(self._idle.items()):
            for since, connection in connections:
                if now - since >= least_s:
                    connection.close()
            connections[:] = [entry for entry in connections if now - entry[0] < least_s]
            if not connections:
                del self._idle[peer]

    def _release_queued(self) -> None:
        while (reference := self._releases.get()) is not None:
            try:
                self.release([reference])
            except WireError:
                # Its lease ends by itself.
                continue


def _by_peer(references: Iterable[Reference]) -> Iterator[tuple[Peer, list[str]]]:
    """Yield each peer with its transfers, not more at a time than it takes."""
    names: dict[Peer, list[str]] = defaultdict(list)
    for reference in references:
        for peer in reference.peers:
            names[peer].append(reference.transfer_id)
    for peer, all_names in names.items():
        for start in range(0, len(all_names), MAX_TRANSFERS):
            yield peer, all_names[start : start + MAX_TRANSFERS]
