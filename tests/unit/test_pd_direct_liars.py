"""Ends that lie or die in a direct pull: a failed request, once and in time, and no one else's."""

from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.pd_direct import DirectReader, DirectWriter
from tests.pd_problem import (
    ALL_HEADS,
    BLOCKS,
    DIGEST,
    GENERATION,
    GROUPS,
    HEADS,
    LEASE_S,
    MODEL,
    OLD,
    PIECE_BYTES,
    PROMPT,
    SOON_S,
    TIMEOUT_S,
    fails,
    frees,
    goes_on,
    part,
)
from tests.unit.wire_ends import SECRET, wait_until
from vllm_plugins.kv_connectors.pd import prefill_worker
from vllm_plugins.kv_connectors.pd.protocol import GONE, Kind, PullRequest
from vllm_plugins.wire.connection import connect
from vllm_plugins.wire.errors import WireClosedError, WireRefusedError

pytestmark = pytest.mark.usefixtures("pd_nothing_left")


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(prefill_worker, "DIRECT_BYTES", PIECE_BYTES)


def honest(ends, **changes):
    writer = DirectWriter(part(MODEL, ALL_HEADS), **{"lease_s": LEASE_S, **changes})
    ends.append(writer)
    return writer


def reader_of(ends):
    reader = DirectReader(part(OLD, ALL_HEADS), required=True)
    ends.append(reader)
    return reader


class Answer:
    """What a writer that lies needs to answer one pull."""

    def __init__(self, connection, wanted):
        self.connection = connection
        self.places = {name: i for i, (name, _) in enumerate(wanted.layers)}

    def piece(self, layers=("layer.0", "layer.2"), first=1, count=2, **changes):
        """Name blocks, the right ones where nothing is said."""
        blocks = PROMPT.source[GROUPS[layers[0]]][first : first + count]
        header = {"layers": [self.places[layer] for layer in layers], "first": first,
                  "count": count, "blocks": blocks}  # fmt: skip
        self.connection.send(Kind.PIECE, header | changes)

    def group(self, layers):
        span = PROMPT.spans[GROUPS[layers[0]]]
        self.piece(layers, span.first, len(span))
        assert self.connection.receive().kind == Kind.ACK

    def all(self):
        self.group(["layer.0", "layer.2"])
        self.group(["layer.1"])

    def end(self, *words):
        self.all()
        self.connection.send(Kind.END, {})
        assert self.connection.receive().kind == Kind.DONE
        for word in words:
            self.connection.send(word, {})


class Liar:
    """A writer that lets its caches be mapped as usual and answers pulls with a lie."""

    def __init__(self, ends, lie):
        self.lie, self.released = lie, []
        self.writer = honest(ends, serve=self.serve)
        self.handles = self.writer.handles.to_json()

    def serve(self, connection):
        while True:
            frame = connection.receive()
            if frame.kind == Kind.DESCRIBE:
                connection.send(Kind.SHARD, self.writer.pages.shard.to_json())
            elif frame.kind == Kind.CACHES:
                connection.idle_timeout_s = 20.0
                connection.send(Kind.HANDLES, self.handles)
            elif frame.kind == Kind.RELEASE:
                self.released += frame.header["transfers"]
                connection.send(Kind.RELEASED, {})
            elif frame.kind == Kind.PULL:
                self.lie(Answer(connection, PullRequest.from_json(frame.header)))


