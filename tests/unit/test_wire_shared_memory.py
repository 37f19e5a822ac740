"""Shared memory: made by one end, mapped by the other, gone with the last of them."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.unit.wire_ends import SECRET, echo_server, held, nothing_leaked, over_tcp, wait_until
from vllm_plugins.wire.connection import Connection, connect
from vllm_plugins.wire.errors import WireClosedError, WireDamagedError, WireError, WireRefusedError
from vllm_plugins.wire.server import Server
from vllm_plugins.wire.shared_memory import SharedBuffer

ATTACH, WRITE = 1, 2


def write_into(connection: Connection) -> None:
    """Map what the client shares, and write into it when asked."""
    size = connection.receive().header["size"]
    with SharedBuffer.attach(connection.receive_descriptor(), size) as shared:
        while True:
            frame = connection.receive()
            start = frame.header["start"]
            shared.view[start : start + len(frame.payload)] = frame.payload
            connection.send(WRITE, {})


@pytest.fixture(scope="module")
def server():
    with Server(write_into, SECRET, timeout_s=5.0, name="writer") as running:
        # It has all its descriptors once it has accepted somebody.
        connect(running.address, SECRET).close()
        yield running


def test_the_writer_writes_where_the_reader_looks(server):
    before = held()
    with connect(server.address, SECRET) as connection, SharedBuffer.create(100_000) as shared:
        connection.send(ATTACH, {"size": 100_000})
        connection.send_descriptor(shared.descriptor)
        connection.request(WRITE, {"start": 99_990}, b"0123456789")
        assert shared.view[99_989:] == b"\x000123456789"
    wait_until(lambda: not server._streams)
    wait_until(lambda: nothing_leaked(before))


@pytest.mark.parametrize("size", [0, -1, 100_001, 1 << 62])
def test_a_lying_size_is_refused(server, size):
    before = held()
    with connect(server.address, SECRET) as connection, SharedBuffer.create(100_000) as shared:
        connection.send(ATTACH, {"size": size})
        connection.send_descriptor(shared.descriptor)
        with pytest.raises(
            WireRefusedError, match=f"has 100000 bytes and came with a size of {size}"
        ):
            connection.receive()
    wait_until(lambda: not server._streams)
    wait_until(lambda: nothing_leaked(before))


def test_memory_that_could_shrink_is_refused(tmp_path):
    before = held()
    bare = os.memfd_create("bare", os.MFD_ALLOW_SEALING)
    os.ftruncate(bare, 4096)
    with pytest.raises(WireRefusedError, match="not sealed against shrinking"):
        SharedBuffer.attach(bare, 4096)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 4096)
    with pytest.raises(WireRefusedError, match="cannot be mapped: Invalid argument"):
        SharedBuffer.attach(file, 4096)
    assert nothing_leaked(before)


def test_nobody_can_shrink_a_buffer():
    with SharedBuffer.create(4096) as shared:
        for size in (0, 4095, 8192):
            with pytest.raises(PermissionError):
                os.ftruncate(shared.descriptor, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(shared.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_buffer_without_memory_is_an_error_and_leaks_nothing():
    before = held()
    for size in (0, -1, 1 << 62):
        with pytest.raises((OSError, ValueError, OverflowError)):
            SharedBuffer.create(size)
    assert nothing_leaked(before)


def test_a_view_outlives_its_buffer():
    shared = SharedBuffer.create(4096)
    view = shared.view[:4]
    shared.close()
    shared.close()
    view[:] = b"here"
    assert bytes(view) == b"here"


def test_descriptors_do_not_travel_over_tcp(server):
    with connect(over_tcp(server.address), SECRET) as connection:
        with pytest.raises(WireRefusedError, match="travel over Unix sockets only"):
            connection.send_descriptor(0)
        with pytest.raises(WireRefusedError, match="travel over Unix sockets only"):
            connection.receive_descriptor()


def test_a_descriptor_that_nobody_expects_is_closed():
    before = held()
    with echo_server() as server, connect(server.address, SECRET) as connection:
        connection.send_descriptor(0)
        with pytest.raises(WireError):
            connection.receive()
    wait_until(lambda: nothing_leaked(before))


def test_a_frame_without_a_descriptor_is_not_one(server):
    for send in (
        lambda connection: connection.send(WRITE, {}),
        lambda connection: connection.send_error("no memory"),
    ):
        with connect(server.address, SECRET) as connection:
            connection.send(ATTACH, {"size": 1})
            send(connection)
            with pytest.raises(WireError):
                connection.receive()


def test_more_descriptors_than_one_are_closed():
    before = held()
    results = []

    def serve(connection):
        try:
            results.append(connection.receive_descriptor())
        except WireDamagedError as error:
            results.append(error)

    with Server(serve, SECRET) as server, connect(server.address, SECRET) as connection:
        sock = connection._stream._socket

        class Generous:
            def sendmsg(self, buffers, extra, flags):
                extra = [(level, kind, data * 5) for level, kind, data in extra]
                return sock.sendmsg(buffers, extra, flags)

            def close(self):
                sock.close()

        connection._stream._socket = Generous()
        connection.send_descriptor(0)
        wait_until(lambda: results)
    assert "does not share one file" in str(results[0])
    wait_until(lambda: nothing_leaked(before))


def test_received_descriptors_are_not_inherited_by_children():
    found = []
    received = threading.Event()

    def serve(connection):
        found.append(connection.receive_descriptor())
        received.set()

    with Server(serve, SECRET) as server, connect(server.address, SECRET) as connection:
        connection.send_descriptor(0)
        assert received.wait(5)
        assert not os.get_inheritable(found[0])
        os.close(found[0])


CHILD = """
import json, sys
from vllm_plugins.wire.shared_memory import SharedBuffer
from vllm_plugins.wire.address import Address
from vllm_plugins.wire.connection import connect
connection = connect(Address.from_json(json.loads(sys.argv[1])), bytes.fromhex(sys.argv[2]))
shared = SharedBuffer.create(1 << 20)
connection.send(1, {"size": 1 << 20})
connection.send_descriptor(shared.descriptor)
connection.request(2, {"start": 0}, b"x")
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_killed_reader_leaves_the_writer_unharmed_and_nothing_behind(server):
    before = held()
    words = [json.dumps(server.address.to_json()), SECRET.hex()]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"ready\n"
    assert len(server._streams) == 1
    child.send_signal(signal.SIGKILL)
    child.wait(10)
    child.stdin.close()
    child.stdout.close()
    wait_until(lambda: not server._streams)
    wait_until(lambda: nothing_leaked(before))


