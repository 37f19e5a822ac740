"""EPD's two ends of the wire against each other, with faults in between."""

import threading
import time

import pytest

from tests.epd_sides import BLOCK, TOKENS, Counts, arena_of, memory_of, shape_of
from tests.unit.wire_ends import wait_until
from tests.wire_faults import DOWN, Fault, FaultyProxy
from vllm_plugins.kv_connectors.epd import fetcher, protocol
from vllm_plugins.kv_connectors.epd.fetcher import NUM_THREADS, Fetcher
from vllm_plugins.kv_connectors.epd.media import Shape, Source
from vllm_plugins.kv_connectors.epd.publisher import Publisher
from vllm_plugins.wire.address import Address
from vllm_plugins.wire.connection import connect
from vllm_plugins.wire.errors import WireClosedError, WireRefusedError, WireTimeoutError
from vllm_plugins.wire.server import Server

SECRET = b"s" * 32
GENERATION = "a" * 32
LEASE = "c" * 32


class Ends:
    """An encode server's store, published, and a prefill server's with a fetcher."""

    def __init__(self):
        self.now = 0.0
        self.encode, self.prefill = arena_of(16, lambda: self.now), arena_of(16)
        self.encode_memory, self.prefill_memory = memory_of(16), memory_of(16)
        self.counts = Counts()
        publisher = Publisher(self.encode, self.encode_memory, GENERATION, 30.0, self.counts)
        self.server = Server(publisher.serve, SECRET, limits=protocol.SERVER_LIMITS, timeout_s=5)
        self.server.start()
        self.fetcher = Fetcher(self.prefill_memory, SECRET)

    def close(self):
        self.server.stop()
        self.fetcher.close()
        for memory in (self.encode_memory, self.prefill_memory):
            memory.close()

    def publish(self, media, tokens=TOKENS):
        """Publish an item of bytes that tell its rows apart; return where it is."""
        shape = shape_of(tokens, "image")
        entry = self.encode.reserve(media, shape, "me")
        for row in range(tokens):
            [piece] = self.encode_memory.rows(entry.blocks, shape, row, 1)
            piece[:] = bytes([row % 251]) * shape.row_bytes
        digest = self.encode_memory.digest(entry.blocks, shape)
        self.encode.complete(entry, digest)
        self.encode.lease([media], LEASE, 30.0)
        self.encode.release_all("me")
        return Source(self.server.address, GENERATION, shape, digest, LEASE, 0.0)

    def fetch(self, media, source, timeout_s=10.0):
        """Fetch an item; return its room and why it is missing, if it is."""
        return self.begin(media, source, source.shape, timeout_s)()

    def begin(self, media, source, shape, timeout_s=10.0):
        """Begin to fetch an item; return what waits for the outcome."""
        entry = self.prefill.reserve(media, shape, "me")
        outcome, heard = [], threading.Event()

        def done(missing, digest):
            outcome.append((missing, digest))
            heard.set()

        self.fetcher.fetch(entry, source, time.monotonic() + timeout_s, done)

        def result():
            assert heard.wait(timeout_s + 20)
            [(missing, digest)] = outcome
            expected = "" if missing else self.prefill_memory.digest(entry.blocks, entry.shape)
            assert digest == expected
            return entry, missing

        return result

    def rows(self, entry):
        shape = entry.shape
        return b"".join(self.prefill_memory.rows(entry.blocks, shape, 0, shape.num_tokens))


@pytest.fixture
def ends():
    ends = Ends()
    yield ends
    ends.close()


def through(source, proxy):
    """Return a source as it is behind a proxy."""
    return Source(**{**vars(source), "address": proxy.address})


def fragment(arena, parity):
    """Leave only every other block free."""
    names = [f"x{i}" for i in range(arena.num_blocks)]
    entries = [arena.reserve(name, shape_of(1, ""), "x") for name in names]
    for entry in entries[parity::2]:
        arena.discard(entry)


@pytest.mark.parametrize("tokens", [1, TOKENS, TOKENS + 1, 7 * TOKENS])
def test_rows_arrive_as_they_were_sent(ends, tokens):
    entry, missing = ends.fetch("m", ends.publish("m", tokens))
    assert missing == ""
    row_bytes = entry.shape.row_bytes
    assert ends.rows(entry) == b"".join(bytes([row]) * row_bytes for row in range(tokens))
    assert ends.prefill_memory.stamped(entry.blocks[0])[0] == entry.sequence
    ends.server.stop()
    assert ends.counts["sent_bytes_total"] == tokens * row_bytes


