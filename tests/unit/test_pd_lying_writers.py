"""Prefill workers that lie or do not fit: a failed request, once and in time, no more."""

import zlib
from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.pd_problem import (
    ALL_HEADS,
    BLOCK_BYTES,
    GROUPS,
    HEADS,
    MODEL,
    NEXT,
    PIECE_BYTES,
    PROMPT,
    fails,
    frees,
    goes_on,
    honest_writer,
    new_reader,
)
from tests.unit.wire_ends import wait_until
from vllm_plugins.kv_connectors.pd.protocol import GONE, SLOTS, Kind, PullRequest
from vllm_plugins.wire.shared_memory import SharedBuffer

pytestmark = pytest.mark.usefixtures("pd_nothing_left")


class Answer:
    """What a writer that lies needs to answer one pull.

    Args:
        connection: To the reader.
        wanted: What it asked for.
        pages: KV to answer with.
        shared: The shared memory, if it sent any.
    """

    def __init__(self, connection, wanted, pages, shared):
        self.connection, self.wanted, self.pages, self.shared = connection, wanted, pages, shared
        self.sent = 0

    def data(self, layer, first, count):
        data = bytearray(count * self.pages.block_bytes(layer, ALL_HEADS))
        blocks = PROMPT.source[GROUPS[layer]][first : first + count]
        self.pages.gather(layer, blocks, ALL_HEADS, data)
        return data

    def piece(self, layer="layer.0", first=1, count=2, *, data=None, **changes):
        """Send a piece, right where nothing is said."""
        data = self.data(layer, first, count) if data is None else data
        header = {"layer": layer, "first": first, "count": count}
        if self.shared is None:
            self.connection.send(Kind.PIECE, header | changes, data)
            return
        slot, size = self.sent % SLOTS, self.shared.size // SLOTS
        # Also into the next slot, where it is larger.
        room = self.shared.view[slot * size :][: len(data)]
        room[:] = memoryview(data)[: len(room)]
        header |= {"slot": slot, "checksum": zlib.crc32(data)}
        self.connection.send(Kind.PIECE, header | changes)
        self.sent += 1

    def layer(self, name="layer.0"):
        span = PROMPT.spans[GROUPS[name]]
        for piece in span.pieces(HEADS * BLOCK_BYTES, PIECE_BYTES):
            self.piece(name, piece.first, len(piece))
            if self.shared is not None:
                assert self.connection.receive().kind == Kind.ACK

    def all(self):
        for name in GROUPS:
            self.layer(name)

    def end(self):
        self.connection.send(Kind.END, {})


class Liar:
    """A writer that introduces itself as usual and answers pulls with a lie."""

    def __init__(self, ends, lie, shard=None):
        self.lie, self.released = lie, []
        self.writer = honest_writer(ends, serve=self.serve)
        self.shard = shard or self.writer.pages.shard.to_json()

    def serve(self, connection):
        while True:
            frame = connection.receive()
            if frame.kind == Kind.DESCRIBE:
                connection.send(Kind.SHARD, self.shard)
            elif frame.kind == Kind.RELEASE:
                self.released += frame.header["transfers"]
                connection.send(Kind.RELEASED, {})
            elif frame.kind == Kind.PULL:
                self.answer(connection, PullRequest.from_json(frame.header))

    def answer(self, connection, wanted):
        if not wanted.shared:
            self.lie(Answer(connection, wanted, self.writer.pages, None))
            return
        with SharedBuffer.attach(connection.receive_descriptor(), wanted.shared) as shared:
            self.lie(Answer(connection, wanted, self.writer.pages, shared))


