"""The format of frames: round trips, bounds, damage and truncation at every place."""

import json
import math
import random
import socket
import struct
import threading
import tracemalloc
import zlib
from pathlib import Path

import pytest

from tests.unit.wire_ends import frame_bytes, pair, soon
from vllm_plugins.wire.errors import (
    WireClosedError,
    WireDamagedError,
    WireError,
    WireRefusedError,
    WireTimeoutError,
)
from vllm_plugins.wire.frame import (
    ERROR,
    MAGIC,
    MOST_ERROR_CHARACTERS,
    PRELUDE,
    VERSION,
    Limits,
    decode_header,
    encode_header,
    pack_prelude,
    printable,
    unpack_prelude,
)
from vllm_plugins.wire.refusals import send

HEADER = b'{"layer":3,"blocks":[1,2]}'
PAYLOAD = bytes(range(100))


def receive(data: bytes, limits: Limits | None = None, into=None):
    """Return what a stream makes of these bytes when no more follow."""
    stream, theirs = pair(limits)
    with theirs:
        theirs.sendall(data)
        theirs.shutdown(1)
        try:
            return stream.receive(soon(), into)
        finally:
            stream.close()


def test_a_frame_has_the_documented_layout():
    data = frame_bytes(7, HEADER, PAYLOAD, sequence=9)
    assert len(data) == 32 + len(HEADER) + len(PAYLOAD) + 4
    fields = struct.unpack("!4sBBHIIQ", data[:24])
    assert fields == (b"vPLw", 1, 0, 7, 9, len(HEADER), len(PAYLOAD))
    assert (PRELUDE.size, MAGIC, VERSION) == (32, b"vPLw", 1)


@pytest.mark.parametrize("size", [0, 1, 4, 5000, (1 << 18) - 1, 1 << 18, (1 << 18) + 1])
def test_round_trip(size):
    payload = random.Random(size).randbytes(size)
    stream, theirs = pair()
    back = type(stream)(theirs, Limits(), "test")
    # Twice, so that the sequence moves on; the payload fits into the socket's buffer.
    for _ in range(2):
        stream.send(7, {"n": size}, (payload,), soon())
        frame = back.receive(soon())
        assert (frame.kind, frame.header, frame.payload) == (7, {"n": size}, payload)
    stream.close()
    back.close()


def test_buffers_are_gathered_in_order_and_empty_ones_are_nothing():
    stream, theirs = pair()
    back = type(stream)(theirs, Limits(), "test")
    pieces = [bytes([i % 251]) * (i % 3) for i in range(2000)]
    matrix = memoryview(bytearray(range(24))).cast("B", (4, 6))
    stream.send(1, {}, (*pieces, matrix, memoryview(b"").cast("B")), soon())
    assert back.receive(soon()).payload == b"".join(pieces) + bytes(range(24))
    with pytest.raises(TypeError, match="contiguous"):
        stream.send(1, {}, (memoryview(bytes(8))[::2],), soon())
    stream.send(1, {}, (b"still usable",), soon())
    assert back.receive(soon()).payload == b"still usable"
    stream.close()
    back.close()


def test_a_payload_lands_where_the_receiver_says():
    place, seen = bytearray(200), []

    def into(size, header):
        seen.append((size, header))
        return memoryview(place)[50 : 50 + size]

    frame = receive(frame_bytes(7, HEADER, PAYLOAD), into=into)
    assert seen == [(100, json.loads(HEADER))]
    assert place == bytes(50) + PAYLOAD + bytes(50)
    assert frame.payload.obj is place
    assert receive(frame_bytes(7, HEADER), into=into).payload == b""
    assert len(seen) == 1


@pytest.mark.parametrize("place", [bytearray(99), bytearray(101), bytes(100)])
def test_a_wrong_place_is_refused_and_the_next_frame_arrives(place):
    stream, theirs = pair()
    theirs.sendall(frame_bytes(1, b"{}", PAYLOAD) + frame_bytes(2, b"{}", PAYLOAD, 1))
    with pytest.raises(ValueError, match="writable buffer"):
        stream.receive(soon(), lambda size, header: memoryview(place))
    assert stream.receive(soon()).payload == PAYLOAD
    stream.close()
    theirs.close()


