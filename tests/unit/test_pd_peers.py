"""Connections to prefill workers: used again, replaced, and the words that end and renew leases."""

import threading
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


def hold(writer, *names):
    for name in names:
        writer.outbox.hold(name, f"held-{name}", DIGEST, BLOCKS)


def test_renewing_reports_the_leases_that_some_worker_has_lost(new_writer, connections):
    first, second = new_writer(), new_writer()
    hold(first, "both", "first", "gone")
    hold(second, "both")
    first.outbox.release(["gone"])
    both = first.peer(), second.peer()
    lost = connections.renew(
        [
            reference(*both, name="both"),
            reference(*both, name="first"),
            reference(first.peer(), name="gone"),
            reference(second.peer(), name="never"),
        ]
    )
    assert lost == {"first", "gone", "never"}
    assert (first.served, second.served) == (1, 1)


def test_renewing_prolongs_leases(new_writer, connections):
    writer = new_writer(lease_s=0.2)
    hold(writer, "kept", "left")
    deadline = writer.outbox._entries["kept"].deadline
    assert connections.renew([reference(writer.peer(), name="kept")]) == set()
    assert writer.outbox._entries["kept"].deadline > deadline
    assert writer.outbox._entries["left"].deadline <= deadline + 0.1


def test_a_worker_that_cannot_be_reached_keeps_its_leases(new_writer, connections):
    writer = new_writer()
    hold(writer, "a")
    away = gone_peer(new_writer)
    lost = connections.renew([reference(away, name="t"), reference(writer.peer(), name="a")])
    assert lost == set()


def test_a_worker_that_was_restarted_has_lost_all_leases(new_writer, connections):
    peer = replace(new_writer().peer(), generation="f" * 16)
    assert connections.renew([reference(peer), reference(peer, name="u")]) == {"t", "u"}


@pytest.mark.parametrize("answer", [{}, {"transfers": "t"}, {"transfers": [1]}])
def test_a_malformed_answer_renews_nothing_and_loses_nothing(new_writer, connections, answer):
    def serve(connection):
        while True:
            connection.receive()
            connection.send(Kind.RENEWED, answer)

    writer = new_writer(serve=serve)
    assert connections.renew([reference(writer.peer())]) == set()
    wait_until(lambda: writer.left == 1)


def test_more_transfers_than_a_message_takes_go_in_several(new_writer, connections):
    writer = new_writer()
    names = [f"{i:0256d}" for i in range(2 * MAX_TRANSFERS + 10)]
    hold(writer, *names)
    references = [reference(writer.peer(), name=name) for name in names]
    assert connections.renew([*references, reference(writer.peer(), name="lost")]) == {"lost"}
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


def test_later_releases_come_one_after_another_whatever_fails(new_writer, connections):
    writer = new_writer()
    hold(writer, "a", "b")
    away = gone_peer(new_writer)
    for one in (
        reference(writer.peer(), name="a"),
        reference(away),
        reference(writer.peer(), name="b"),
    ):
        connections.release_later(one)
    came = set()
    wait_until(lambda: came.update(writer.outbox.take_freed()) or len(came) == 2)
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("pd-release") == 1
    connections.close()
    wait_until(lambda: "pd-release" not in [thread.name for thread in threading.enumerate()])


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