def test_rows_arrive_whatever_blocks_either_end_has(ends):
    fragment(ends.encode, 0)
    fragment(ends.prefill, 1)
    entry, missing = ends.fetch("m", ends.publish("m", 7 * TOKENS))
    assert missing == ""
    assert len(ends.prefill_memory.runs(entry.blocks, entry.shape)) == 7
    assert ends.rows(entry)[:: entry.shape.row_bytes] == bytes(range(7 * TOKENS))


def test_an_item_is_kept_while_it_is_sent_whatever_becomes_of_its_lease(ends):
    source = ends.publish("m", 16 * TOKENS)
    with connect(source.address, SECRET) as connection:
        header = {"media": "m", "generation": GENERATION, "first": 0, "rows": 16 * TOKENS}

        def into(size, header):
            # The server is in the middle of sending: a payload of 1 KiB is in the sockets already,
            # but what the answer says of the item was read while it was held.
            ends.now = 100.0
            return memoryview(bytearray(size))

        frame = connection.request(protocol.FETCH, header, into=into)
    assert len(frame.payload) == 16 * BLOCK
    # The server lets go of the item in a thread of its own, once the last byte is on its way.
    wait_until(lambda: ends.encode.available_blocks == 16)


@pytest.mark.parametrize(
    ("change", "media"),
    [({"generation": "0" * 32}, "m"), ({}, "other")],
    ids=["restarted", "evicted"],
)
def test_what_is_gone_is_not_asked_for_twice(ends, change, media):
    source = ends.publish("m")
    source = Source(**{**vars(source), **change})
    entry, missing = ends.fetch(media, source)
    assert missing == "gone"
    assert ends.prefill_memory.stamped(entry.blocks[0]) == (0, "00" * 16)


def test_rows_of_another_shape_are_not_taken(ends):
    source = ends.publish("m")
    lie = Source(**{**vars(source), "shape": Shape(TOKENS, 2, "float32")})
    assert ends.fetch("m", lie)[1] == "mismatch"
    lie = Source(**{**vars(source), "shape": Shape(TOKENS, 8, "bfloat16")})
    assert ends.fetch("n", Source(**{**vars(lie)}))[1] == "gone"


def test_a_flipped_bit_in_the_store_is_found(ends):
    source = ends.publish("m")
    entry = ends.encode.find("m")
    ends.encode_memory.rows(entry.blocks, entry.shape, 2, 1)[0][3] ^= 4
    entry, missing = ends.fetch("m", source)
    assert missing == "damaged"
    assert ends.prefill_memory.stamped(entry.blocks[0]) == (0, "00" * 16)


def bytes_down(ends, source):
    """Return how many bytes the server sends for one fetch over a new connection."""
    with FaultyProxy(source.address) as proxy:
        entry, missing = ends.fetch("probe", through(source, proxy))
        assert missing == "gone"
        ends.prefill.discard(entry)
        return proxy.carried[DOWN]


@pytest.mark.parametrize("kind", ["flip", "reset", "truncate"])
def test_one_fault_is_survived_and_two_are_reported(ends, kind):
    source = ends.publish("m", 16 * TOKENS)
    fault = Fault(kind, at=bytes_down(ends, source), direction=DOWN, bit=3)
    with FaultyProxy(source.address, fault) as proxy:
        entry, missing = ends.fetch("m", through(source, proxy))
        assert missing == ("damaged" if kind == "flip" else "unreachable")
        ends.prefill.discard(entry)
    once = OnceFaulty(source.address, fault)
    with once as proxy:
        entry, missing = ends.fetch("m", through(source, proxy))
    assert missing == ""
    assert ends.rows(entry)[:: entry.shape.row_bytes] == bytes(range(16 * TOKENS))


class OnceFaulty(FaultyProxy):
    """A proxy whose first connection alone has the fault."""

    def count(self, direction, size):
        super().count(direction, size)
        self.fault = Fault("none")


