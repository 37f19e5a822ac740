"""Connections to a real server: transport, handshake, errors, deadlines, faults on the way."""

import logging
import socket
import threading
import time
from dataclasses import replace

import pytest

from tests.unit.wire_ends import (
    ANGRY,
    BROKEN,
    ECHO,
    SECRET,
    echo_server,
    frame_bytes,
    over_tcp,
    raw_client,
    soon,
)
from tests.wire_faults import DOWN, UP, Fault, FaultyProxy
from vllm_plugins.wire.address import Address
from vllm_plugins.wire.connection import connect
from vllm_plugins.wire.errors import (
    WireClosedError,
    WireDamagedError,
    WireError,
    WireRefusedError,
    WireTimeoutError,
)
from vllm_plugins.wire.frame import ERROR, HELLO, RESERVED_KINDS, VERSION, Limits
from vllm_plugins.wire.handshake import greet_server
from vllm_plugins.wire.server import Server
from vllm_plugins.wire.stream import FrameStream


@pytest.fixture(scope="module")
def server():
    with echo_server() as running:
        yield running


@pytest.fixture(params=["unix", "tcp"])
def address(request, server):
    return server.address if request.param == "unix" else over_tcp(server.address)


def test_both_transports_carry_requests(server):
    with connect(server.address, SECRET, role="decode 0") as near:
        assert near.local
        assert near.peer == f"echo at unix:{server.address.unix}"
        assert near.request(ECHO, {"a": 1}, b"xy", b"z").payload == b"xyz"
    with connect(over_tcp(server.address), SECRET) as far:
        assert not far.local
        assert far.peer == f"echo at {server.address}"
        assert far.request(ECHO, {"a": 1}, b"xy", b"z").header == {"a": 1}


def test_a_socket_of_another_host_or_a_dead_server_leaves_tcp(server):
    elsewhere = replace(server.address, host_id="0" * 32)
    gone = replace(server.address, unix="vllm-plugins-" + "0" * 32)
    for address in (elsewhere, gone):
        with connect(address, SECRET) as connection:
            assert not connection.local
            assert connection.request(ECHO, {}).kind == ECHO