LIES = {
    "a block behind the last": (lambda a: a.piece(blocks=[5, BLOCKS]), "damaged"),
    "a block far behind": (lambda a: a.piece(blocks=[5, 1 << 40]), "damaged"),
    "a block below zero": (lambda a: a.piece(blocks=[-1, 5]), "damaged"),
    "a block that is true": (lambda a: a.piece(blocks=[True, 5]), "damaged"),
    "a block that is a fraction": (lambda a: a.piece(blocks=[1.0, 5]), "damaged"),
    "too few blocks": (lambda a: a.piece(blocks=[4]), "damaged"),
    "too many blocks": (lambda a: a.piece(blocks=[4, 7, 10]), "damaged"),
    "no blocks": (lambda a: a.piece(blocks=None), "damaged"),
    "blocks are a text": (lambda a: a.piece(blocks="45"), "damaged"),
    "a piece counts nothing": (lambda a: a.piece(count=0), "damaged"),
    "a piece counts millions": (lambda a: a.piece(count=1 << 24), "damaged"),
    "a piece comes before its turn": (lambda a: a.piece(first=3), "damaged"),
    "a piece is not wanted": (lambda a: a.piece(first=0), "damaged"),
    "a piece comes twice": (lambda a: (a.piece(), a.piece()), "damaged"),
    "a piece goes on behind the end": (lambda a: a.piece(first=1, count=7), "damaged"),
    "a layer twice": (lambda a: a.piece(["layer.0", "layer.0"]), "damaged"),
    "layers of two groups": (lambda a: a.piece(["layer.0", "layer.1"]), "damaged"),
    "layers are none": (lambda a: a.connection.send(Kind.PIECE, {"layers": []}), "damaged"),
    "a layer behind the last": (
        lambda a: a.connection.send(Kind.PIECE, {"layers": [3], "first": 1, "count": 1}),
        "damaged"),
    "a layer by name": (
        lambda a: a.connection.send(Kind.PIECE, {"layers": ["layer.0"]}), "damaged"),
    "a piece says nothing": (lambda a: a.connection.send(Kind.PIECE, {}), "damaged"),
    "data come too": (
        lambda a: a.connection.send(Kind.PIECE, {"layer": "layer.0"}, bytes(PIECE_BYTES)),
        "damaged"),
    "the end comes at once": (lambda a: a.connection.send(Kind.END, {}), "damaged"),
    "the end comes too early": (
        lambda a: (a.group(["layer.1"]), a.connection.send(Kind.END, {})), "damaged"),
    "it does not say that blocks were kept": (lambda a: a.end(), "timeout"),
    "it says something else": (lambda a: a.end(Kind.ACK), "damaged"),
    "it says that the prompt was given up": (
        lambda a: (a.end(), a.connection.send_error(f"{GONE}over")), "gone"),
    "it hangs up before the last word": (lambda a: (a.end(), a.connection.close()), "closed"),
    "it falls silent": (lambda a: a.group(["layer.1"]), "timeout"),
    "it refuses": (lambda a: a.connection.send_error("not today"), "refused"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_writer_that_lies_fails_the_request_and_no_other(ends, name):
    lie, reason = LIES[name]
    liar, reader = Liar(ends, lie), reader_of(ends)
    assert fails(reader, [liar.writer.peer(unix=True)]) == reason
    reader.check(MODEL, broken=[PROMPT])
    wait_until(lambda: liar.released == [PROMPT.name])
    goes_on(reader, honest(ends), unix=True)


def request(**changes):
    wanted = PullRequest(
        PROMPT.name, DIGEST, PROMPT.spans, tuple(GROUPS.items()), (0, HEADS), 0, 1, 0, direct=True
    )
    return replace(wanted, **changes).to_json() | {"generation": GENERATION}


def ask(connection, **changes):
    connection.send(Kind.PULL, request(**changes))


def read(connection, acknowledgements, *words):
    """Take all pieces, acknowledge some of them, and say something in the end."""
    ask(connection)
    while (frame := connection.receive()).kind != Kind.END:
        assert frame.kind == Kind.PIECE
        if acknowledgements:
            connection.send(Kind.ACK, {})
            acknowledgements -= 1
    for word in words:
        connection.send(word, {})


# Of six and four positions in pieces of two; what each does, and how the writer refuses it at once.
READERS = {
    "shared memory besides": (lambda c: ask(c, shared=64), "not to be mapped so"),
    "direct is a number": (
        lambda c: c.send(Kind.PULL, request() | {"direct": 1}), "neither true nor false"),
    "heads beyond the last": (lambda c: ask(c, heads=(0, HEADS + 1)), "no such heads"),
    "another prompt": (lambda c: ask(c, digest="c" * 32), "another prompt's"),
    "another generation of caches": (
        lambda c: c.send(Kind.CACHES, {"generation": "f" * 16}), "restarted"),
    "no acknowledgement": (ask, None),
    "acknowledgements that stop": (lambda c: read(c, 2), None),
    "an acknowledgement too many": (lambda c: read(c, 5, Kind.ACK), "expected the reader's word"),
    "the last word in place of one": (
        lambda c: read(c, 4, Kind.DONE), "expected an acknowledgement"),
    "no last word": (lambda c: read(c, 5), None),
    "death at once": (lambda c: (ask(c), c.close()), None),
    "death among the pieces": (lambda c: (ask(c), c.receive(), c.close()), None),
    "death before the last word": (lambda c: (read(c, 5), c.close()), None),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_a_reader_that_lies_or_dies_costs_no_one_else_anything(ends, name):
    act, message = READERS[name]
    writer = honest(ends, lease_s=30.0)
    writer.hold(PROMPT)
    with connect(writer.peer(unix=True).address, SECRET, timeout_s=5 * TIMEOUT_S) as connection:
        act(connection)
        with pytest.raises(WireClosedError if message is None else WireRefusedError, match=message):
            while True:
                connection.receive()
    wait_until(lambda: not writer.outbox._entries[PROMPT.name].reading, SOON_S)
    assert writer.outbox.take_freed() == set()
    # An honest reader, which does not lose patience where others have the cores.
    reader = DirectReader(part(OLD, ALL_HEADS), required=True, timeout_s=10 * TIMEOUT_S)
    ends.append(reader)
    reader.pull(PROMPT, peers=[writer.peer(unix=True)])
    assert reader.wait(1) == set()
    reader.check(MODEL, PROMPT)
    frees(writer, PROMPT.name)


def test_nobody_is_served_directly_over_tcp(ends):
    writer = honest(ends)
    writer.hold(PROMPT)
    with connect(writer.peer().address, SECRET, timeout_s=5 * TIMEOUT_S) as connection:
        assert connection.request(Kind.CACHES, {"generation": GENERATION}).header == {}
        ask(connection)
        with pytest.raises(WireRefusedError, match="not to be mapped so"):
            connection.receive()
