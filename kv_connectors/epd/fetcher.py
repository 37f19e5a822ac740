"""The prefill server's end of the wire: threads that fetch embeddings into the arena."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_plugins.kv_connectors.epd import protocol
from vllm_plugins.kv_connectors.epd.media import (
    DIGEST_BYTES,
    MalformedError,
    Shape,
    Source,
    is_hexadecimal,
)
from vllm_plugins.wire.connection import Connection, connect
from vllm_plugins.wire.errors import (
    WireClosedError,
    WireDamagedError,
    WireError,
    WireRefusedError,
    WireTimeoutError,
)
from vllm_plugins.wire.frame import printable

if TYPE_CHECKING:
    from vllm_plugins.kv_connectors.epd.arena import Entry
    from vllm_plugins.kv_connectors.epd.shared_memory import SharedMemory
    from vllm_plugins.wire.address import Address
    from vllm_plugins.wire.frame import Frame

logger = init_logger("vllm.vllm_plugins.epd")

# An encode server that stalls keeps one thread per item until the item's time is up, and must leave
# some to others.
NUM_THREADS, MOST_PER_SERVER = 16, 8
CONNECT_TIMEOUT_S = 5.0
# A frame that nobody waits for, such as the end of a lease, may not hold a thread for long.
NOTICE_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 5.0
TRIES = 2
# Open connections of one thread; encode servers that were restarted would pile up.
MOST_PEERS = 16
# Unused for so long, a connection is closed: a dead server's would stay.
IDLE_S = 10.0
# Outcome of a fetch that is to be tried again.
_NOT_YET = "not yet"

Done = Callable[[str, str], None]
"""Told why an item is missing, by a label of the metric, or else its digest in hexadecimal."""


_Job = Callable[["_Peers"], None]
"""What a thread does, over the connections that it has open."""


class MissingError(Exception):
    """The encode server does not have what was asked for.

    Args:
        reason: Label of the metric.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class NotYetError(Exception):
    """The encode server does not have an awaited item yet."""


