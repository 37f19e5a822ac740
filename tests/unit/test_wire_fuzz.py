"""Noise and mutated frames, to both ends, before and after the handshake: 10,000 in all."""

import logging
import random
import socket
from dataclasses import asdict

import pytest

from tests.unit.wire_ends import (
    ECHO,
    SECRET,
    echo_server,
    frame_bytes,
    held,
    nothing_leaked,
    pair,
    raw_client,
    soon,
    wait_until,
)
from tests.wire_noise import mutated, send_all
from vllm_plugins.wire.connection import connect
from vllm_plugins.wire.errors import WireError
from vllm_plugins.wire.frame import ERROR, HELLO, PROOF, Limits, encode_header
from vllm_plugins.wire.handshake import Hello, greet_server

LIMITS = Limits(header_bytes=1000, payload_bytes=10_000)


@pytest.fixture(scope="module")
def server():
    logger = logging.getLogger("vllm.vllm_plugins.wire")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    before = held()
    try:
        with echo_server(timeout_s=1.0, limits=LIMITS) as running:
            yield running
            with connect(running.address, SECRET) as connection:
                assert connection.request(ECHO, {}, b"still served").payload == b"still served"
        wait_until(lambda: nothing_leaked(before))
    finally:
        logger.setLevel(level)


def test_strangers_cannot_upset_the_server(server):
    chance = random.Random(1)
    hello = encode_header(asdict(Hello.new("fuzz", Limits())))
    for i in range(2000):
        valid = frame_bytes(HELLO, hello)
        data = mutated(valid, chance)
        if i % 4 == 0:
            # A good HELLO, then something that is not a proof.
            proof = frame_bytes(PROOF, b'{"mac":"%s"}' % (b"0" * 64), sequence=1)
            data = valid + (mutated(proof, chance) if i % 8 else proof)
        with socket.create_connection((server.address.host, server.address.port)) as sock:
            answer = send_all(sock, data)
        # A HELLO or an ERROR or nothing, but never a proof.
        assert PROOF.to_bytes(2) not in (answer[6:8], answer[len(valid) + 6 : len(valid) + 8])


def test_clients_that_know_the_secret_cannot_upset_the_server(server):
    chance = random.Random(2)
    for i in range(2000):
        stream, seed = raw_client(server.address)
        valid = frame_bytes(ECHO, b'{"a":[1,2,3]}', b"payload" * 10, sequence=2, seed=seed)
        bad = frame_bytes(chance.randrange(1 << 16), chance.randbytes(20), b"", 2, seed)
        data = bad if i % 5 == 0 else mutated(valid, chance)
        answer = send_all(stream._socket, data)
        stream.close()
        # Nothing that was sent is echoed, unless it came before the mutation.
        assert b"payload" not in answer or data.startswith(valid)


def test_a_server_cannot_upset_a_client():
    chance = random.Random(3)
    for i in range(6000):
        stream, theirs = pair(LIMITS)
        with theirs:
            if i % 3 == 0:
                hello = encode_header(asdict(Hello.new("fuzz", Limits())))
                theirs.sendall(mutated(frame_bytes(HELLO, hello), chance))
                theirs.shutdown(socket.SHUT_WR)
                with pytest.raises(WireError):
                    greet_server(stream, SECRET, "client", Limits(), soon(1.0))
            else:
                valid = frame_bytes(ECHO if i % 2 else ERROR, b'{"error":"x"}', b"payload" * 10)
                data = mutated(valid, chance)
                theirs.sendall(data)
                theirs.shutdown(socket.SHUT_WR)
                if not data.startswith(valid):
                    with pytest.raises(WireError):
                        stream.receive(soon(1.0))
        stream.close()
