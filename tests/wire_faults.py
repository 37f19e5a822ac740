"""A TCP proxy that misbehaves on command, for tests of what a connection does then.

    with FaultyProxy(server.address) as proxy:
        proxy.fault = Fault("reset", at=100, direction=DOWN)
        connect(proxy.address, secret)

A fault counts bytes of each connection from its beginning, handshake included; `proxy.carried`
tells how many bytes a fault-free exchange takes. The fault that is set when a connection is
accepted holds for that connection, and one that is set later for the connections after it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from vllm_plugins.wire.address import Address

UP: Literal["up"] = "up"
DOWN: Literal["down"] = "down"
_CHUNK_BYTES = 1 << 16
_RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Fault:
    """What goes wrong, in one direction of a connection.

    Attributes:
        kind: `delay` holds every piece of data for `seconds`, as a slow network; `stall` passes
            nothing on behind byte `at`, for ever; `reset` and `truncate` pass `at` bytes on and
            then reset the connection, or end it as if the sender had closed it; `flip` inverts bit
            `bit` of byte `at`; `trickle` passes one byte on every `seconds` behind byte `at`;
            `refuse` resets the connection when it is accepted.
        at: Bytes from the beginning of the connection.
        direction: `UP` from client to server, `DOWN` back.
        seconds: For `delay` and `trickle`.
        bit: For `flip`, 0 to 7.
    """

    kind: Literal["none", "delay", "stall", "reset", "truncate", "flip", "trickle", "refuse"]
    at: int = 0
    direction: Literal["up", "down"] = UP
    seconds: float = 0.0
    bit: int = 0


NO_FAULT = Fault("none")


class FaultyProxy:
    """Listens on loopback and passes bytes to and from a target, with a fault.

    Args:
        target: Where to connect to; by TCP, whatever else it offers.
        fault: The first connections' fault.
        listen: Host and port to listen on; by default any port of loopback.

    Attributes:
        target: Where it connects to.
        address: Where it listens; TCP only.
        fault: What happens to the connections that are accepted from now on.
        carried: Bytes passed on since the start, over all connections, by direction.
        accepted: Connections accepted since the start.
    """

    def __init__(
        self,
        target: Address,
        fault: Fault = NO_FAULT,
        listen: tuple[str, int] = ("127.0.0.1", 0),
    ) -> None:
        self.target = target
        self.fault = fault
        self.carried = {UP: 0, DOWN: 0}
        self.accepted = 0
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._links: list[_Link] = []
        self._listener = socket.create_server(listen, backlog=128)
        self.address = Address(*self._listener.getsockname())
        self._acceptor = threading.Thread(target=self._accept_all, daemon=True)

    def __enter__(self) -> Self:
        self._acceptor.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ending.set()
        # Wakes the thread that accepts.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        for link in self._links:
            link.end()

    def cut(self) -> None:
        """Reset all connections now, as if the network or a host had gone."""
        with self._lock:
            for link in self._links:
                link.reset()

    def count(self, direction: Literal["up", "down"], size: int) -> None:
        """Add to the bytes that were passed on."""
        with self._lock:
            self.carried[direction] += size

    def _accept_all(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            if self.fault.kind == "refuse":
                _reset(client)
                continue
            try:
                server = socket.create_connection((self.target.host, self.target.port))
            except OSError:
                _reset(client)
                continue
            link = _Link(self, client, server, self._ending)
            with self._lock:
                self._links = [one for one in self._links if not one.ended()]
                self._links.append(link)
            link.start()


class _Link:
    """One connection through the proxy: two sockets and a thread for each direction."""

    def __init__(
        self,
        proxy: FaultyProxy,
        client: socket.socket,
        server: socket.socket,
        ending: threading.Event,
    ) -> None:
        self._proxy, self._fault, self._ending = proxy, proxy.fault, ending
        self._sockets = (client, server)
        self._left = len(self._sockets)
        self._was_reset = False
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._pump, args=way, daemon=True)
            for way in ((UP, client, server), (DOWN, server, client))
        ]
        for sock in self._sockets:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def ended(self) -> bool:
        return self._left == 0

    def end(self) -> None:
        with self._lock:
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def reset(self) -> None:
        """Reset both sides; the threads close the sockets, which then sends the reset."""
        with self._lock:
            self._was_reset = True
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    sock.shutdown(socket.SHUT_RD)

    def _pump(
        self, direction: Literal["up", "down"], source: socket.socket, sink: socket.socket
    ) -> None:
        fault = self._fault if self._fault.direction == direction else NO_FAULT
        try:
            self._carry(fault, direction, source, sink)
        except OSError:
            # One end has gone: so does the other.
            self.reset()
        with self._lock:
            self._left -= 1
            if self.ended():
                for sock in self._sockets:
                    sock.close()

    def _carry(
        self,
        fault: Fault,
        direction: Literal["up", "down"],
        source: socket.socket,
        sink: socket.socket,
    ) -> None:
        carried = 0
        while data := bytearray(source.recv(_CHUNK_BYTES)):
            passed = self._apply(fault, data, carried)
            for piece in passed:
                if fault.kind in ("delay", "trickle") and carried >= fault.at:
                    self._ending.wait(fault.seconds)
                sink.sendall(piece)
                self._proxy.count(direction, len(piece))
                carried += len(piece)
            if fault.kind in ("stall", "reset", "truncate") and carried >= fault.at:
                break
        self._finish(fault, carried, source, sink)

    def _apply(self, fault: Fault, data: bytearray, carried: int) -> list[bytes]:
        here = max(0, fault.at - carried)
        if fault.kind in ("stall", "reset", "truncate"):
            return [bytes(data[:here])]
        if fault.kind == "flip" and carried <= fault.at < carried + len(data):
            data[here] ^= 1 << fault.bit
        if fault.kind == "trickle":
            return [bytes(data[:here]), *(bytes([byte]) for byte in data[here:])]
        return [bytes(data)]

    def _finish(
        self, fault: Fault, carried: int, source: socket.socket, sink: socket.socket
    ) -> None:
        struck = carried >= fault.at
        if fault.kind == "reset" and struck:
            self.reset()
        elif fault.kind == "stall" and struck:
            # The sender's bytes are taken and lost, so that it notices nothing.
            while source.recv(_CHUNK_BYTES):
                pass
        elif not self._was_reset:
            sink.shutdown(socket.SHUT_WR)
            if fault.kind == "truncate" and struck:
                source.shutdown(socket.SHUT_RD)


def _reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()