def test_64_mib_go_there_and_come_back_into_a_given_buffer(address):
    size = 64 << 20
    sent = memoryview(bytearray(b"0123456789abcdef" * (size // 16)))
    place = memoryview(bytearray(size))
    with connect(address, SECRET) as connection:
        frame = connection.request(ECHO, {}, sent[:1000], sent[1000:], into=lambda n, h: place)
    assert frame.payload.obj is place.obj
    assert place == sent


def test_an_error_of_a_handler_is_told_and_the_server_goes_on(address, caplog):
    told = r"echo at .*: the peer refuses: this kind is not served"
    with connect(address, SECRET) as connection, pytest.raises(WireRefusedError, match=told):
        connection.request(ANGRY, {})
    with connect(address, SECRET) as connection, pytest.raises(WireClosedError):
        connection.request(BROKEN, {})
    assert [r.levelname for r in caplog.records if "serving" in r.message] == ["ERROR"]
    with connect(address, SECRET) as connection:
        assert connection.request(ECHO, {}).kind == ECHO


def test_what_the_peer_accepts_is_known_before_it_is_sent():
    limits = Limits(header_bytes=40, payload_bytes=100)
    with (
        echo_server(limits=limits) as server,
        connect(server.address, SECRET) as connection,
    ):
        with pytest.raises(WireRefusedError, match="payloads of 100 bytes, not of 2 and 101"):
            connection.send(ECHO, {}, bytes(101))
        with pytest.raises(WireRefusedError, match="accepts headers of 40"):
            connection.send(ECHO, {"long": "x" * 40})
        assert connection.request(ECHO, {}, bytes(100)).payload == bytes(100)


@pytest.mark.parametrize("unix", [True, False])
def test_a_client_that_exceeds_the_limits_all_the_same_is_told(unix):
    with echo_server(limits=Limits(payload_bytes=100)) as server:
        address = server.address if unix else over_tcp(server.address)
        with connect(address, SECRET) as connection:
            connection._peer_limits = Limits()
            with pytest.raises(WireRefusedError, match="101 payload_bytes exceeds the limit"):
                connection.request(ECHO, {}, bytes(101))
        with connect(address, SECRET) as connection:
            connection._peer_limits = Limits()
            # The server has closed long before everything is sent.
            with pytest.raises(WireRefusedError, match="payload_bytes exceeds the limit"):
                connection.request(ECHO, {}, bytes(64 << 20))


@pytest.mark.parametrize("kind", [-1, RESERVED_KINDS, ERROR, 1 << 16])
def test_kinds_of_the_wire_itself_cannot_be_sent(server, kind):
    with connect(server.address, SECRET) as connection, pytest.raises(ValueError, match="kind"):
        connection.send(kind, {})


def test_a_wrong_secret_is_refused_on_both_sides_with_one_log_line(address, caplog):
    with pytest.raises(WireRefusedError, match="the peer refuses: the secrets of the two ends"):
        connect(address, SECRET[::-1])
    with connect(address, SECRET) as connection:
        connection.request(ECHO, {})
    assert [r.message for r in caplog.records if "secrets" in r.message] != []
    assert len(caplog.records) == 1
    assert SECRET.decode() not in caplog.text


def fake_server(answer):
    """Start a server that is none of ours; `answer` gets the socket of one client."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run():
        sock, _ = listener.accept()
        with listener, sock:
            answer(sock)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return Address("127.0.0.1", listener.getsockname()[1]), thread


def test_a_server_that_does_not_know_the_secret_is_refused():
    def answer(sock):
        stream = FrameStream(sock, Limits(), "client")
        hello = stream.receive(soon())
        stream.send(HELLO, {**hello.header, "nonce": "0" * 64}, (), soon())
        proof = stream.receive(soon())
        # A false proof, shaped like the true one.
        stream.send(proof.kind, {"mac": proof.header["mac"][::-1]}, (), soon())

    address, thread = fake_server(answer)
    with pytest.raises(WireRefusedError, match="secrets of the two ends differ"):
        connect(address, SECRET)
    thread.join(5)


def test_a_reflected_handshake_is_refused():
    def answer(sock):
        while data := sock.recv(4096):
            sock.sendall(data)

    address, thread = fake_server(answer)
    with pytest.raises(WireRefusedError, match="secrets of the two ends differ"):
        connect(address, SECRET)
    thread.join(5)


def test_a_replayed_handshake_is_refused(server):
    heard = []
    with socket.create_connection((server.address.host, server.address.port)) as first:

        class Recording:
            family = socket.AF_INET

            def __getattr__(self, name):
                return getattr(first, name)

            def sendmsg(self, buffers, *rest):
                heard.append(b"".join(buffers))
                return first.sendmsg(buffers, *rest)

        stream = FrameStream(Recording(), Limits(), "test")
        greet_server(stream, SECRET, "honest", Limits(), soon())
    with socket.create_connection((server.address.host, server.address.port)) as second:
        stream = FrameStream(second, Limits(), "test")
        second.sendall(heard[0])
        assert stream.receive(soon()).kind == HELLO
        second.sendall(heard[1])
        frame = stream.receive(soon())
    assert frame.kind == ERROR
    assert "secrets" in frame.header["error"]


def test_another_version_is_refused_in_words_on_both_sides(server, caplog):
    with socket.create_connection((server.address.host, server.address.port)) as sock:
        hello = bytearray(frame_bytes(HELLO, b"{}"))
        hello[4] = VERSION + 1
        sock.sendall(hello)
        frame = FrameStream(sock, Limits(), "test").receive(soon())
    assert frame.kind == ERROR
    assert "speaks version 2 of the wire, this end version 1" in frame.header["error"]

    def answer(sock):
        sock.recv(4096)
        sock.sendall(hello)

    address, thread = fake_server(answer)
    with pytest.raises(WireRefusedError, match="speaks version 2 of the wire, this end version 1"):
        connect(address, SECRET)
    thread.join(5)


def test_something_else_that_listens_there_is_named():
    address, thread = fake_server(lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n" * 3))
    with pytest.raises(WireDamagedError, match=f"{address}: what arrived is not a frame of this"):
        connect(address, SECRET)
    thread.join(5)


def test_nobody_listens_there():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(WireClosedError, match=f"127.0.0.1:{port}: cannot be reached: .*refused"):
        connect(Address("127.0.0.1", port), SECRET)


def test_a_server_that_accepts_and_says_nothing_is_a_timeout():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        start = time.monotonic()
        with pytest.raises(WireTimeoutError):
            connect(Address(*listener.getsockname()), SECRET, connect_timeout_s=0.1)
        assert time.monotonic() - start < 4


@pytest.mark.parametrize("role", ["", "x" * 65, "line\nline"])
def test_roles_are_names(server, role):
    with pytest.raises(ValueError, match="role"):
        connect(server.address, SECRET, role=role)


def test_a_frame_replayed_by_a_client_ends_its_connection(server):
    stream, seed = raw_client(server.address)
    # The handshake took two frames of this direction.
    frame = frame_bytes(ECHO, b"{}", b"once", sequence=2, seed=seed)
    stream._socket.setblocking(True)
    stream._socket.sendall(2 * frame)
    stream._socket.setblocking(False)
    assert stream.receive(soon()).payload == b"once"
    with pytest.raises(WireClosedError):
        stream.receive(soon())
    stream.close()


def exchange(address: Address, payload: bytes = b"payload" * 100, timeout_s: float = 5.0):
    with connect(address, SECRET, timeout_s=timeout_s, connect_timeout_s=timeout_s) as connection:
        frame = connection.request(ECHO, {"x": [1, 2]}, payload)
        assert (frame.kind, frame.header, frame.payload) == (ECHO, {"x": [1, 2]}, payload)


@pytest.fixture(scope="module")
def proxy(server):
    with FaultyProxy(server.address) as running:
        exchange(running.address)
        running.whole = dict(running.carried)
        yield running


@pytest.mark.parametrize("direction", [UP, DOWN])
def test_a_connection_cut_after_any_byte_is_an_error_and_the_server_goes_on(proxy, direction):
    for kind, step in (("truncate", 7), ("reset", 31)):
        for at in range(1, proxy.whole[direction], step):
            proxy.fault = Fault(kind, at=at, direction=direction)
            with pytest.raises(WireClosedError):
                exchange(proxy.address)
    proxy.fault = Fault("none")
    exchange(proxy.address)


@pytest.mark.parametrize("direction", [UP, DOWN])
def test_a_bit_flipped_on_the_way_is_never_accepted(proxy, direction):
    for at in range(0, proxy.whole[direction], 5):
        proxy.fault = Fault("flip", at=at, bit=at % 8, direction=direction)
        with pytest.raises(WireError):
            exchange(proxy.address)
    proxy.fault = Fault("none")
    exchange(proxy.address)


@pytest.mark.parametrize("direction", [UP, DOWN])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.99])
def test_a_stall_for_ever_is_a_timeout(proxy, direction, part):
    proxy.fault = Fault("stall", at=int(proxy.whole[direction] * part), direction=direction)
    start = time.monotonic()
    with pytest.raises(WireTimeoutError):
        exchange(proxy.address, timeout_s=0.2)
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("at", [0, 600])
def test_a_trickling_peer_hits_the_deadline(proxy, at):
    proxy.fault = Fault("trickle", at=at, direction=DOWN, seconds=0.005)
    start = time.monotonic()
    with pytest.raises(WireTimeoutError):
        exchange(proxy.address, timeout_s=0.3)
    assert time.monotonic() - start < 4


def test_a_slow_network_is_no_fault(proxy):
    proxy.fault = Fault("delay", direction=DOWN, seconds=0.02)
    exchange(proxy.address)


def test_refused_connections_and_a_network_that_goes_are_closed(proxy):
    proxy.fault = Fault("refuse")
    with pytest.raises(WireClosedError):
        exchange(proxy.address)
    proxy.fault = Fault("none")
    with connect(proxy.address, SECRET) as connection:
        connection.request(ECHO, {})
        proxy.cut()
        with pytest.raises(WireClosedError):
            connection.request(ECHO, {})
        with pytest.raises(WireClosedError):
            connection.receive()


def test_an_error_ends_the_connection_but_a_refusal_does_not(server):
    def into(size, header):
        raise WireRefusedError("no room")

    with connect(server.address, SECRET) as connection:
        with pytest.raises(WireRefusedError, match="no room"):
            connection.request(ECHO, {}, b"data", into=into)
        assert connection.request(ECHO, {}, b"data").payload == b"data"
        connection.timeout_s = 0.02
        with pytest.raises(WireTimeoutError):
            connection.receive()
        with pytest.raises(WireClosedError):
            connection.send(ECHO, {})
        connection.close()


def test_waiting_for_a_frame_and_receiving_it_have_limits_of_their_own(server):
    with connect(server.address, SECRET, timeout_s=0.2) as connection:
        connection.idle_timeout_s = 10.0
        timer = threading.Timer(0.4, lambda: connection.send(ECHO, {}))
        timer.start()
        assert connection.receive().kind == ECHO
        timer.join()
        connection.idle_timeout_s = 0.02
        with pytest.raises(WireTimeoutError):
            connection.receive()


def test_another_thread_can_interrupt(server):
    with connect(server.address, SECRET) as connection:
        timer = threading.Timer(0.05, connection.interrupt)
        timer.start()
        start = time.monotonic()
        with pytest.raises(WireClosedError):
            connection.receive()
        assert time.monotonic() - start < 4
        timer.join()
        connection.interrupt()


def test_frames_of_the_handshake_have_no_place_later(caplog):
    def serve(connection):
        connection._stream.send(HELLO, {}, (), soon())
        connection.receive()

    with (
        Server(serve, SECRET) as server,
        connect(server.address, SECRET) as connection,
        pytest.raises(WireDamagedError, match="kind 0xff00 has no place here"),
    ):
        connection.receive()


def test_the_log_level_of_a_client_that_leaves_is_debug(server, caplog):
    caplog.set_level(logging.INFO)
    with connect(server.address, SECRET) as connection:
        connection.request(ECHO, {})
    with connect(server.address, SECRET) as connection:
        connection.request(ECHO, {})
    assert caplog.records == []
