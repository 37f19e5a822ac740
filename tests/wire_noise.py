"""Noise for the wire: bytes near a valid frame, and messages that are whole frames but lie."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tests.unit.wire_ends import frame_bytes, raw_client
from vllm_plugins.kv_connectors.pd.protocol import Kind, PullRequest, Span
from vllm_plugins.wire.address import Address
from vllm_plugins.wire.connection import Connection, connect
from vllm_plugins.wire.frame import HELLO, PROOF, Limits, encode_header
from vllm_plugins.wire.handshake import Hello
from vllm_plugins.wire.secret import load_secret

WRONG = (
    None,
    True,
    -1,
    0,
    1,
    7,
    1 << 31,
    1 << 62,
    1e300,
    "",
    "x" * 300,
    "0" * 32,
    [],
    {},
    [[0, 1]],
)


def lying(header: Mapping[str, Any], chance: random.Random) -> dict[str, Any]:
    """Return a header of which one value, at any depth, is another or not there."""
    lie: dict[str, Any] = json.loads(json.dumps(header))
    at: Any = lie
    while True:
        key = chance.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if not isinstance(at[key], dict | list) or not at[key] or chance.random() < 0.3:
            break
        at = at[key]
    if chance.random() < 0.2:
        del at[key]
    else:
        at[key] = chance.choice(WRONG)
    return lie


def mutated(valid: bytes, chance: random.Random) -> bytes:
    """Return something near a valid frame that is not equal to it, or pure noise."""
    data = bytearray(valid)
    way = chance.randrange(6)
    if way == 0:
        return chance.randbytes(chance.randrange(1, 300))
    if way == 1:
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif way == 2:
        del data[chance.randrange(len(data)) :]
    elif way == 3:
        place = chance.randrange(len(data))
        data[place:place] = chance.randbytes(chance.randrange(1, 20))
    elif way == 4:
        start = chance.randrange(len(data))
        del data[start : start + chance.randrange(1, 20)]
    else:
        start = chance.randrange(len(data))
        data[start : start + 8] = b"\xff" * min(8, len(data) - start)
    return bytes(data) if data != valid else chance.randbytes(40)


def send_all(sock: socket.socket, data: bytes) -> bytes:
    """Send, end, and return all that came back; the other end may be gone by then."""
    sock.settimeout(5)
    answer = b""
    try:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while piece := sock.recv(4096):
            answer += piece
    except OSError as error:
        # The other end has gone, which is how it refuses; a hang would be a timeout.
        assert not isinstance(error, TimeoutError)
    return answer


class WorkerNoise:
    """Sends noise to a prefill worker that holds a prompt.

    Args:
        bait: The prompt's reference.
        address: Of the worker; by TCP.
        chance: Draws everything.
    """

    def __init__(self, bait: Mapping[str, Any], address: Address, chance: random.Random) -> None:
        self._address, self._chance, self._secret = address, chance, load_secret(None)
        self._named = {"generation": bait["peers"][0]["generation"]}
        self._transfer = bait["transfer_id"]
        with self._connected() as connection:
            shard = connection.request(Kind.DESCRIBE, self._named).header
        blocks = Span(0, bait["num_tokens"] // 32)
        layers = tuple((name, 0) for name in shard["layers"])
        wanted = PullRequest(
            self._transfer, bait["digest"], (blocks,), layers, tuple(shard["heads"]), 0, 1, 0
        )
        self._pull = wanted.to_json() | self._named
        self._pieces = self._pulled()

    def send(self) -> None:
        """Send one frame that is wrong, and wait until the worker has ended the connection."""
        way = self._chance.randrange(4)
        if way == 0:
            self._as_stranger()
        else:
            self._as_peer(damaged=way == 1)

    def check_bait(self) -> None:
        """Check that the prompt's KV is what it was."""
        assert self._pieces == self._pulled()

    def release_bait(self) -> None:
        """Let the prompt go."""
        with self._connected() as connection:
            connection.request(Kind.RELEASE, self._named | {"transfers": [self._transfer]})

    def _as_stranger(self) -> None:
        hello = frame_bytes(HELLO, encode_header(asdict(Hello.new("fuzz", Limits()))))
        proof = frame_bytes(PROOF, b'{"mac":"%s"}' % (b"0" * 64), sequence=1)
        data = self._chance.choice((mutated(hello, self._chance), hello + proof,
                                    hello + mutated(proof, self._chance)))  # fmt: skip
        with socket.create_connection((self._address.host, self._address.port), 5) as sock:
            send_all(sock, data)

    def _as_peer(self, *, damaged: bool) -> None:
        stream, seed = raw_client(self._address, self._secret)
        kind = self._chance.choice(list(Kind))
        names = [self._transfer] if kind is Kind.RENEW else ["nobody"]
        header = self._pull if kind is Kind.PULL else self._named | {"transfers": names}
        # A renewal that is true keeps the bait where it is.
        lie = header if damaged or kind is Kind.RENEW else lying(header, self._chance)
        if isinstance(lie.get("transfer"), str):
            # A prompt of another name may yet be computed, and would be waited for.
            lie["transfer"] = self._transfer
        payload = self._chance.randbytes(self._chance.randrange(200))
        frame = frame_bytes(kind, encode_header(lie), payload, 2, seed)
        send_all(stream._socket, mutated(frame, self._chance) if damaged else frame)
        stream.close()

    def _pulled(self) -> list[tuple[str, int, bytes]]:
        with self._connected() as connection:
            connection.send(Kind.PULL, self._pull)
            pieces = []
            while (frame := connection.receive()).kind == Kind.PIECE:
                at = frame.header
                pieces.append((at["layer"], at["first"], bytes(frame.payload)))
            assert frame.kind == Kind.END and pieces
        return sorted(pieces)

    def _connected(self) -> Connection:
        return connect(self._address, self._secret, timeout_s=10)
