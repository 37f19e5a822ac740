"""Both ends of the wire for tests: an echo server, raw frames, and what a process holds."""

import socket
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from vllm_plugins.wire.address import Address
from vllm_plugins.wire.connection import Connection
from vllm_plugins.wire.frame import CHECKSUM, HELLO, PROOF, Limits, pack_prelude
from vllm_plugins.wire.handshake import CLIENT, SERVER, Hello, _Transcript
from vllm_plugins.wire.server import Server
from vllm_plugins.wire.stream import FrameStream

SECRET = b"a secret that tests know, and no one else".ljust(48, b".")
ECHO, ANGRY, BROKEN, COUNT = 1, 2, 3, 4


def echo(connection: Connection) -> None:
    """Answer each frame with itself; other kinds fail in the ways that a handler can."""
    while True:
        frame = connection.receive()
        if frame.kind == ANGRY:
            raise ValueError("this kind is not served")
        if frame.kind == BROKEN:
            raise RuntimeError("a fault of the server's own")
        connection.send(frame.kind, frame.header, frame.payload)


def echo_server(**changes) -> Server:
    return Server(echo, SECRET, **{"timeout_s": 5.0, "name": "echo", **changes})


def over_tcp(address: Address) -> Address:
    return replace(address, unix="")


def pair(limits: Limits | None = None) -> tuple[FrameStream, socket.socket]:
    """Return a stream and the bare socket at its other end."""
    ours, theirs = socket.socketpair()
    return FrameStream(ours, limits or Limits(), "test"), theirs


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def frame_bytes(kind: int, header: bytes, payload: bytes = b"", sequence: int = 0, seed: int = 0):
    """Return a frame as it stands on the wire, correct unless the arguments are not."""
    prelude = pack_prelude(kind, sequence, header, len(payload), seed)
    return prelude + header + payload + CHECKSUM.pack(zlib.crc32(payload, seed))


def raw_client(address: Address, secret: bytes = SECRET) -> tuple[FrameStream, int]:
    """Carry out a handshake; return the stream and the seed of what the client sends."""
    sock = socket.create_connection((address.host, address.port), timeout=5)
    stream = FrameStream(sock, Limits(), "test")
    mine = Hello.new("raw", Limits())
    stream.send(HELLO, asdict(mine), (), soon())
    transcript = _Transcript(secret, mine, Hello.read(stream.receive(soon())))
    stream.send(PROOF, {"mac": transcript.digest(CLIENT)}, (), soon())
    transcript.check(stream.receive(soon()), SERVER)
    seed = transcript.seed(CLIENT)
    stream.start_checksums(seed, transcript.seed(SERVER))
    return stream, seed


def held() -> tuple[int, int]:
    """Return how many descriptors and threads this process has."""
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


def nothing_leaked(before: tuple[int, int]) -> bool:
    """Return whether this process has no more of anything than before; ends may have ended."""
    return all(now <= then for now, then in zip(held(), before, strict=True))


def wait_until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for something that another thread does and signals to nobody."""
    deadline = soon(seconds)
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)
