"""The server: places, ends, leaks, and what it is told wrongly."""

import errno
import logging
import socket
import threading

import pytest

from tests.unit.wire_ends import (
    ECHO,
    SECRET,
    echo,
    echo_server,
    held,
    nothing_leaked,
    over_tcp,
    wait_until,
)
from vllm_plugins.errors import PluginError
from vllm_plugins.wire import connection as connection_module
from vllm_plugins.wire import server as server_module
from vllm_plugins.wire.connection import connect
from vllm_plugins.wire.errors import WireClosedError, WireError, WireRefusedError
from vllm_plugins.wire.server import Server


def test_it_binds_loopback_and_an_abstract_socket_by_default():
    with echo_server() as server:
        assert server.address.host == "127.0.0.1"
        assert server.address.port > 0
        assert server.address.unix.startswith("vllm-plugins-")
        assert len(server.address.host_id) == 32
    with echo_server(unix=False) as server:
        assert (server.address.unix, server.address.host_id) == ("", "")
        with connect(server.address, SECRET) as connection:
            assert not connection.local


def test_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        with pytest.raises(PluginError, match="cannot listen there"):
            echo_server(host="::1")
        return
    with echo_server(host="::1", unix=False) as server:
        assert str(server.address).startswith("[::1]:")
        with connect(server.address, SECRET) as connection:
            assert connection.request(ECHO, {}).kind == ECHO


def test_a_port_that_is_taken_is_refused_in_a_line():
    with echo_server() as server:
        port = server.address.port
        with pytest.raises(PluginError, match=rf"server on 127.0.0.1:{port}: cannot listen there"):
            echo_server(port=port)


def test_what_is_no_host_is_refused_in_a_line():
    with pytest.raises(PluginError, match=r"cannot listen there: .*label"):
        Server(echo, SECRET, host="a" * 70)


def test_a_name_that_peers_would_refuse_is_refused_at_once():
    before = held()
    with pytest.raises(ValueError, match="cannot be a role"):
        echo_server(name="a/b")
    assert nothing_leaked(before)


def test_clients_beyond_the_limit_are_told_and_places_come_back():
    with echo_server(max_connections=2) as server:
        for address in (server.address, over_tcp(server.address)):
            first, second = (connect(address, SECRET) for _ in range(2))
            with pytest.raises(WireRefusedError, match="2 connections are open, which is the limi"):
                connect(address, SECRET)
            first.close()
            wait_until(lambda: len(server._streams) < 2)
            with connect(address, SECRET) as third:
                assert third.request(ECHO, {}).kind == ECHO
            second.close()
            wait_until(lambda: not server._streams)


def test_a_silent_stranger_is_shown_out(monkeypatch, caplog):
    monkeypatch.setattr(server_module, "HANDSHAKE_TIMEOUT_S", 0.05)
    with (
        echo_server() as server,
        socket.create_connection((server.address.host, server.address.port)) as stranger,
    ):
        stranger.settimeout(5)
        assert stranger.recv(1) == b""
        assert "was refused: the peer did not send a whole frame in time" in caplog.text


def test_an_idle_client_is_shown_out():
    with (
        echo_server(idle_timeout_s=0.05) as server,
        connect(server.address, SECRET) as connection,
        pytest.raises(WireClosedError),
    ):
        connection.receive()


def test_stopping_ends_connections_in_every_state():
    before = held()
    server = echo_server()
    server.start()
    stranger = socket.create_connection((server.address.host, server.address.port))
    idle = connect(server.address, SECRET)
    busy = connect(over_tcp(server.address), SECRET, timeout_s=5)
    errors = []

    def send_for_ever():
        try:
            while True:
                busy.send(ECHO, {}, bytes(1 << 20))
        except WireError as error:
            errors.append(error)

    sender = threading.Thread(target=send_for_ever)
    sender.start()
    wait_until(lambda: len(server._streams) == 3)
    server.stop()
    sender.join(5)
    assert isinstance(errors[0], WireClosedError)
    with pytest.raises(WireClosedError):
        idle.receive()
    with pytest.raises(WireError):
        connect(server.address, SECRET)
    server.stop()
    for end in (stranger, idle, busy):
        end.close()
    wait_until(lambda: nothing_leaked(before))


def test_stopping_does_not_wait_for_ever_for_a_handler(caplog):
    entered, leave = threading.Event(), threading.Event()

    def serve(connection):
        entered.set()
        leave.wait(5)

    server = Server(serve, SECRET)
    server.start()
    connection = connect(server.address, SECRET)
    assert entered.wait(5)
    server.stop(timeout_s=0.05)
    assert "1 connections have not ended" in caplog.text
    leave.set()
    connection.close()


def test_a_server_that_was_never_started_can_be_stopped():
    before = held()
    server = echo_server()
    server.stop()
    assert nothing_leaked(before)


def test_nothing_is_left_of_many_connections(caplog):
    caplog.set_level(logging.CRITICAL)
    before = held()
    with echo_server() as server:
        for i in range(1000):
            address = server.address if i % 2 else over_tcp(server.address)
            connect(address, SECRET).close()
            if i % 10 == 0:
                with pytest.raises(WireRefusedError):
                    connect(address, b"w" * 32)
        wait_until(lambda: not server._streams)
        # Its listeners and selector, the descriptor that wakes it, and its one thread.
        wait_until(lambda: nothing_leaked((before[0] + 4, before[1] + 1)))
    wait_until(lambda: nothing_leaked(before))


def test_another_users_client_is_refused(monkeypatch, caplog):
    with echo_server() as server:
        monkeypatch.setattr(server_module, "peer_is_same_user", lambda sock: False)
        with pytest.raises(WireClosedError):
            connect(server.address, SECRET)
        wait_until(lambda: "a client of another user was refused" in caplog.text)
        with connect(over_tcp(server.address), SECRET) as connection:
            assert connection.request(ECHO, {}).kind == ECHO


def test_a_client_does_not_talk_to_another_users_socket(monkeypatch):
    with echo_server() as server:
        monkeypatch.setattr(connection_module, "peer_is_same_user", lambda sock: False)
        with connect(server.address, SECRET) as connection:
            assert not connection.local


def test_users_are_told_by_the_system(monkeypatch):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert connection_module.peer_is_same_user(ours)
        monkeypatch.setattr("os.geteuid", lambda: 12345)
        assert not connection_module.peer_is_same_user(ours)


def test_it_survives_a_shortage_of_descriptors_and_threads(monkeypatch, caplog):
    monkeypatch.setattr(server_module, "_RETRY_S", 0.001)

    class Listener:
        def accept(self):
            raise OSError(errno.EMFILE, "Too many open files")

    server = echo_server()
    server._accept(Listener())
    assert "cannot accept connections: Too many open files" in caplog.text

    class Thread(threading.Thread):
        def start(self):
            raise RuntimeError("can't start new thread")

    server.start()
    monkeypatch.setattr(server_module.threading, "Thread", Thread)
    with pytest.raises(WireClosedError):
        connect(server.address, SECRET)
    monkeypatch.undo()
    wait_until(lambda: "can't start new thread" in caplog.text)
    with connect(server.address, SECRET) as connection:
        assert connection.request(ECHO, {}).kind == ECHO
    server.stop()


def test_clients_are_served_at_once():
    together = threading.Barrier(4, timeout=5)

    def serve(connection):
        together.wait()
        echo(connection)

    with Server(serve, SECRET) as server:
        clients = [connect(server.address, SECRET) for _ in range(4)]
        for client in clients:
            assert client.request(ECHO, {}).kind == ECHO
            client.close()
