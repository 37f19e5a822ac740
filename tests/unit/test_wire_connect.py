"""Connections that this process cannot make: errors of the wire, whatever the system says."""

import resource

import pytest

from tests.unit.wire_ends import SECRET, echo_server, over_tcp
from vllm_plugins.wire import connection as connection_module
from vllm_plugins.wire.address import Address
from vllm_plugins.wire.connection import connect
from vllm_plugins.wire.errors import WireClosedError


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
