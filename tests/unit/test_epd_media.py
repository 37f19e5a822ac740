"""What a client may say about an item: bounded, of the right type, at an allowed address."""

import json

import pytest

from vllm_plugins.kv_connectors.epd.media import (
    KEY,
    MalformedError,
    Shape,
    Source,
    sources_of,
)
from vllm_plugins.wire.address import Address, is_loopback

SOURCE = Source(
    Address("127.0.0.1", 4000, "vllm-plugins-" + "0" * 32, "1" * 32),
    "a" * 32,
    Shape(16, 128, "bfloat16"),
    "b" * 32,
    "c" * 32,
    1000.0,
)


def params(**changes):
    return {"id": {"item_indices": [0], KEY: SOURCE.to_json() | changes}}


def test_what_a_server_hands_out_is_read_back():
    assert sources_of(json.loads(json.dumps(params())), False) == {"id": SOURCE}
    assert SOURCE.shape.row_bytes == 256
    assert SOURCE.shape.nbytes == 4096


def test_an_awaited_item_is_known_by_where_it_will_be():
    awaited = Source(SOURCE.address, SOURCE.generation)
    raw = {"id": {KEY: awaited.to_json()}}
    assert raw["id"][KEY].keys() == {"address", "generation", "awaited"}
    assert sources_of(json.loads(json.dumps(raw)), False) == {"id": awaited}
    # Nothing but the plain truth makes an item an awaited one.
    with pytest.raises(MalformedError, match="num_tokens is not an integer"):
        sources_of({"id": {KEY: {**awaited.to_json(), "awaited": 1}}}, False)


def test_other_connectors_items_are_passed_over():
    assert sources_of({"x": {"peer_host": "h"}, "y": 3, **params()}, False) == {"id": SOURCE}
    assert sources_of(None, False) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 0}, "num_tokens is not an integer from 1 to"),
        ({"num_tokens": True}, "num_tokens is not an integer"),
        ({"num_tokens": 16.0}, "num_tokens is not an integer"),
        ({"num_tokens": 1 << 62}, "num_tokens is not an integer"),
        ({"width": -1}, "width is not an integer"),
        ({"width": None}, "width is not an integer"),
        ({"dtype": "int8"}, "dtype is not one of float32, float16, bfloat16"),
        ({"dtype": ["float32"]}, "dtype is not one of"),
        ({"checksum": "B" * 32}, "checksum is not 32 hexadecimal digits"),
        ({"checksum": "b" * 31}, "checksum is not 32 hexadecimal digits"),
        ({"lease": 7}, "lease is not 32 hexadecimal digits"),
        ({"generation": "../" + "a" * 29}, "generation is not 32 hexadecimal digits"),
        ({"lease_end": "soon"}, "lease_end is not a finite number"),
        ({"lease_end": float("inf")}, "lease_end is not a finite number"),
        ({"address": None}, "address: "),
        ({"address": {"host": "127.0.0.1", "port": 0}}, "address: "),
        ({"address": {"host": "127.0.0.1", "port": 80, "unix": "x11"}}, "address: "),
    ],
)
def test_malformed_sources_are_refused(changes, message):
    with pytest.raises(MalformedError, match=message):
        sources_of(params(**changes), True)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "ec_transfer_params is not an object"),
        ({"id": {KEY: 3}}, f"{KEY} is not an object"),
        ({str(i): {} for i in range(1025)}, "has 1025 items; at most 1024"),
        ({"x" * 257: params()["id"]}, "more than 256 characters"),
        ({"": params()["id"]}, "more than 256 characters"),
    ],
)
def test_malformed_parameters_are_refused(raw, message):
    with pytest.raises(MalformedError, match=message):
        sources_of(raw, False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_is_always_allowed(host):
    assert is_loopback(host)
    assert sources_of(params(address={"host": host, "port": 4000}), False)


@pytest.mark.parametrize("host", ["10.0.0.1", "8.8.8.8", "2001:db8::1", "169.254.169.254"])
def test_other_hosts_need_allow_remote(host):
    with pytest.raises(MalformedError, match="not loopback, and allow_remote is off"):
        sources_of(params(address={"host": host, "port": 4000}), False)


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("metadata.internal", "the host is not an IP address"),
        ("127.0.0.1.example.org", "the host is not an IP address"),
        ("169.254.169.254", "not the address of one host"),
        ("224.0.0.1", "not the address of one host"),
        ("0.0.0.0", "not the address of one host"),
    ],
)
def test_names_and_special_addresses_are_never_connected_to(host, message):
    with pytest.raises(MalformedError, match=message):
        sources_of(params(address={"host": host, "port": 4000}), True)


def test_a_remote_address_is_allowed_where_the_option_says_so():
    assert sources_of(params(address={"host": "10.0.0.1", "port": 4000}), True)