def test_what_the_receiver_raises_is_raised_and_the_next_frame_arrives():
    stream, theirs = pair()
    theirs.sendall(frame_bytes(1, b"{}", PAYLOAD) + frame_bytes(2, b"{}", PAYLOAD, 1))

    def into(size, header):
        raise KeyError("no such block")

    with pytest.raises(KeyError, match="no such block"):
        stream.receive(soon(), into)
    assert stream.receive(soon()).kind == 2
    stream.close()
    theirs.close()


def oversized(header_bytes: int, payload_bytes: int) -> bytes:
    """Return a correct prelude that announces more than there is."""
    data = bytearray(pack_prelude(1, 0, b"", 0, 0))
    struct.pack_into("!IQ", data, 12, header_bytes, payload_bytes)
    struct.pack_into("!I", data, 28, zlib.crc32(data[:28]))
    return bytes(data)


@pytest.mark.parametrize(
    ("header_bytes", "payload_bytes", "what"),
    [
        (2, 1 << 62, "4611686018427387904 payload_bytes exceeds the limit of 4294967296"),
        (2, (1 << 64) - 1, "payload_bytes exceeds"),
        (2, (1 << 32) + 1, "payload_bytes exceeds"),
        ((1 << 32) - 1, 0, "4294967295 header_bytes exceeds the limit of 1048576"),
        ((1 << 20) + 1, 0, "header_bytes exceeds"),
    ],
)
def test_lengths_are_refused_before_anything_is_allocated(header_bytes, payload_bytes, what):
    tracemalloc.start()
    try:
        with pytest.raises(WireRefusedError, match=what):
            receive(oversized(header_bytes, payload_bytes))
        assert tracemalloc.get_traced_memory()[1] < 1 << 18
    finally:
        tracemalloc.stop()


def test_a_length_within_the_limits_that_is_a_lie_costs_no_memory():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    data = bytearray(oversized(2, 1 << 32))
    struct.pack_into("!I", data, 24, zlib.crc32(b"{}"))
    struct.pack_into("!I", data, 28, zlib.crc32(data[:28]))
    stream, theirs = pair()
    theirs.sendall(bytes(data) + b"{}" + bytes(1000))
    with pytest.raises((WireTimeoutError, WireRefusedError)):
        stream.receive(soon(0.05))
    assert resident() - before < 64 << 20
    stream.close()
    theirs.close()


def test_truncation_anywhere_is_a_closed_connection():
    data = frame_bytes(7, HEADER, PAYLOAD)
    for length in range(len(data)):
        with pytest.raises(WireClosedError, match="closed"):
            receive(data[:length])
    assert receive(data).payload == PAYLOAD


