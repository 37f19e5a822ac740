"""A network that fails, and a reader's own faults: a failed request, once and in time, no more."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.pd_problem import (
    BLOCK_BYTES,
    BLOCKS,
    DIGEST,
    HEADS,
    MODEL,
    NEXT,
    PROMPT,
    SOON_S,
    Writer,
    fails,
    frees,
    goes_on,
    honest_writer,
    new_reader,
    part,
)
from tests.unit.wire_ends import wait_until
from tests.wire_faults import DOWN, NO_FAULT, UP, Fault, FaultyProxy
from vllm_plugins.kv_connectors.pd import peers
from vllm_plugins.kv_connectors.pd.decode_worker import PARALLEL_PULLS
from vllm_plugins.kv_connectors.pd.geometry import Heads
from vllm_plugins.kv_connectors.pd.orders import Chunk, Orders
from vllm_plugins.kv_connectors.pd.protocol import Span
from vllm_plugins.wire.shared_memory import SharedBuffer

pytestmark = pytest.mark.usefixtures("pd_nothing_left")


def fault_free_bytes():
    """Return how many bytes go up and down where nothing goes wrong."""
    ends = []
    writer = honest_writer(ends)
    writer.hold(PROMPT)
    with FaultyProxy(writer.server.address) as proxy:
        reader = new_reader(ends)
        reader.pull(PROMPT, peers=[writer.peer(address=proxy.address)])
        assert reader.wait(1) == set()
        frees(writer, PROMPT.name)
        carried = dict(proxy.carried)
        for end in reversed(ends):
            end.close()
    return carried


@pytest.fixture(scope="module")
def carried():
    return fault_free_bytes()


NETWORK = {
    "refused when it connects": ("refuse", 0, DOWN, {"closed"}),
    "reset in the handshake": ("reset", 0.02, DOWN, {"closed"}),
    "reset among the pieces": ("reset", 0.6, DOWN, {"closed"}),
    "reset in the request": ("reset", 0.75, UP, {"closed"}),
    "closed in the handshake": ("truncate", 0.02, DOWN, {"closed"}),
    "closed among the pieces": ("truncate", 0.6, DOWN, {"closed"}),
    "closed in the request": ("truncate", 0.75, UP, {"closed"}),
    "a bit of the handshake": ("flip", 0.02, DOWN, {"damaged", "refused", "closed"}),
    "a bit of the pieces": ("flip", 0.6, DOWN, {"damaged"}),
    "a bit of the last piece": ("flip", 0.97, DOWN, {"damaged"}),
    "a bit of the request": ("flip", 0.75, UP, {"closed", "refused"}),
    "silent from the start": ("stall", 0, DOWN, {"timeout"}),
    "silent among the pieces": ("stall", 0.6, DOWN, {"timeout"}),
    "silent before the end": ("stall", 0.99, DOWN, {"timeout"}),
    "deaf to the request": ("stall", 0.75, UP, {"timeout", "closed"}),
    "a byte at a time": ("trickle", 0.6, DOWN, {"timeout"}),
}


@pytest.mark.parametrize("case", NETWORK)
def test_a_fault_of_the_network_fails_the_request_and_no_other(ends, carried, case, monkeypatch):
    kind, share, direction, reasons = NETWORK[case]
    fault = Fault(kind, int(share * carried[direction]), direction, seconds=0.01)
    writer = honest_writer(ends)
    writer.hold(PROMPT)
    with FaultyProxy(writer.server.address, fault) as proxy:
        reader = new_reader(ends)
        peer = writer.peer(address=proxy.address)
        assert fails(reader, [peer], 4.0) in reasons
        reader.check(MODEL, broken=[PROMPT])
        frees(writer, PROMPT.name)
        # The connection over which the lease was released still has the fault.
        monkeypatch.setattr(peers, "IDLE_S", 0.0)
        proxy.fault = NO_FAULT
        writer.hold(NEXT)
        reader.pull(NEXT, peers=[peer])
        assert reader.wait(2) == {PROMPT.name}
        reader.check(MODEL, NEXT, broken=[PROMPT])
        frees(writer, NEXT.name)
        # The proxy waits for what goes through it.
        reader.close()


def test_a_slow_network_is_no_fault(ends):
    writer = honest_writer(ends)
    writer.hold(PROMPT)
    fault = Fault("delay", direction=DOWN, seconds=0.02)
    with FaultyProxy(writer.server.address, fault) as proxy:
        reader = new_reader(ends)
        reader.pull(PROMPT, peers=[writer.peer(address=proxy.address)])
        assert reader.wait(1) == set()
        reader.close()
    reader.check(MODEL, PROMPT)


def test_a_last_word_that_is_lost_costs_the_writer_its_lease_alone(ends, carried):
    writer = honest_writer(ends)
    writer.hold(PROMPT)
    with FaultyProxy(writer.server.address, Fault("stall", carried[UP] - 8, UP)) as proxy:
        reader = new_reader(ends)
        reader.pull(PROMPT, peers=[writer.peer(address=proxy.address)])
        assert reader.wait(1) == set()
        reader.check(MODEL, PROMPT)
        frees(writer, PROMPT.name)
        assert writer.outbox.take_expired() == 1
        reader.close()


def test_a_network_that_goes_while_a_prompt_is_computed_fails_it(ends):
    writer, reader = honest_writer(ends), new_reader(ends)
    with FaultyProxy(writer.server.address) as proxy:
        reader.pull(PROMPT, peers=[writer.peer(address=proxy.address)], streams=True)
        chunk = Chunk(PROMPT.name, DIGEST, PROMPT.source, (4, 2))
        writer.worker.begin_step(Orders(chunks=[chunk]))
        writer.worker.layer_computed("layer.0")
        wait_until(lambda: writer.worker._early > 0)
        proxy.cut()
        assert reader.wait(1, SOON_S) == {PROMPT.name}
        assert reader.reasons() == {"closed": 1}
        writer.worker.begin_step(Orders(cancelled=[PROMPT.name]))
        reader.close()


def test_a_writer_that_dies_among_the_pieces_fails_the_request(ends):
    writer, reader = honest_writer(ends), new_reader(ends)
    reader.pull(PROMPT, peers=[writer.peer(unix=True)], streams=True)
    chunk = Chunk(PROMPT.name, DIGEST, PROMPT.source, (4, 2))
    writer.worker.begin_step(Orders(chunks=[chunk]))
    writer.worker.layer_computed("layer.0")
    wait_until(lambda: writer.worker._early > 0)
    writer.server.stop(0.0)
    assert reader.wait(1, SOON_S) == {PROMPT.name}
    assert reader.reasons() == {"closed": 1}
    writer.worker.begin_step(Orders(cancelled=[PROMPT.name]))


def test_with_one_of_two_writers_gone_the_other_ones_lease_ends_too(ends):
    halves = [Heads(0, 2), Heads(2, 4)]
    first, second = (Writer(part(MODEL, half), half) for half in halves)
    reader = new_reader(ends)
    ends += [first, second]
    first.hold(PROMPT)
    assert fails(reader, [first.peer(), second.peer()], 3.0) == "gone"
    for name, cache in reader.caches.items():
        assert torch.equal(cache[:, 2:], reader.before[name][:, 2:])
    frees(first, PROMPT.name)
    # Released here before it was held.
    second.hold(PROMPT)
    frees(second, PROMPT.name)


@pytest.mark.parametrize("fault", ["cannot submit", "no memory"])
def test_a_fault_of_the_reader_itself_fails_the_request(ends, monkeypatch, fault):
    writer, reader = honest_writer(ends), new_reader(ends)
    writer.hold(PROMPT)

    def broken(*_):
        raise OSError(fault)

    with monkeypatch.context() as patch:
        place = (reader.pages, "scatter") if fault == "cannot submit" else (SharedBuffer, "create")
        patch.setattr(*place, broken)
        assert fails(reader, [writer.peer(unix=True)]) == "error"
    frees(writer, PROMPT.name)
    goes_on(reader, writer, unix=True)


def test_who_is_given_up_while_waiting_for_a_peer_that_is_silent_costs_no_time(ends):
    writer, reader = honest_writer(ends), new_reader(ends)
    prompts = [replace(PROMPT, name=f"waits{i}") for i in range(5 * PARALLEL_PULLS)]
    with FaultyProxy(writer.server.address, Fault("stall", 0, DOWN)) as proxy:
        reader.pull(*prompts, peers=[writer.peer(address=proxy.address)])
        reader.worker.take_finished({prompt.name for prompt in prompts})
        # As long as one of them takes, not as five.
        reader.wait(len(prompts), seconds=1.5)
    reasons = reader.reasons()
    assert set(reasons) == {"cancelled", "timeout"}
    assert reasons["timeout"] <= PARALLEL_PULLS


def test_failures_are_counted_by_reason_and_each_request_comes_back_once(ends):
    writer, reader = honest_writer(ends, lease_s=30.0), new_reader(ends)
    good = [
        replace(PROMPT, name=f"good{i}", targets=([i], []), spans=(Span(1, 2), Span(0, 0)))
        for i in range(10)
    ]
    bad = [replace(prompt, name=f"bad{i}") for i, prompt in enumerate(good)]
    for prompt in good:
        writer.hold(prompt)
    for pair in zip(good, bad, strict=True):
        reader.pull(*pair, peers=[writer.peer()])
    assert reader.wait(20) == {prompt.name for prompt in bad}
    received, failures, seconds = reader.worker.take_counts()
    assert dict(failures) == {"gone": 10}
    assert dict(received) == {"tcp": 10 * 2 * HEADS * BLOCK_BYTES}
    assert len(seconds) == 10
    frees(writer, *[prompt.name for prompt in good])
    assert BLOCKS > 10
