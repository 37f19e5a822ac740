"""Connections to prefill workers kept open between uses, and the words that end or renew leases."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from vllm_plugins.kv_connectors.pd.protocol import MAX_TRANSFERS, Kind, says_gone, transfers
from vllm_plugins.wire.connection import connect
from vllm_plugins.wire.errors import WireError

if TYPE_CHECKING:
    from vllm_plugins.kv_connectors.pd.reference import Peer, Reference
    from vllm_plugins.wire.connection import Connection

logger = logging.getLogger("vllm.vllm_plugins.pd")

# A connection that was idle for longer may have been closed by the other side.
IDLE_S = 10.0
# Longest that renewing or releasing waits for a peer to take or send a message, in s.
WORD_TIMEOUT_S = 5.0
# Peers that are told something at a time: so many may be stalled before others have to wait.
PARALLEL_WORDS = 16


class PeerConnections:
    """Connections by peer; thread-safe, each is used by one thread at a time.

    Args:
        secret: The shared secret.
        connect_timeout_s: Time for connecting, in s.
        timeout_s: Time for each message, in s.
    """

    def __init__(self, secret: bytes, connect_timeout_s: float, timeout_s: float) -> None:
        self._secret = secret
        self._connect_timeout_s, self._timeout_s = connect_timeout_s, timeout_s
        self._word_timeout_s = min(timeout_s, WORD_TIMEOUT_S)
        self._idle: dict[Peer, list[tuple[float, Connection]]] = {}
        self._closed = False
        self._sweeper: threading.Timer | None = None
        self._lock = threading.Lock()
        # Each peer is told by one thread at a time, and never holds up another's word.
        self._renewing: set[Peer] = set()
        self._releasing: set[Peer] = set()
        self._releases: dict[Peer, list[str]] = defaultdict(list)
        self._words = ThreadPoolExecutor(PARALLEL_WORDS, thread_name_prefix="pd-words")

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
                self._sweep_later()

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

    def renew_later(
        self, references: Iterable[Reference], lost: Callable[[set[str]], None]
    ) -> None:
        """Prolong leases in the background; a peer that has yet to answer the last call is left.

        Args:
            references: The transfers.
            lost: Hears of those that a worker has no lease of any more. One that cannot be reached
                keeps its leases: it may be back in time. One that was restarted has none.
        """
        for peer, names in _by_peer(references).items():
            with self._lock:
                free = not self._closed and peer not in self._renewing
                if free and self._start(self._renew, peer, names, lost):
                    self._renewing.add(peer)

    def release(self, references: Iterable[Reference]) -> None:
        """End leases.

        Raises:
            WireError: A worker could not be told; its lease ends by itself.
        """
        failed: WireError | None = None
        for peer, names in _by_peer(references).items():
            try:
                self._tell(peer, Kind.RELEASE, names)
            except WireError as error:
                failed = error
        if failed is not None:
            raise failed

    def release_later(self, reference: Reference) -> None:
        """End a lease in the background, if its workers can be reached."""
        with self._lock:
            for peer in () if self._closed else reference.peers:
                self._releases[peer].append(reference.transfer_id)
                if peer not in self._releasing:
                    self._start(self._release_all, peer)

    def close(self) -> None:
        """Close the idle connections; what is being told in the background still is."""
        with self._lock:
            self._closed = True
            self._close_idle(0.0)
            if self._sweeper is not None:
                self._sweeper.cancel()
        self._words.shutdown(wait=False)

    def _start(self, tell: Callable[..., None], *arguments: object) -> bool:
        """Have something told in the background; return whether there is a thread for it.

        Where none can be started it may be told nevertheless, by one that has other words to tell.
        """
        try:
            self._words.submit(tell, *arguments)
        except RuntimeError:
            return False
        return True

    def _take_idle(self, peer: Peer) -> Connection | None:
        with self._lock:
            self._close_idle(IDLE_S)
            idle = self._idle.get(peer)
            while idle:
                connection = idle.pop()[1]
                if connection.is_quiet:
                    return connection
                # The peer, or the network between, has ended it meanwhile.
                connection.close()
            return None

    def _sweep_later(self) -> None:
        """Have idle connections closed also if nobody asks for one any more."""
        if self._sweeper is None:
            sweeper = threading.Timer(IDLE_S, self._sweep)
            sweeper.daemon = True
            # Where no thread can be started, whoever asks next sweeps.
            with suppress(RuntimeError):
                sweeper.start()
                self._sweeper = sweeper

    def _sweep(self) -> None:
        with self._lock:
            self._sweeper = None
            self._close_idle(IDLE_S)
            if self._idle and not self._closed:
                self._sweep_later()

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

    def _renew(self, peer: Peer, names: list[str], lost: Callable[[set[str]], None]) -> None:
        try:
            lost(set(names) - self._tell(peer, Kind.RENEW, names))
        except WireError as error:
            if says_gone(error):
                lost(set(names))
        except Exception:
            # A malformed answer, or anything else: later renewals must go on.
            logger.exception("vllm-plugins: pd: %s: leases were not renewed", peer.address)
        finally:
            with self._lock:
                self._renewing.discard(peer)

    def _release_all(self, peer: Peer) -> None:
        """Tell a peer of all leases that end, also of those that come to it meanwhile."""
        with self._lock:
            if peer in self._releasing:
                return
            self._releasing.add(peer)
        while True:
            with self._lock:
                names = self._releases.pop(peer, None)
                if names is None:
                    self._releasing.discard(peer)
                    return
            try:
                self._tell(peer, Kind.RELEASE, names)
            except WireError:
                # Its leases end by themselves.
                continue
            except Exception:
                logger.exception("vllm-plugins: pd: %s: leases were not released", peer.address)

    def _tell(self, peer: Peer, kind: Kind, names: Sequence[str]) -> set[str]:
        """Send transfers, not more at a time than a message takes; return those that go on."""
        with self.to(peer) as connection:
            timeout_s, connection.timeout_s = connection.timeout_s, self._word_timeout_s
            live: set[str] = set()
            for start in range(0, len(names), MAX_TRANSFERS):
                some = names[start : start + MAX_TRANSFERS]
                header = {"generation": peer.generation, "transfers": some}
                answer = connection.request(kind, header)
                if kind is Kind.RENEW:
                    live.update(transfers(answer.header))
            connection.timeout_s = timeout_s
            return live


def _by_peer(references: Iterable[Reference]) -> dict[Peer, list[str]]:
    """Return each peer's transfers."""
    names: dict[Peer, list[str]] = defaultdict(list)
    for reference in references:
        for peer in reference.peers:
            names[peer].append(reference.transfer_id)
    return names