def test_one_flipped_bit_anywhere_is_never_accepted():
    data = frame_bytes(7, HEADER, PAYLOAD)
    for i in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[i // 8] ^= 1 << i % 8
        expected = WireRefusedError if i // 8 == 4 else WireDamagedError
        with pytest.raises(expected):
            receive(bytes(damaged))


def test_a_stalled_peer_is_a_timeout_and_the_stream_is_then_of_no_use():
    stream, theirs = pair()
    theirs.sendall(frame_bytes(7, HEADER, PAYLOAD)[:40])
    with pytest.raises(WireTimeoutError, match="did not send"):
        stream.receive(soon(0.02))
    theirs.sendall(frame_bytes(7, HEADER, PAYLOAD))
    with pytest.raises(WireClosedError, match="in part only"):
        stream.receive(soon(0.02))
    stream.close()
    theirs.close()


def test_a_peer_that_takes_nothing_is_a_timeout():
    stream, theirs = pair()
    with pytest.raises(WireTimeoutError, match="did not take"):
        stream.send(1, {}, (bytes(1 << 24),), soon(0.05))
    with pytest.raises(WireClosedError, match="in part only"):
        stream.send(1, {}, (), soon())
    stream.close()
    theirs.close()


def test_a_peer_that_takes_nothing_and_closes_its_side_has_closed_the_connection():
    stream, theirs = pair()
    closing = threading.Timer(0.05, theirs.shutdown, [socket.SHUT_WR])
    closing.start()
    with theirs, pytest.raises(WireClosedError, match="the peer closed the connection"):
        stream.send(7, {}, [bytes(1 << 24)], soon())
    closing.join()
    stream.close()


def test_why_a_peer_closes_its_side_is_heard_while_it_takes_nothing():
    stream, theirs = pair()
    theirs.sendall(frame_bytes(ERROR, b'{"error":"the disk is full"}'))
    theirs.shutdown(socket.SHUT_WR)
    with theirs, pytest.raises(WireRefusedError, match="the disk is full"):
        send(stream, 7, {}, [bytes(1 << 24)], soon())
    stream.close()


@pytest.mark.parametrize("sequence", [1, 2, (1 << 32) - 1])
def test_a_frame_out_of_sequence_is_damaged(sequence):
    with pytest.raises(WireDamagedError, match=f"frame {sequence} came instead of 0"):
        receive(frame_bytes(7, HEADER, PAYLOAD, sequence))


def test_a_replayed_frame_is_damaged():
    stream, theirs = pair()
    theirs.sendall(2 * frame_bytes(7, HEADER, PAYLOAD))
    assert stream.receive(soon()).payload == PAYLOAD
    with pytest.raises(WireDamagedError, match="frame 0 came instead of 1"):
        stream.receive(soon())
    stream.close()
    theirs.close()


def test_sequences_wrap_around():
    stream, theirs = pair()
    back = type(stream)(theirs, Limits(), "test")
    stream._sent = back._received = (1 << 32) - 1
    for i in range(3):
        stream.send(1, {"i": i}, (), soon())
        assert back.receive(soon()).header == {"i": i}
    stream.close()
    back.close()


def test_a_frame_of_another_connection_or_direction_is_damaged():
    stream, theirs = pair()
    stream.start_checksums(1, 2)
    theirs.sendall(frame_bytes(7, HEADER, PAYLOAD, seed=1))
    with pytest.raises(WireDamagedError, match="prelude is damaged"):
        stream.receive(soon())
    stream.close()
    theirs.close()


def test_another_version_is_refused_by_name():
    data = bytearray(frame_bytes(7, HEADER))
    data[4] = 9
    with pytest.raises(WireRefusedError, match="speaks version 9 of the wire, this end version 1"):
        unpack_prelude(data[:32], 0)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"3",
        b"null",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b"{",
        b"\xff",
        b'{"a":' + b"1" * 5000 + b"}",
        b'{"a":' + b"[" * 20_000,
        b'{"a":' * 20_000,
    ],
)
def test_headers_that_are_no_json_object(header):
    with pytest.raises(WireDamagedError, match="header"):
        decode_header(header)
    with pytest.raises(WireDamagedError, match="header"):
        receive(frame_bytes(1, header))


@pytest.mark.parametrize(("value", "error"), [(math.nan, ValueError), (b"x", TypeError)])
def test_headers_that_cannot_be_sent(value, error):
    with pytest.raises(error):
        encode_header({"a": value})


def test_text_of_a_peer_is_bounded_and_has_no_control_characters():
    text = printable("line\nline\x1b[31m\ud800 é" + "x" * 5000)
    assert text.startswith("line\\nline\\x1b[31m\\ud800 é")
    assert text.isprintable()
    assert text.encode()
    assert len(text) < MOST_ERROR_CHARACTERS + 50


def test_every_error_is_one_of_the_wire():
    for kind in (WireClosedError, WireDamagedError, WireRefusedError, WireTimeoutError):
        error = kind("it went wrong")
        assert isinstance(error, WireError)
        error.peer = "decode at 10.0.0.2:4000"
        assert str(error) == "decode at 10.0.0.2:4000: it went wrong"