LIES = {
    "a piece is a byte short": (lambda a: a.piece(data=a.data("layer.0", 1, 2)[:-1]), "damaged"),
    "a piece is a block long": (lambda a: a.piece(count=1, data=bytes(PIECE_BYTES)), "damaged"),
    "a piece is empty": (lambda a: a.piece(count=0), "damaged"),
    "a piece is larger than all": (lambda a: a.piece(data=bytes(PIECE_BYTES + 1)), "damaged"),
    "a piece counts more than it has": (lambda a: a.piece(count=3, data=bytes(99)), "damaged"),
    "a piece counts millions": (lambda a: a.piece(data=b"x", count=1 << 24), "damaged"),
    "a piece comes before its turn": (lambda a: a.piece(first=3), "damaged"),
    "a piece is not wanted": (lambda a: a.piece(first=0), "damaged"),
    "a piece comes twice": (lambda a: (a.piece(), a.piece()), "damaged"),
    "a piece goes on behind the end": (
        lambda a: (a.layer(), a.piece(first=7, data=bytes(PIECE_BYTES))), "damaged"),
    "a piece overlaps the end": (
        lambda a: ([a.piece(first=f) for f in (1, 3)],
                   a.piece(first=5, count=3, data=bytes(PIECE_BYTES))), "damaged"),
    "a piece is of an unknown layer": (
        lambda a: a.piece(data=b"x", layer="layer.9"), "damaged"),
    "a layer is a number": (lambda a: a.piece(data=b"x", **{"layer": 0}), "damaged"),
    "a position is a text": (lambda a: a.piece(data=b"x", first="1"), "damaged"),
    "a position is below zero": (lambda a: a.piece(data=b"x", first=-1), "damaged"),
    "a piece says nothing": (lambda a: a.connection.send(Kind.PIECE, {}), "damaged"),
    "the end comes at once": (lambda a: a.end(), "damaged"),
    "the end comes too early": (lambda a: (a.layer(), a.end()), "damaged"),
    "the end never comes": (lambda a: a.all(), "timeout"),
    "another message comes": (lambda a: a.connection.send(Kind.RENEWED, {}), "damaged"),
    "it falls silent": (lambda a: a.layer(), "timeout"),
    "it hangs up": (lambda a: (a.piece(), a.connection.close()), "closed"),
    "it refuses": (lambda a: a.connection.send_error("not today"), "refused"),
    "it says that the prompt is gone": (lambda a: a.connection.send_error(f"{GONE}over"), "gone"),
}  # fmt: skip
SHARED_LIES = {
    "a slot is out of range": (lambda a: a.piece(slot=SLOTS), "damaged"),
    "a slot is below zero": (lambda a: a.piece(slot=-1), "damaged"),
    "a slot is missing": (lambda a: a.piece(slot=None), "damaged"),
    "a slot is another one": (lambda a: a.piece(slot=1), "damaged"),
    "a checksum is wrong": (lambda a: a.piece(checksum=1), "damaged"),
    "a checksum is missing": (lambda a: a.piece(checksum=None), "damaged"),
    "a piece is larger than a slot": (lambda a: a.piece(count=3), "damaged"),
    "data come beside the memory": (
        lambda a: a.connection.send(Kind.PIECE, {"layer": "layer.0"}, bytes(2 * PIECE_BYTES)),
        "damaged"),
}  # fmt: skip
CASES = [
    *((name, share) for name in LIES for share in (False, True)),
    *((name, True) for name in SHARED_LIES),
]


@pytest.mark.parametrize(
    ("name", "share"),
    CASES,
    ids=[f"{name}, {'shared memory' if share else 'tcp'}" for name, share in CASES],
)
def test_a_writer_that_lies_fails_the_request_and_no_other(ends, name, share):
    lie, reason = (LIES | SHARED_LIES)[name]
    liar, reader = Liar(ends, lie), new_reader(ends)
    assert fails(reader, [liar.writer.peer(unix=share)]) == reason
    reader.check(MODEL, broken=[PROMPT])
    wait_until(lambda: liar.released == [PROMPT.name])
    goes_on(reader, honest_writer(ends), unix=share)


SHARDS = {
    "another model": {"identity": "another"},
    "another block size": {"block_size": 32},
    "larger blocks": {"bytes_per_head": [65] * 3},
    "fewer heads": {"heads": [0, 3]},
    "fewer layers": {"layers": ["layer.0", "layer.2"], "bytes_per_head": [64] * 2},
    "nonsense": {"layers": "all of them"},
}


@pytest.mark.parametrize("change", SHARDS)
def test_a_writer_that_does_not_fit_is_refused_before_anything_moves(ends, change):
    liar, reader = Liar(ends, lambda answer: answer.all()), new_reader(ends)
    liar.shard = liar.shard | SHARDS[change]
    assert fails(reader, [liar.writer.peer()]) == "incompatible"
    reader.check(MODEL)
    wait_until(lambda: liar.released == [PROMPT.name])
    goes_on(reader, honest_writer(ends))


def test_a_writer_of_another_run_is_refused(ends):
    writer, reader = honest_writer(ends), new_reader(ends)
    writer.hold(PROMPT)
    assert fails(reader, [replace(writer.peer(), generation="f" * 16)]) == "gone"
    reader.check(MODEL)
    goes_on(reader, writer)


def test_a_reader_without_the_secret_is_refused(ends):
    writer = honest_writer(ends)
    writer.hold(PROMPT)
    stranger = new_reader(ends, secret=b"another secret".ljust(40))
    assert fails(stranger, [writer.peer()]) == "refused"
    stranger.check(MODEL)
    goes_on(new_reader(ends), writer)
    frees(writer, PROMPT.name, NEXT.name)


def test_a_reader_of_another_prompt_is_refused(ends):
    writer, reader = honest_writer(ends), new_reader(ends)
    writer.outbox.hold(PROMPT.name, "held-t", "c" * 32, PROMPT.source)
    assert fails(reader, [writer.peer()]) == "gone"
    reader.check(MODEL)