def test_a_server_that_stalls_costs_its_item_and_nobody_else(ends):
    source = ends.publish("m", 16 * TOKENS)
    stall = Fault("stall", at=bytes_down(ends, source), direction=DOWN)
    with FaultyProxy(source.address, stall) as proxy:
        started = time.monotonic()
        entry, missing = ends.fetch("m", through(source, proxy), timeout_s=0.5)
        assert missing == "timeout"
        assert time.monotonic() - started < 5
    ends.prefill.discard(entry)
    assert ends.fetch("m", source)[1] == ""


def test_a_server_that_stalls_leaves_threads_to_others(ends):
    source, waits = ends.publish("m", 1), []
    with FaultyProxy(source.address, Fault("stall", at=0, direction=DOWN)) as proxy:
        for number in range(11):
            stalled = through(ends.publish(f"x{number}", 1), proxy)
            waits.append(ends.begin(f"x{number}", stalled, source.shape, 1.0))
            for _ in range(2):
                ends.fetcher.release(stalled, f"x{number}")
        assert ends.fetch("m", source, timeout_s=0.7)[1] == ""
        assert {wait()[1] for wait in waits} == {"timeout"}


def test_what_goes_wrong_behind_a_fetch_costs_no_thread(ends):
    def fails(missing, digest):
        raise RuntimeError("a scripted fault")

    source = ends.publish("a")
    for number in range(2 * NUM_THREADS):
        entry = ends.prefill.reserve(f"x{number % 8}", source.shape, "me")
        ends.fetcher.fetch(entry, source, time.monotonic() + 10, fails)
        ends.prefill.discard(entry)
    assert ends.fetch("a", source)[1] == ""


def test_nobody_listening_is_unreachable(ends):
    source = ends.publish("m")
    with FaultyProxy(source.address) as proxy:
        gone = through(source, proxy)
    assert ends.fetch("m", gone)[1] == "unreachable"


def test_another_secret_is_refused(ends):
    source = ends.publish("m")
    stranger = Fetcher(ends.prefill_memory, b"t" * 32)
    ends.fetcher.close()
    ends.fetcher = stranger
    assert ends.fetch("m", source)[1] == "refused"


def test_a_server_that_closes_idle_connections_is_asked_anew(ends):
    source = ends.publish("m")
    assert ends.fetch("m", source)[1] == ""
    address = ends.server.address
    ends.server.stop()
    publisher = Publisher(ends.encode, ends.encode_memory, GENERATION, 30.0, ends.counts)
    ends.server = Server(publisher.serve, SECRET, port=address.port, unix=False, timeout_s=5)
    ends.server.start()
    tcp = Source(**{**vars(source), "address": Address(address.host, address.port)})
    entry = ends.prefill.find("m") or ends.prefill.share("m", "me")
    ends.prefill.discard(entry)
    assert ends.fetch("m", tcp)[1] == ""


def test_asking_anew_takes_no_longer_than_asking_may():
    """A server that lets a request wait and then goes has used up its time."""
    closing = threading.Event()

    def serve(connection):
        while True:
            connection.receive()
            if closing.is_set():
                time.sleep(0.4)
                return
            connection.send(protocol.DONE, {})

    with Server(serve, SECRET) as server:
        peers = fetcher._Peers(SECRET, protocol.SERVER_LIMITS)
        assert peers.request(server.address, protocol.RENEW, {}, 5.0).kind == protocol.DONE
        closing.set()
        began = time.monotonic()
        with pytest.raises(WireTimeoutError):
            peers.request(server.address, protocol.RENEW, {}, 0.5)
        assert time.monotonic() - began < 0.7
        assert not peers.any_open


def test_connections_that_nobody_uses_are_closed(ends, monkeypatch):
    monkeypatch.setattr(fetcher, "IDLE_S", 0.1)
    ends.fetcher.close()
    ends.fetcher = Fetcher(ends.prefill_memory, SECRET)
    for media in ("one", "two"):
        assert ends.fetch(media, ends.publish(media))[1] == ""
        wait_until(lambda: not ends.server._streams)


