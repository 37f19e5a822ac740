"""Connections to prefill workers: used again, replaced, and the words that end and renew leases."""

import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.pd_problem import (
    ALL_HEADS,
    DIGEST,
    TIMEOUT_S,
    Prompt,
    Writer,
    nothing_left,
    part,
    whole_model,
)
from tests.unit.wire_ends import SECRET, wait_until
from tests.wire_faults import DOWN, Fault, FaultyProxy
from vllm_plugins.kv_connectors.pd import peers
from vllm_plugins.kv_connectors.pd import release as release_module
from vllm_plugins.kv_connectors.pd.decode_scheduler import LeaseKeeper
from vllm_plugins.kv_connectors.pd.peers import PeerConnections
from vllm_plugins.kv_connectors.pd.protocol import MAX_TRANSFERS, Kind
from vllm_plugins.kv_connectors.pd.reference import BadReferenceError, Reference
from vllm_plugins.kv_connectors.pd.release import release
from vllm_plugins.wire.errors import (
    WireClosedError,
    WireError,
    WireRefusedError,
    WireTimeoutError,
)

MODEL = whole_model(1)
PROMPT = Prompt.of("t")
BLOCKS = ([1], [2])


@pytest.fixture(autouse=True)
def _nothing_left():
    with nothing_left():
        yield


@pytest.fixture
def new_writer():
    made = []

    def new(**changes):
        made.append(Writer(part(MODEL, ALL_HEADS), **changes))
        return made[-1]

    yield new
    for writer in made:
        writer.close()


@pytest.fixture
def connections():
    made = PeerConnections(SECRET, 0.5, TIMEOUT_S)
    yield made
    made.close()


def reference(*some, name="t"):
    return Reference(name, 10, DIGEST, some)


def describe(connection, peer):
    return connection.request(Kind.DESCRIBE, {"generation": peer.generation})


def gone_peer(new_writer):
    """Return a peer that does not listen any more."""
    writer = new_writer()
    writer.close()
    return writer.peer()


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_an_idle_connection_is_used_again(new_writer, connections, unix):
    writer = new_writer()
    for _ in range(5):
        with connections.to(writer.peer(unix=unix)) as connection:
            assert describe(connection, writer).kind == Kind.SHARD
            assert connection.local is unix
    assert writer.served == 1


def test_a_connection_in_use_is_lent_to_nobody_else(new_writer, connections):
    writer = new_writer()
    peer = writer.peer()
    for _ in range(2):
        with connections.to(peer) as one, connections.to(peer) as other:
            assert one is not other
            describe(one, writer)
            describe(other, writer)
    assert writer.served == 2


def test_each_peer_has_connections_of_its_own(new_writer, connections):
    writers = [new_writer(), new_writer()]
    for writer in writers * 2:
        with connections.to(writer.peer()) as connection:
            describe(connection, writer)
    assert [writer.served for writer in writers] == [1, 1]


def test_a_connection_that_failed_is_not_used_again(new_writer, connections):
    writer = new_writer()
    with pytest.raises(RuntimeError), connections.to(writer.peer()) as connection:
        describe(connection, writer)
        raise RuntimeError
    wait_until(lambda: writer.left == 1)
    with connections.to(writer.peer()) as connection:
        describe(connection, writer)
    assert writer.served == 2


def test_a_connection_that_was_idle_for_long_is_replaced(new_writer, connections, monkeypatch):
    writer = new_writer()
    monkeypatch.setattr(peers, "IDLE_S", 0.0)
    for _ in range(3):
        with connections.to(writer.peer()) as connection:
            describe(connection, writer)
    assert writer.served == 3
    wait_until(lambda: writer.left == 2)


def test_a_connection_that_was_cut_while_idle_is_replaced(new_writer, connections):
    writer = new_writer()
    peer = writer.peer()
    with FaultyProxy(peer.address) as proxy:
        through = replace(peer, address=proxy.address)
        for _ in range(2):
            with connections.to(through) as connection:
                describe(connection, writer)
            proxy.cut()
            wait_until(lambda: not connection.is_quiet)
    assert writer.served == 2


def test_connections_to_peers_of_which_nobody_asks_any_more_are_closed(
    new_writer, connections, monkeypatch
):
    old, new = new_writer(), new_writer()
    with connections.to(old.peer()) as connection:
        describe(connection, old)
    monkeypatch.setattr(peers, "IDLE_S", 0.0)
    with connections.to(new.peer()) as connection:
        describe(connection, new)
    wait_until(lambda: old.left == 1)