class Fetcher:
    """Fetches items, renews and ends leases, each in one of a few threads.

    Args:
        memory: Where an entry's rows go.
        secret: Of the wire.
    """

    def __init__(self, memory: SharedMemory, secret: bytes) -> None:
        self._memory = memory
        self._secret = secret
        self._jobs: queue.SimpleQueue[tuple[Address, _Job] | None] = queue.SimpleQueue()
        # Guards what follows: threads at work for each server, and jobs that wait for one of them.
        self._lock = threading.Lock()
        self._busy: Counter[Address] = Counter()
        self._waiting: dict[Address, deque[_Job]] = {}
        self._limits = protocol.client_limits(memory.location.nbytes)
        self._threads = [
            threading.Thread(target=self._work, name=f"epd-fetch-{i}", daemon=True)
            for i in range(NUM_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def fetch(self, entry: Entry, source: Source, deadline: float, done: Done) -> None:
        """Fetch an item into the room that was reserved for it.

        Args:
            entry: The room.
            source: Where it is.
            deadline: On the monotonic clock, in seconds.
            done: Called in a thread, with the outcome.
        """

        def job(peers: _Peers) -> None:
            missing = self._outcome(peers, entry, source, deadline)
            if missing == _NOT_YET:
                # Behind whatever else is to be fetched.
                self._jobs.put((source.address, job))
            else:
                done(missing, "" if missing else self._memory.stamped(entry.blocks[0])[1])

        self._jobs.put((source.address, job))

    def release(self, source: Source, media: str) -> None:
        """End the lease on an item that is here or no longer wanted, if one is known."""
        if not source.lease:
            return
        header = {"generation": source.generation, "lease": source.lease, "media": media}
        self._notify(source, protocol.RELEASE, header)

    def renew(self, source: Source) -> None:
        """Renew a lease on items that have no room here yet, if one is known."""
        if not source.lease:
            return
        header = {"generation": source.generation, "lease": source.lease}
        self._notify(source, protocol.RENEW, header)

    def close(self) -> None:
        """End the threads once what is queued is done; what a peer keeps is left alone."""
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _notify(self, source: Source, kind: int, header: dict[str, Any]) -> None:
        self._jobs.put((source.address, lambda peers: _notify(peers, source, kind, header)))

    def _work(self) -> None:
        peers = _Peers(self._secret, self._limits)
        while (next_one := self._next(peers)) is not None:
            address, job = next_one
            if not self._may_begin(address, job):
                continue
            try:
                job(peers)
            except Exception:
                # The thread serves other requests too.
                logger.exception("vllm-plugins: epd: what follows a fetch failed")
            self._ended(address)
        peers.close()

    def _next(self, peers: _Peers) -> tuple[Address, _Job] | None:
        while True:
            try:
                return self._jobs.get(timeout=IDLE_S if peers.any_open else None)
            except queue.Empty:
                peers.close(IDLE_S)

    def _may_begin(self, address: Address, job: _Job) -> bool:
        """Whether a server may have one more thread; its job waits for another one otherwise."""
        with self._lock:
            if self._busy[address] < MOST_PER_SERVER:
                self._busy[address] += 1
                return True
            self._waiting.setdefault(address, deque()).append(job)
            return False

    def _ended(self, address: Address) -> None:
        """Take a thread back, and let the next job of the server have one."""
        with self._lock:
            self._busy[address] -= 1
            if not self._busy[address]:
                del self._busy[address]
            waiting = self._waiting.get(address)
            if waiting:
                self._jobs.put((address, waiting.popleft()))
            else:
                self._waiting.pop(address, None)

    def _outcome(self, peers: _Peers, entry: Entry, source: Source, deadline: float) -> str:
        try:
            return self._fetch(peers, entry, source, deadline)
        except Exception:
            # The thread serves other requests too, and this one's must hear how it went.
            logger.exception("vllm-plugins: epd: fetching item %s failed", entry.media)
            return "internal"

    def _fetch(self, peers: _Peers, entry: Entry, source: Source, deadline: float) -> str:
        """Fetch and check an item; return why it is missing, or nothing."""
        reason = "timeout"
        for _ in range(TRIES):
            if time.monotonic() >= deadline:
                break
            try:
                self._fetch_rows(peers, entry, source, deadline)
            except NotYetError:
                return _NOT_YET
            except (MissingError, WireError, MalformedError) as error:
                reason = _reason(error)
                logger.warning(
                    "vllm-plugins: epd: item %s was not fetched from %s: %s",
                    entry.media,
                    source.address,
                    error,
                )
                if isinstance(error, MissingError) and reason == "gone":
                    break
            else:
                return ""
        return reason

    def _fetch_rows(self, peers: _Peers, entry: Entry, source: Source, deadline: float) -> None:
        promised = source.digest
        for first, count, piece in self._memory.runs(entry.blocks, entry.shape):
            header = {
                "media": entry.media,
                "generation": source.generation,
                "first": first,
                "rows": count,
                "wait": source.shape is None,
            }
            into = _destination(piece, entry.shape)
            answer = peers.request(source.address, protocol.FETCH, header, _left(deadline), into)
            if answer.kind != protocol.ROWS:
                raise _missing(answer.header, source)
            if len(answer.payload) != len(piece):
                raise MissingError("mismatch", "the encode server sent no rows")
            # An awaited item's digest is the encode server's word alone.
            promised = promised or _digest(answer.header)
        digest = self._memory.digest(entry.blocks, entry.shape)
        if digest != promised:
            raise MissingError("damaged", "the rows do not match their checksum")
        self._memory.stamp(entry.blocks[0], entry.sequence, digest)


class _Peers:
    """One thread's open connections, by address."""

    def __init__(self, secret: bytes, limits: Any) -> None:
        self._secret = secret
        self._limits = limits
        # With the time of their last use, in the order of these.
        self._open: dict[Address, tuple[float, Connection]] = {}

    @property
    def any_open(self) -> bool:
        """Whether there are any."""
        return bool(self._open)

    def request(
        self,
        address: Address,
        kind: int,
        header: dict[str, Any],
        timeout_s: float,
        into: Callable[[int, dict[str, Any]], memoryview] | None = None,
    ) -> Frame:
        """Ask a peer, over a connection that is open or a new one, all of it in so many seconds."""
        deadline = time.monotonic() + timeout_s
        self.close(IDLE_S)
        _, connection = self._open.pop(address, (0.0, None))
        if len(self._open) >= MOST_PEERS:
            self._open.pop(next(iter(self._open)))[1].close()
        if connection is not None:
            # The peer closes what is idle, which is no failure.
            with suppress(WireClosedError):
                return self._ask(address, connection, deadline, kind, header, into)
        connection = connect(
            address,
            self._secret,
            limits=self._limits,
            connect_timeout_s=min(_left(deadline), CONNECT_TIMEOUT_S),
            role="epd prefill",
        )
        return self._ask(address, connection, deadline, kind, header, into)

    def _ask(
        self,
        address: Address,
        connection: Connection,
        deadline: float,
        kind: int,
        header: dict[str, Any],
        into: Callable[[int, dict[str, Any]], memoryview] | None,
    ) -> Frame:
        """Ask over a connection, which is kept if that goes well."""
        try:
            connection.timeout_s = _left(deadline)
            connection.send(kind, header)
            connection.timeout_s = _left(deadline)
            frame = connection.receive(into)
        except BaseException:
            connection.close()
            raise
        self._open[address] = time.monotonic(), connection
        return frame

    def close(self, least_s: float = 0.0) -> None:
        """Close the connections that were idle for so long."""
        now = time.monotonic()
        for address, (since, connection) in list(self._open.items()):
            if now - since >= least_s:
                connection.close()
                del self._open[address]


def _left(deadline: float) -> float:
    """Return the seconds up to a deadline, or a moment where it is over."""
    return max(deadline - time.monotonic(), 0.001)


def _destination(piece: memoryview, shape: Shape) -> Callable[[int, dict[str, Any]], memoryview]:
    def into(num_bytes: int, header: dict[str, Any]) -> memoryview:
        if Shape.from_json(header) != shape or num_bytes != len(piece):
            raise MissingError("mismatch", "the encode server's rows have another shape")
        return piece

    return into


def _missing(header: dict[str, Any], source: Source) -> Exception:
    """Return why a fetch was answered without rows."""
    if source.shape is None and header.get("lasting") is not True:
        return NotYetError()
    return MissingError("gone", printable(header.get("reason")))


def _digest(header: dict[str, Any]) -> str:
    digest = header.get("checksum")
    if not isinstance(digest, str) or not is_hexadecimal(digest, DIGEST_BYTES):
        raise MissingError("mismatch", "the encode server sent no checksum")
    return digest


def _notify(peers: _Peers, source: Source, kind: int, header: dict[str, Any]) -> None:
    try:
        peers.request(source.address, kind, header, NOTICE_TIMEOUT_S)
    except WireError as error:
        # The lease runs out by itself, or what it was for is missing when it is fetched.
        logger.debug("vllm-plugins: epd: %s did not take a notice: %s", source.address, error)


def _reason(error: Exception) -> str:
    if isinstance(error, MissingError):
        return error.reason
    if isinstance(error, WireTimeoutError):
        return "timeout"
    if isinstance(error, WireDamagedError | MalformedError):
        return "damaged"
    return "refused" if isinstance(error, WireRefusedError) else "unreachable"
