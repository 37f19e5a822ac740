"""Connections that are hard or impossible to make: errors of the wire, in time, or another way."""

import resource
import socket
import time
from contextlib import ExitStack, contextmanager, suppress

import pytest

from tests.unit.wire_ends import SECRET, echo_server, over_tcp
from vllm_plugins.wire import connection as connection_module
from vllm_plugins.wire.address import Address
from vllm_plugins.wire.connection import connect
from vllm_plugins.wire.errors import WireClosedError, WireTimeoutError


@pytest.fixture(scope="module")
def server():
    with echo_server() as running:
        yield running


@pytest.mark.parametrize("unix", [True, False], ids=["unix", "tcp"])
def test_a_process_without_descriptors_gets_an_error_of_the_wire(server, monkeypatch, unix):
    """Also where the last one goes between telling the host and making the Unix socket."""
    limits, own = resource.getrlimit(resource.RLIMIT_NOFILE), server.address.host_id
    address = server.address if unix else over_tcp(server.address)

    def exhausted() -> str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        return own

    monkeypatch.setattr(connection_module, "host_id", exhausted)
    exhausted()
    try:
        with pytest.raises(WireClosedError, match="Too many open files"):
            connect(address, SECRET)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_is_no_host_name_is_an_error_of_the_wire():
    with pytest.raises(WireClosedError, match="is no host name"):
        connect(Address("a..b", 9), SECRET)


@contextmanager
def silent_address():
    """Give an address that answers no further connection, as its queue is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with suppress(BlockingIOError):
                waiting.connect(listener.getsockname())
        yield listener.getsockname()


def found_at(monkeypatch, *addresses):
    """Let every name have these addresses, and every address itself."""
    look_up = socket.getaddrinfo

    def found(host, *args, **options):
        wanted = addresses if host == "several.example" else [(host, args[0])]
        return [one for where in wanted for one in look_up(*where, *args[1:], **options)]

    monkeypatch.setattr(socket, "getaddrinfo", found)


def test_several_addresses_of_a_host_share_the_time(server, monkeypatch):
    with silent_address() as silent:
        found_at(monkeypatch, silent, silent, silent)
        began = time.monotonic()
        with pytest.raises(WireTimeoutError):
            connect(Address("several.example", 9), SECRET, connect_timeout_s=0.6)
        assert time.monotonic() - began < 0.9
        found_at(monkeypatch, silent, (server.address.host, server.address.port))
        with connect(Address("several.example", 9), SECRET, connect_timeout_s=2.0) as connection:
            assert connection.request(1, {"a": 1}).header == {"a": 1}