WRITER = """
import json, sys
from vllm_plugins.wire.shared_memory import SharedBuffer
from vllm_plugins.wire.address import Address
from vllm_plugins.wire.connection import connect
connection = connect(Address.from_json(json.loads(sys.argv[1])), bytes.fromhex(sys.argv[2]))
connection.send(1, {})
shared = SharedBuffer.attach(connection.receive_descriptor(), 1 << 20)
shared.view[-5:] = b"whole"
connection.send(2, {})
sys.stdin.read()
"""


def test_a_killed_writer_leaves_the_reader_what_it_has_written():
    before = held()
    written, ended, seen = threading.Event(), threading.Event(), []

    def read(connection):
        connection.receive()
        with SharedBuffer.create(1 << 20) as shared:
            connection.send_descriptor(shared.descriptor)
            connection.receive()
            written.set()
            with pytest.raises(WireClosedError):
                connection.receive()
            seen.append(bytes(shared.view[-6:]))
        ended.set()

    with Server(read, SECRET, timeout_s=20.0) as server:
        words = [json.dumps(server.address.to_json()), SECRET.hex()]
        child = subprocess.Popen([sys.executable, "-c", WRITER, *words], stdin=subprocess.PIPE)
        assert written.wait(20)
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        child.stdin.close()
        assert ended.wait(10)
    assert seen == [b"\0whole"]
    wait_until(lambda: nothing_leaked(before))


def test_abstract_sockets_leave_no_file(tmp_path):
    with echo_server() as server:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(f"\0{server.address.unix}")
        assert not Path(server.address.unix).exists()
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(f"\0{server.address.unix}")