def test_a_thread_that_is_never_idle_closes_what_it_does_not_use(ends, monkeypatch):
    monkeypatch.setattr(fetcher, "IDLE_S", 1.0)
    monkeypatch.setattr(fetcher, "NUM_THREADS", 1)
    ends.fetcher.close()
    ends.fetcher = Fetcher(ends.prefill_memory, SECRET)
    renewed = ends.publish("m")
    with FaultyProxy(ends.server.address) as proxy:
        assert ends.fetch("m", through(renewed, proxy))[1] == ""
        ends.fetcher.renew(renewed)
        wait_until(lambda: len(ends.server._streams) == 2)

        def one_is_left():
            ends.fetcher.renew(renewed)
            return len(ends.server._streams) == 1

        wait_until(one_is_left)


def test_a_lease_is_renewed_and_ended_over_the_wire(ends):
    source = ends.publish("m")
    ends.now = 20.0
    ends.fetcher.renew(source)
    assert ends.fetch("m", source)[1] == ""
    ends.fetcher.close()
    ends.now = 45.0
    assert ends.encode.available_blocks == 15
    ends.fetcher = Fetcher(ends.prefill_memory, SECRET)
    ends.fetcher.release(source, "m")
    ends.fetcher.close()
    assert ends.encode.available_blocks == 16
    ends.fetcher = Fetcher(ends.prefill_memory, SECRET)


@pytest.mark.parametrize(
    ("kind", "header"),
    [
        (7, {}),
        (protocol.FETCH, {"media": 3, "first": 0, "rows": 1}),
        (protocol.FETCH, {"media": "m", "first": -1, "rows": 1}),
        (protocol.FETCH, {"media": "m", "first": 0, "rows": 1 << 70}),
        (protocol.FETCH, {"media": "m", "first": True, "rows": 1}),
        (protocol.RELEASE, {"lease": [], "media": "m"}),
        (protocol.RENEW, {}),
    ],
)
def test_requests_outside_the_protocol_are_refused(ends, kind, header):
    source = ends.publish("m")
    with (
        connect(source.address, SECRET) as connection,
        pytest.raises((WireRefusedError, WireClosedError)),
    ):
        connection.request(kind, {"generation": GENERATION, **header})
    assert ends.fetch("m", source)[1] == ""


def test_an_awaited_item_arrives_once_it_is_encoded(ends):
    awaited = Source(ends.server.address, GENERATION)
    outcome = ends.begin("m", awaited, shape_of(2 * TOKENS, "image"))
    # Another item is not kept waiting by it.
    assert ends.fetch("other", ends.publish("other"))[1] == ""
    ends.publish("m", 2 * TOKENS)
    entry, missing = outcome()
    assert missing == ""
    assert ends.rows(entry)[:: entry.shape.row_bytes] == bytes(range(2 * TOKENS))


def test_more_awaited_items_than_threads_keep_nobody_waiting(ends):
    awaited = Source(ends.server.address, GENERATION)
    names = [f"m{i}" for i in range(12)]
    outcomes = [ends.begin(name, awaited, shape_of(1, "image")) for name in names]
    assert ends.fetch("other", ends.publish("other"), timeout_s=5)[1] == ""
    for name in reversed(names):
        ends.publish(name, 1)
    assert [outcome()[1] for outcome in outcomes] == [""] * 12


def test_an_item_that_is_never_encoded_is_given_up_in_time(ends):
    awaited = Source(ends.server.address, GENERATION)
    assert ends.begin("m", awaited, shape_of(1, "image"), timeout_s=0.3)()[1] == "timeout"


def test_an_encode_server_that_was_restarted_is_not_waited_for(ends):
    awaited = Source(ends.server.address, "0" * 32)
    assert ends.begin("m", awaited, shape_of(1, "image"))()[1] == "gone"


def test_an_awaited_item_of_another_shape_is_not_taken(ends):
    awaited = Source(ends.server.address, GENERATION)
    ends.publish("m", TOKENS)
    assert ends.begin("m", awaited, shape_of(TOKENS - 1, "image"))()[1] == "mismatch"


def test_an_awaited_item_that_is_damaged_is_found_by_the_server_s_own_digest(ends):
    ends.publish("m")
    entry = ends.encode.find("m")
    ends.encode_memory.rows(entry.blocks, entry.shape, 2, 1)[0][3] ^= 4
    awaited = Source(ends.server.address, GENERATION)
    assert ends.begin("m", awaited, shape_of(TOKENS, "image"))()[1] == "damaged"