def test_peers_that_cannot_be_reached_leave_nothing_behind(new_writer, connections):
    peer = gone_peer(new_writer)
    for i in range(5):
        with pytest.raises(WireClosedError), connections.to(replace(peer, generation=f"{i:016x}")):
            pass
    assert not connections._idle


def test_what_comes_back_after_the_end_is_closed(new_writer, connections):
    writer = new_writer()
    with connections.to(writer.peer()) as connection:
        describe(connection, writer)
        connections.close()
    wait_until(lambda: writer.left == 1)


def test_a_worker_that_was_restarted_on_its_port_refuses_clearly(new_writer, connections):
    first = new_writer()
    peer = first.peer()
    with connections.to(peer) as connection:
        describe(connection, peer)
    first.close()
    second = new_writer(port=peer.address.port, generation="f" * 16)
    # The open connection went with the first, and another one reaches the second.
    with (
        pytest.raises(WireRefusedError, match="gone: this worker has been restarted"),
        connections.to(peer) as connection,
    ):
        describe(connection, peer)
    with connections.to(second.peer()) as connection:
        describe(connection, second)


def test_a_worker_that_does_not_answer_costs_the_timeout_and_no_more(new_writer, connections):
    writer = new_writer()
    with FaultyProxy(writer.server.address, Fault("stall", 0, DOWN)) as proxy:
        peer = writer.peer(address=proxy.address)
        with pytest.raises(WireTimeoutError), connections.to(peer):
            pass


def renewed(connections, references):
    """Renew leases, and return those that are lost."""
    lost = set()
    connections.renew_later(references, lost.update)
    wait_until(lambda: not connections._renewing)
    return lost


def hold(writer, *names):
    for name in names:
        writer.outbox.hold(name, f"held-{name}", DIGEST, BLOCKS)


def test_renewing_reports_the_leases_that_some_worker_has_lost(new_writer, connections):
    first, second = new_writer(), new_writer()
    hold(first, "both", "first", "gone")
    hold(second, "both")
    first.outbox.release(["gone"])
    second.outbox.release(["first"])
    both = first.peer(), second.peer()
    lost = renewed(
        connections,
        [
            reference(*both, name="both"),
            reference(*both, name="first"),
            reference(first.peer(), name="gone"),
            reference(second.peer(), name="later"),
        ],
    )
    assert lost == {"first", "gone"}
    assert (first.served, second.served) == (1, 1)


def test_renewing_prolongs_leases(new_writer, connections):
    writer = new_writer(lease_s=0.2)
    hold(writer, "kept", "left")
    deadline = writer.outbox._entries["kept"].deadline
    assert renewed(connections, [reference(writer.peer(), name="kept")]) == set()
    assert writer.outbox._entries["kept"].deadline > deadline
    assert writer.outbox._entries["left"].deadline <= deadline + 0.1


def test_a_worker_that_cannot_be_reached_keeps_its_leases(new_writer, connections):
    writer = new_writer()
    hold(writer, "a")
    away = gone_peer(new_writer)
    lost = renewed(connections, [reference(away, name="t"), reference(writer.peer(), name="a")])
    assert lost == set()


def test_a_worker_that_was_restarted_has_lost_all_leases(new_writer, connections):
    peer = replace(new_writer().peer(), generation="f" * 16)
    assert renewed(connections, [reference(peer), reference(peer, name="u")]) == {"t", "u"}


@pytest.mark.parametrize("answer", [{}, {"transfers": "t"}, {"transfers": [1]}])
def test_a_malformed_answer_renews_nothing_and_loses_nothing(new_writer, connections, answer):
    def serve(connection):
        while True:
            connection.receive()
            connection.send(Kind.RENEWED, answer)

    writer = new_writer(serve=serve)
    assert renewed(connections, [reference(writer.peer())]) == set()
    wait_until(lambda: writer.left == 1)


def test_more_transfers_than_a_message_takes_go_in_several(new_writer, connections):
    writer = new_writer()
    names = [f"{i:0256d}" for i in range(2 * MAX_TRANSFERS + 10)]
    hold(writer, *names)
    writer.outbox.release(["lost"])
    references = [reference(writer.peer(), name=name) for name in names]
    assert renewed(connections, [*references, reference(writer.peer(), name="lost")]) == {"lost"}
    connections.release(references)
    assert len(writer.outbox.take_freed()) == len(names)


def test_a_release_reaches_all_workers_that_can_be_reached(new_writer, connections):
    first, second = new_writer(), new_writer()
    for writer in (first, second):
        hold(writer, "t")
    with pytest.raises(WireError):
        connections.release([reference(first.peer(), gone_peer(new_writer), second.peer())])
    for writer in (first, second):
        assert writer.outbox.take_freed() == {"held-t"}


