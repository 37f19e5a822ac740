"""Which caches are mapped, for how long, and what happens where they cannot be."""

import gc
import logging
import multiprocessing
import threading
from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.pd_direct import Child, DirectReader, DirectWriter, MemfdCaches, mapped_bytes
from tests.pd_problem import (
    ALL_HEADS,
    BLOCKS,
    HEADS,
    MODEL,
    NEXT,
    OLD,
    PROMPT,
    TOKENS,
    Writer,
    fails,
    frees,
    part,
)
from tests.unit.wire_ends import wait_until
from vllm_plugins.kv_connectors.pd import direct_peers
from vllm_plugins.kv_connectors.pd.direct import UnavailableError, export_caches
from vllm_plugins.kv_connectors.pd.protocol import Kind
from vllm_plugins.wire.errors import WireError, WireRefusedError

pytestmark = pytest.mark.usefixtures("pd_nothing_left")
SIZE = sum(cache.nbytes for cache in MODEL.values())


@pytest.fixture(autouse=True)
def _quick_watch(monkeypatch):
    monkeypatch.setattr(direct_peers, "WATCH_S", 0.02)
    # What earlier tests left in cycles.
    gc.collect()
    assert not mapped_bytes()


def writer_of(ends, kind=DirectWriter, **changes):
    writer = kind(part(MODEL, ALL_HEADS), **changes)
    ends.append(writer)
    return writer


def reader_of(ends, **changes):
    reader = DirectReader(part(OLD, ALL_HEADS), **changes)
    ends.append(reader)
    return reader


def pulled(reader, peer, prompt, so_far=0):
    """Pull a prompt; return the way that it came."""
    reader.pull(prompt, peers=[peer])
    assert reader.wait(so_far + 1) == set()
    received, _, _ = reader.worker.take_counts()
    (way,) = received
    return way


class Unwilling(MemfdCaches):
    """Opens nothing."""

    def open(self, handle, device):
        raise UnavailableError("this device has no peer access to the other one")


class Elsewhere(MemfdCaches):
    device = "another host's memory"


class Nonsense:
    """A writer that answers nonsense when it is asked for its handles."""

    def __init__(self, ends):
        self.writer = writer_of(ends, serve=self.serve)

    def serve(self, connection):
        self.writer.worker.serve(Changed(connection))


