"""The prefill workers whose caches are mapped, and for how long."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_plugins.kv_connectors.pd.direct import CacheHandles, UnavailableError, open_caches
from vllm_plugins.kv_connectors.pd.protocol import Kind
from vllm_plugins.wire.errors import WireError, WireRefusedError

if TYPE_CHECKING:
    from vllm_plugins.kv_connectors.pd.direct import DirectCaches
    from vllm_plugins.kv_connectors.pd.geometry import Shard
    from vllm_plugins.kv_connectors.pd.pages import Pages
    from vllm_plugins.kv_connectors.pd.peers import PeerConnections
    from vllm_plugins.kv_connectors.pd.reference import Peer
    from vllm_plugins.wire.connection import Connection

logger = init_logger("vllm.vllm_plugins.pd")

# Time between two looks at whether the peers are still there, in s. A mapping keeps the memory of a
# worker that has died, which its successor needs.
WATCH_S = 1.0


@dataclass
class _Mapping:
    """What is known of one peer.

    Attributes:
        lock: Held while the peer is asked, so that a slow one holds up nobody else's pulls.
        connection: Open for as long as the peer's run lasts and its caches are mapped.
        caches: The mapped caches; None where they cannot be.
        reason: Why they cannot be mapped; empty before the peer was asked.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    connection: Connection | None = None
    caches: Pages | None = None
    reason: str = ""


class DirectPeers:
    """Mappings by peer; thread-safe.

    A mapping goes when the connection ends over which its handles came: at once when the peer's
    process dies, after the server's idle time otherwise, and when another run answers at the
    address. Pulls that are under way keep it until they are over.

    Args:
        direct: Opens storages.
        own: This worker's caches.
        connections: Connections to prefill workers.
        required: Whether KV may come in no other way.
    """

    def __init__(
        self, direct: DirectCaches, own: Pages, connections: PeerConnections, *, required: bool
    ) -> None:
        self._direct, self._own, self._connections = direct, own, connections
        self._required = required
        self._mappings: dict[Peer, _Mapping] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None

    def caches_of(self, peer: Peer, shard: Shard) -> Pages | None:
        """Return a peer's caches, mapped when they are first asked for; None to copy otherwise.

        Args:
            peer: The peer.
            shard: What it says that it holds.

        Raises:
            WireRefusedError: They cannot be mapped, and KV may come in no other way.
            WireError: The peer cannot be asked.
        """
        with self._lock:
            mapping = self._mappings.setdefault(peer, _Mapping())
        with mapping.lock:
            if mapping.caches is None and not mapping.reason:
                self._map(peer, shard, mapping)
        if mapping.caches is None and self._required:
            raise WireRefusedError(f"{peer.address}: cannot be mapped: {mapping.reason}")
        return mapping.caches

    def close(self) -> None:
        """Forget all mappings and end the thread."""
        self._stop.set()
        with self._lock:
            for peer in list(self._mappings):
                self._drop(peer)

    def _map(self, peer: Peer, shard: Shard, mapping: _Mapping) -> None:
        connection = None
        try:
            connection = self._connections.connect(peer)
            handles = self._ask(connection, peer, shard)
            mapping.caches = open_caches(handles, shard, self._own, self._direct)
            self._keep(peer, mapping, connection)
        except (UnavailableError, ValueError) as error:
            mapping.reason = str(error)
            logger.warning(
                "vllm-plugins: pd: %s: KV comes through host memory, since its caches cannot be "
                "mapped: %s",
                peer.address,
                error,
            )
        except WireError:
            # Perhaps it can be asked next time, or a stale reference named a run that has ended.
            with self._lock:
                self._mappings.pop(peer, None)
            raise
        finally:
            if connection is not None and mapping.connection is None:
                connection.close()

    def _ask(self, connection: Connection, peer: Peer, shard: Shard) -> CacheHandles:
        if not connection.local:
            raise UnavailableError("it is not reached by a Unix socket of this host")
        frame = connection.request(Kind.CACHES, {"generation": peer.generation})
        if frame.kind != Kind.HANDLES or not frame.header:
            raise UnavailableError("it offers none; its log says why")
        return CacheHandles.from_json(frame.header, shard)

    def _keep(self, peer: Peer, mapping: _Mapping, connection: Connection) -> None:
        """Watch a mapping from now on, and drop those of former runs at the address."""
        with self._lock:
            if self._stop.is_set() or self._mappings.get(peer) is not mapping:
                # For the present pull alone.
                return
            mapping.connection = connection
            for other in list(self._mappings):
                if other != peer and other.address == peer.address:
                    self._drop(other)
            if self._watcher is None:
                watcher = threading.Thread(target=self._watch, name="pd-direct", daemon=True)
                # Where no thread can be started, the next mapping tries again.
                with suppress(RuntimeError):
                    watcher.start()
                    self._watcher = watcher

    def _watch(self) -> None:
        while not self._stop.wait(WATCH_S):
            # Not here: this frame, which stays, would keep the last mapping that it saw.
            self._drop_lost()

    def _drop_lost(self) -> None:
        with self._lock:
            for peer, mapping in list(self._mappings.items()):
                if mapping.connection is not None and not mapping.connection.is_quiet:
                    self._drop(peer)

    def _drop(self, peer: Peer) -> None:
        mapping = self._mappings.pop(peer)
        if mapping.connection is not None:
            mapping.connection.close()