def test_later_releases_come_whatever_fails(new_writer, connections):
    writer = new_writer()
    hold(writer, "a", "b")
    for peer, name in ((writer.peer(), "a"), (gone_peer(new_writer), "t"), (writer.peer(), "b")):
        connections.release_later(reference(peer, name=name))
    freed(writer, {"held-a", "held-b"})
    connections.close()
    wait_until(lambda: not any(t.name.startswith("pd-words") for t in threading.enumerate()))
    # Nobody is told anything any more.
    connections.release_later(reference(writer.peer()))


@contextmanager
def stalled_peers(writer, count):
    """Peers that accept and say nothing, each of which costs the time for connecting."""
    with FaultyProxy(writer.server.address, Fault("stall", 0, DOWN)) as proxy:
        peer = writer.peer(address=proxy.address)
        yield [replace(peer, generation=f"{i:016x}") for i in range(count)]


def test_stalled_peers_cost_no_other_its_leases(new_writer, connections):
    healthy, keeper = new_writer(lease_s=2.0), LeaseKeeper(connections, 0.1)
    hold(healthy, "kept")
    with stalled_peers(new_writer(), 8) as some:
        for peer in some:
            keeper.watch(peer.generation, reference(peer, name=peer.generation))
        keeper.watch("healthy", reference(healthy.peer(), name="kept"))
        end = time.monotonic() + 4.0
        while time.monotonic() < end:
            assert not healthy.outbox.take_freed()
            time.sleep(0.05)
        assert not keeper.lost("healthy")
        keeper.close()


def test_stalled_peers_hold_up_no_others_release(new_writer, connections):
    healthy = new_writer()
    hold(healthy, "t")
    with stalled_peers(new_writer(), 14) as some:
        for peer in some * 2:
            connections.release_later(reference(peer))
        connections.release_later(reference(healthy.peer()))
        freed(healthy, {"held-t"})


def test_a_word_is_not_waited_for_as_long_as_a_prompt(new_writer, monkeypatch):
    monkeypatch.setattr(peers, "WORD_TIMEOUT_S", 0.2)

    def mute(connection):
        while connection.receive().kind == Kind.DESCRIBE:
            connection.send(Kind.SHARD, {})
        time.sleep(1.0)

    writer, connections = new_writer(serve=mute), PeerConnections(SECRET, 5.0, 30.0)
    with pytest.raises(WireTimeoutError):
        connections.release([reference(writer.peer())])
    with connections.to(writer.peer()) as connection:
        assert describe(connection, writer.peer()).kind == Kind.SHARD
        assert connection.timeout_s == 30.0
    connections.close()


def test_what_goes_wrong_in_the_background_is_said_and_stops_nothing(
    new_writer, connections, monkeypatch, caplog
):
    writer = new_writer()
    hold(writer, "t")
    with monkeypatch.context() as patch:
        patch.setattr(peers, "MAX_TRANSFERS", None)
        connections.release_later(reference(writer.peer()))
        assert renewed(connections, [reference(writer.peer())]) == set()
        wait_until(lambda: "leases were not released" in caplog.text)
    assert "leases were not renewed" in caplog.text
    connections.release_later(reference(writer.peer()))
    freed(writer, {"held-t"})


def freed(writer, requests):
    """Wait until the writer frees these requests' blocks."""
    came = set()
    wait_until(lambda: came.update(writer.outbox.take_freed()) or came == requests)


def test_a_router_frees_what_a_prefill_instances_answer_names(new_writer):
    writers = [new_writer(), new_writer()]
    for writer in writers:
        writer.hold(PROMPT)
    answer = reference(*(writer.peer(unix=True) for writer in writers)).to_params()
    release(answer, SECRET)
    for writer in writers:
        assert writer.outbox.take_freed() == {"held-t"}
        assert len(writer.outbox) == 0
    # Once more is harmless.
    release(answer, SECRET)


def test_a_router_hears_that_a_worker_cannot_be_told(new_writer, monkeypatch):
    monkeypatch.setattr(release_module, "CONNECT_TIMEOUT_S", 0.3)
    away = gone_peer(new_writer)
    with pytest.raises(WireClosedError, match="cannot be reached"):
        release(reference(away).to_params(), SECRET)
    writer = new_writer()
    writer.hold(PROMPT)
    with pytest.raises(WireRefusedError, match="secrets"):
        release(reference(writer.peer()).to_params(), b"another".ljust(40))
    assert writer.outbox.take_freed() == set()


def test_a_router_releases_nothing_by_parameters_without_reference():
    release({}, SECRET)
    release({"do_remote_decode": True}, SECRET)
    with pytest.raises(BadReferenceError):
        release({"do_remote_prefill": True}, SECRET)