class Changed:
    """A connection over which handles leave with other bytes than the caches have."""

    def __init__(self, connection):
        self._connection = connection

    def send(self, kind, header, *payload):
        if kind == Kind.HANDLES:
            header = header | {"num_blocks": BLOCKS // 2}
        self._connection.send(kind, header, *payload)

    def __getattr__(self, name):
        return getattr(self._connection, name)

    def __setattr__(self, name, value):
        if name == "_connection":
            super().__setattr__(name, value)
        else:
            setattr(self._connection, name, value)


CASES = {
    "the writer exports none": (lambda ends: writer_of(ends, Writer), MemfdCaches, "its log says"),
    "they cannot be opened": (writer_of, Unwilling, "no peer access"),
    "they are elsewhere": (writer_of, Elsewhere, "on another host"),
    "the handles are malformed": (lambda ends: Nonsense(ends).writer, MemfdCaches, "another size"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_mapped_comes_through_host_memory_and_is_said_once(ends, name, caplog):
    make, direct, reason = CASES[name]
    writer, reader = make(ends), reader_of(ends, direct=direct())
    for prompt in (PROMPT, NEXT):
        writer.hold(prompt)
    peer = writer.peer(unix=True)
    with caplog.at_level(logging.WARNING, "vllm.vllm_plugins.pd"):
        assert pulled(reader, peer, PROMPT) == "shared_memory"
        assert pulled(reader, peer, NEXT, 1) == "shared_memory"
    reader.check(MODEL, PROMPT, NEXT)
    (line,) = [r.getMessage() for r in caplog.records if "cannot be mapped" in r.getMessage()]
    assert reason in line
    assert "KV comes through host memory" in line


@pytest.mark.parametrize("name", CASES)
def test_where_it_must_be_mapped_the_request_fails(ends, name):
    make, direct, _ = CASES[name]
    writer, reader = make(ends), reader_of(ends, direct=direct(), required=True)
    writer.hold(PROMPT)
    assert fails(reader, [writer.peer(unix=True)]) == "refused"
    reader.check(MODEL)
    frees(writer, PROMPT.name)


def test_what_is_reached_by_tcp_comes_by_tcp(ends):
    writer, reader = writer_of(ends), reader_of(ends)
    writer.hold(PROMPT)
    assert pulled(reader, writer.peer(), PROMPT) == "tcp"
    assert reader.direct.opened == 0


def test_rows_of_another_form_come_through_host_memory(ends):
    """One side's kernels divide blocks of the pool in two, the other's do not."""
    halves = {
        name: cache.reshape(2 * BLOCKS, HEADS, TOKENS // 2, -1).contiguous()
        for name, cache in MODEL.items()
    }
    writer, reader = DirectWriter(halves), reader_of(ends)
    ends.append(writer)
    writer.hold(PROMPT)
    assert pulled(reader, writer.peer(unix=True), PROMPT) == "shared_memory"


def mappings(reader):
    return reader.peers._mappings


def test_another_run_at_the_address_takes_the_formers_place(ends):
    first = writer_of(ends, generation="a" * 16)
    reader = reader_of(ends, required=True)
    first.hold(PROMPT)
    assert pulled(reader, first.peer(unix=True), PROMPT) == "cuda_ipc"
    old = first.peer(unix=True)
    shard = reader.peers.caches_of(old, first.pages.shard).shard
    first.worker._generation = "b" * 16
    new = replace(old, generation="b" * 16)
    first.hold(NEXT)
    assert pulled(reader, new, NEXT, 1) == "cuda_ipc"
    assert list(mappings(reader)) == [new]
    # A reference to the former run is stale; it neither maps anything nor costs the new one.
    with pytest.raises(WireRefusedError, match="gone: this worker has been restarted"):
        reader.peers.caches_of(old, shard)
    assert list(mappings(reader)) == [new]
    reader.check(MODEL, PROMPT, NEXT)


def test_mappings_go_when_the_worker_is_closed(ends):
    writer, reader = writer_of(ends), reader_of(ends)
    writer.hold(PROMPT)
    assert pulled(reader, writer.peer(unix=True), PROMPT) == "cuda_ipc"
    assert mapped_bytes() == 2 * SIZE
    gc.disable()
    try:
        reader.close()
        wait_until(lambda: mapped_bytes() == SIZE)
    finally:
        gc.enable()
    # A pull that had been waiting gets a mapping of its own, which goes with it.
    peer = writer.peer(unix=True)
    assert reader.peers.caches_of(peer, writer.pages.shard) is not None
    assert mappings(reader)[peer].connection is None


def test_mappings_are_watched_though_the_thread_for_it_could_not_be_started_at_once(
    ends, monkeypatch
):
    first, second, reader = writer_of(ends), writer_of(ends), reader_of(ends)
    begin = threading.Thread.start

    def start(thread):
        if thread.name == "pd-direct":
            raise RuntimeError("can't start new thread")
        begin(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert reader.peers.caches_of(first.peer(unix=True), first.pages.shard) is not None
    assert reader.peers.caches_of(second.peer(unix=True), second.pages.shard) is not None
    first.close()
    wait_until(lambda: list(mappings(reader)) == [second.peer(unix=True)])


def test_a_peer_that_cannot_be_asked_is_asked_again(ends):
    writer, reader = writer_of(ends), reader_of(ends)
    peer, shard = writer.peer(unix=True), writer.pages.shard
    lost = replace(peer, address=replace(peer.address, unix="", port=1))
    with pytest.raises(WireError):
        reader.peers.caches_of(lost, shard)
    assert not mappings(reader)
    assert reader.peers.caches_of(peer, shard) is not None


@pytest.fixture(scope="module")
def children():
    """Starts processes that have imported everything, so that it is done once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.pd_direct"])
    # The first process starts the server, whose descriptors stay.
    first = context.Process(target=gc.collect)
    first.start()
    first.join()
    return context


@pytest.fixture
def child(children, ends):
    made = Child(children)
    ends.append(made)
    return made


def test_a_prompt_comes_out_of_another_process(ends, child):
    reader = reader_of(ends, required=True)
    assert pulled(reader, child.peer, PROMPT) == "cuda_ipc"
    assert pulled(reader, child.peer, NEXT, 1) == "cuda_ipc"
    reader.check(MODEL, PROMPT, NEXT)
    wait_until(lambda: child.say("freed") == ["held-next", "held-t"])
    assert mapped_bytes() == SIZE
    # It is the other process's memory indeed.
    child.say("overwrite")
    mapped = mappings(reader)[child.peer].caches
    assert all((cache == BLOCKS).all() for cache in mapped.caches.values())
    del mapped
    # Killed, it says nothing, and its memory is given back all the same; without the collector.
    gc.disable()
    try:
        child.kill()
        wait_until(lambda: not mapped_bytes())
    finally:
        gc.enable()
    assert not mappings(reader)


def test_a_process_that_is_killed_under_a_copy_fails_the_request(
    ends, children, child, monkeypatch
):
    reader = reader_of(ends, required=True)
    copy = reader.pages.copy

    def killed_first(*arguments):
        child.kill()
        copy(*arguments)

    monkeypatch.setattr(reader.pages, "copy", killed_first)
    assert fails(reader, [child.peer]) == "closed"
    reader.check(MODEL, broken=[PROMPT])
    wait_until(lambda: not mappings(reader))
    monkeypatch.setattr(reader.pages, "copy", copy)
    successor = Child(children, child.peer.address.port, "b" * 16)
    ends.append(successor)
    assert successor.peer.address.port == child.peer.address.port
    reader.pull(NEXT, peers=[successor.peer])
    assert reader.wait(2) == {PROMPT.name}
    reader.check(MODEL, NEXT, broken=[PROMPT])


def test_recurrent_states_are_not_mapped(ends):
    pages = writer_of(ends).pages
    pages.shard = replace(pages.shard, states=(("layer.2", "a form"),))
    with pytest.raises(UnavailableError, match="recurrent states"):
        export_caches(pages, MemfdCaches())
