"""Decode workers that lie or die: the prompt stays whole for those who do not."""

import os
import tempfile
from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.pd_problem import (
    DIGEST,
    GENERATION,
    GROUPS,
    HEADS,
    MODEL,
    PIECE_BYTES,
    PROMPT,
    TIMEOUT_S,
    frees,
    honest_writer,
    new_reader,
)
from tests.unit.wire_ends import SECRET, wait_until
from vllm_plugins.kv_connectors.pd.protocol import SLOTS, Kind, PullRequest, Span
from vllm_plugins.wire.connection import connect
from vllm_plugins.wire.errors import WireClosedError, WireRefusedError
from vllm_plugins.wire.shared_memory import SharedBuffer

pytestmark = pytest.mark.usefixtures("pd_nothing_left")


def request(**changes):
    """Return an honest request for the prompt, apart from the changes."""
    wanted = PullRequest(
        PROMPT.name, DIGEST, PROMPT.spans, tuple(GROUPS.items()), (0, HEADS), 0, 1, 0
    )
    return replace(wanted, **changes).to_json() | {"generation": GENERATION}


def ask(connection, **changes):
    connection.send(Kind.PULL, request(**changes))


def receive_until(connection, kind, *, acknowledge=False):
    """Receive up to a message of a kind."""
    while (frame := connection.receive()).kind != kind:
        assert frame.kind == Kind.PIECE
        if acknowledge:
            connection.send(Kind.ACK, {})


SLOT_BYTES = SLOTS * PIECE_BYTES


def share(connection, size=SLOT_BYTES):
    with SharedBuffer.create(size) as shared:
        ask(connection, shared=SLOT_BYTES)
        connection.send_descriptor(shared.descriptor)


def share_file(connection, file):
    ask(connection, shared=SLOT_BYTES)
    connection.send_descriptor(file)


def share_unsealed(connection):
    file = os.memfd_create("unsealed")
    os.ftruncate(file, SLOT_BYTES)
    share_file(connection, file)
    os.close(file)


def share_disk(connection):
    with tempfile.TemporaryFile() as file:
        file.truncate(SLOT_BYTES)
        share_file(connection, file.fileno())


def finish(connection, *words):
    """Take all pieces, and say something in place of the last word."""
    ask(connection)
    receive_until(connection, Kind.END)
    for word in words:
        connection.send(word, {})


def acknowledge_too_often(connection):
    share(connection)
    receive_until(connection, Kind.END, acknowledge=True)
    connection.send(Kind.ACK, {})


# What each reader does, and whether the writer refuses it at once or waits for it in vain.
READERS = {
    "heads beyond the last": (lambda c: ask(c, heads=(0, HEADS + 1)), "no such heads"),
    "no heads": (lambda c: ask(c, heads=(2, 2)), "no such heads"),
    "heads backwards": (lambda c: ask(c, heads=(3, 1)), "no such heads"),
    "an unknown layer": (lambda c: ask(c, layers=(("layer.9", 0),)), "no such layer"),
    "a layer of another group": (lambda c: ask(c, layers=(("layer.0", 1),)), "no such layer"),
    "a layer twice": (lambda c: ask(c, layers=(("layer.0", 0),) * 2), "named twice"),
    "positions beyond the end": (
        lambda c: ask(c, groups=(Span(0, 8), Span(0, 1))), "fewer blocks"),
    "millions of positions": (
        lambda c: ask(c, groups=(Span(0, 1 << 24), Span(0, 1))), "fewer blocks"),
    "an unknown transfer": (lambda c: ask(c, transfer_id="u"), "no such transfer"),
    "another prompt": (lambda c: ask(c, digest="c" * 32), "another prompt's"),
    "another generation": (
        lambda c: c.send(Kind.PULL, request() | {"generation": "f" * 16}), "restarted"),
    "no generation": (lambda c: c.send(Kind.DESCRIBE, {}), "generation is no short text"),
    "nonsense": (lambda c: c.send(Kind.PULL, request() | {"groups": "all"}), "no list of spans"),
    "too many transfers": (
        lambda c: c.send(Kind.RENEW, {"generation": GENERATION, "transfers": ["t"] * 5000}),
        "transfers is no list"),
    "an unknown message": (lambda c: c.send(99, {}), "unexpected message 99"),
    "a message out of place": (lambda c: c.send(Kind.DONE, {}), "unexpected message"),
    "shared memory that is too small": (lambda c: ask(c, shared=64), "another size"),
    "shared memory that is too large": (lambda c: ask(c, shared=2 * SLOT_BYTES), "another size"),
    "shared memory of a terabyte": (lambda c: ask(c, shared=1 << 40), "another size"),
    "shared memory that is smaller than told": (
        lambda c: share(c, SLOT_BYTES - 1), "came with a size of"),
    "shared memory that can shrink": (share_unsealed, "not sealed"),
    "shared memory that is a file on disk": (share_disk, "cannot be mapped|not sealed"),
    "shared memory that does not come": (lambda c: ask(c, shared=SLOT_BYTES), None),
    "a message in place of shared memory": (
        lambda c: (ask(c, shared=SLOT_BYTES), c.send(Kind.ACK, {})), None),
    "no acknowledgement": (share, None),
    "an acknowledgement too many": (acknowledge_too_often, "expected the reader's word"),
    "no last word": (finish, None),
    "another last word": (lambda c: finish(c, Kind.ACK), "expected the reader's word"),
    "death at once": (lambda c: (ask(c), c.close()), None),
    "death among the pieces": (lambda c: (ask(c), c.receive(), c.close()), None),
    "death before the last word": (lambda c: (finish(c), c.close()), None),
}  # fmt: skip


def is_refused(connection, message):
    with pytest.raises(WireRefusedError, match=message):
        receive_until(connection, Kind.END)


def is_dropped(connection):
    """Wait until this or the other end has closed the connection."""
    with pytest.raises(WireClosedError):
        while True:
            connection.receive()


@pytest.mark.parametrize("name", READERS)
def test_a_reader_that_lies_or_dies_costs_no_one_else_anything(ends, name):
    act, message = READERS[name]
    writer = honest_writer(ends, lease_s=30.0)
    writer.hold(PROMPT)
    unix = "shared" in name or "acknowledgement" in name
    address = writer.peer(unix=unix).address
    with connect(address, SECRET, timeout_s=5 * TIMEOUT_S) as connection:
        act(connection)
        if message is not None:
            is_refused(connection, message)
        else:
            is_dropped(connection)
    wait_until(lambda: not writer.outbox._entries[PROMPT.name].reading)
    assert writer.outbox.take_freed() == set()
    reader = new_reader(ends)
    reader.pull(PROMPT, peers=[writer.peer(unix=unix)])
    assert reader.wait(1) == set()
    reader.check(MODEL, PROMPT)
    frees(writer, PROMPT.name)


def test_shared_memory_over_tcp_is_refused(ends):
    writer = honest_writer(ends)
    writer.hold(PROMPT)
    with connect(writer.peer().address, SECRET, timeout_s=5 * TIMEOUT_S) as connection:
        ask(connection, shared=SLOT_BYTES)
        is_refused(connection, "descriptors travel over Unix sockets only")
