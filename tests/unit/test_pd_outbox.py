"""Leases: how each of them ends, once, and never under a reader."""

import contextlib
import threading
import time

import pytest

from tests.unit.wire_ends import wait_until
from vllm_plugins.kv_connectors.pd import outbox as outbox_module
from vllm_plugins.kv_connectors.pd.outbox import GoneError, Outbox
from vllm_plugins.kv_connectors.pd.protocol import Span

GROUPS = {"a": 0, "b": 1}
LAYERS = list(GROUPS)
DIGEST, OTHER = "d" * 32, "e" * 32
BLOCKS = ([11, 12, 13], [21, 22])
TOTAL = (3, 2)
SPANS = (Span(0, 3), Span(0, 2))
LEASE_S = 30.0


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def outbox(clock):
    return Outbox(GROUPS, LEASE_S, clock, announce_s=0.05)


def hold(outbox, name="t", request="r", digest=DIGEST, blocks=BLOCKS):
    outbox.hold(name, request, digest, blocks)


def announce(outbox, name="t", digest=DIGEST, blocks=BLOCKS):
    outbox.announce(name, digest, blocks)


def is_gone(outbox, name="t", digest=DIGEST):
    try:
        with outbox.reading(name, digest):
            return False
    except GoneError:
        return True


def read_all(reading, layers=LAYERS, spans=SPANS):
    """Return the blocks of all that is still to come, by layer."""
    came = {}
    while fresh := reading.next(layers, spans):
        for layer, span in fresh:
            with reading.copying(layer, span) as blocks:
                came.setdefault(layer, []).extend(blocks)
    return came


def test_a_lease_that_nobody_renews_ends_once(outbox, clock):
    hold(outbox)
    clock.now += LEASE_S - 1
    assert outbox.take_freed() == set()
    clock.now += 1
    assert outbox.take_freed() == {"r"}
    assert (outbox.take_expired(), outbox.take_expired()) == (1, 0)
    assert outbox.take_freed() == set()
    assert is_gone(outbox)
    assert len(outbox) == 0


def test_a_renewed_lease_lasts_longer(outbox, clock):
    hold(outbox)
    for _ in range(3):
        clock.now += LEASE_S - 1
        # What is unknown may be about to be held.
        assert outbox.renew(["t", "unknown"]) == ["t", "unknown"]
        assert outbox.take_freed() == set()
    clock.now += LEASE_S
    assert outbox.take_freed() == {"r"}
    assert outbox.renew(["t"]) == []


def test_a_release_ends_a_lease(outbox):
    hold(outbox)
    outbox.release(["t", "unknown"])
    assert outbox.take_freed() == {"r"}
    assert is_gone(outbox)
    outbox.release(["t"])
    assert outbox.take_freed() == set()
    assert outbox.take_expired() == 0


def test_what_was_released_before_is_freed_as_soon_as_it_is_held(outbox):
    outbox.release(["t"])
    hold(outbox)
    assert outbox.take_freed() == {"r"}
    assert is_gone(outbox)
    assert len(outbox) == 0


def test_a_reader_keeps_the_blocks_of_a_released_prompt(outbox):
    hold(outbox)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(outbox.reading("t", DIGEST))
        with outbox.reading("t", DIGEST):
            outbox.release(["t"])
            assert is_gone(outbox)
            with first.copying("a", SPANS[0]) as blocks:
                assert blocks == BLOCKS[0]
        assert outbox.take_freed() == set()
        with pytest.raises(GoneError, match="given up"):
            first.next(LAYERS, SPANS)
    assert outbox.take_freed() == {"r"}


def test_a_lease_does_not_end_under_a_reader(outbox, clock):
    hold(outbox)
    with outbox.reading("t", DIGEST):
        clock.now += 10 * LEASE_S
        assert outbox.take_freed() == set()
    # A reader that failed may come again.
    clock.now += LEASE_S - 1
    assert outbox.take_freed() == set()
    clock.now += 1
    assert outbox.take_freed() == {"r"}


def test_a_reader_has_a_leases_time_and_no_more(outbox, clock):
    hold(outbox)
    # Renewals are of the lease, not of the reader's time.
    with pytest.raises(GoneError, match="longer than a lease"), outbox.reading("t", DIGEST) as one:
        for _ in range(4):
            with one.copying("a", Span(0, 1)):
                clock.now += LEASE_S / 2
            outbox.renew(["t"])
    with outbox.reading("t", DIGEST) as another:
        assert read_all(another) == {"a": BLOCKS[0], "b": BLOCKS[1]}


def test_a_reader_has_that_time_from_when_the_prompt_is_computed(outbox, clock):
    announce(outbox)
    with outbox.reading("t", DIGEST) as reading:
        clock.now += 10 * LEASE_S
        outbox.computed({"t": (3, 2)}, "a")
        with reading.copying("a", Span(0, 1)):
            hold(outbox)
        clock.now += LEASE_S
        with reading.copying("a", Span(0, 1)):
            clock.now += 1
        with pytest.raises(GoneError, match="longer than a lease"):
            reading.blocks("a", Span(0, 1))


def test_with_all_readers_done_the_blocks_are_freed_once(outbox):
    hold(outbox)
    for rank in (0, 1, 1, 2):
        assert outbox.take_freed() == set()
        with outbox.reading("t", DIGEST) as reading:
            assert read_all(reading) == dict(zip(LAYERS, BLOCKS, strict=True))
            reading.finish(rank, 3)
            assert outbox.take_freed() == set()
    assert outbox.take_freed() == {"r"}
    assert outbox.take_freed() == set()
    assert outbox.take_expired() == 0


def test_of_two_requests_under_one_name_the_first_stays(outbox):
    hold(outbox, request="first")
    hold(outbox, request="second", digest=OTHER, blocks=([91], [92]))
    assert outbox.take_freed() == {"second"}
    with outbox.reading("t", DIGEST) as reading:
        assert read_all(reading) == dict(zip(LAYERS, BLOCKS, strict=True))
        reading.finish(0, 1)
    assert outbox.take_freed() == {"first"}


@pytest.mark.parametrize("held", [False, True], ids=["computed", "held"])
def test_another_prompt_under_the_same_name_never_gives_its_blocks(outbox, held):
    announce(outbox)
    if held:
        hold(outbox)
    announce(outbox, digest=OTHER, blocks=([91], [92]))
    outbox.computed({"t": TOTAL}, "a")
    with outbox.reading("t", DIGEST) as reading, reading.copying("a", Span(0, 1)) as blocks:
        assert blocks == [11]
    hold(outbox, request="other", digest=OTHER, blocks=([91], [92]))
    assert outbox.take_freed() == {"other"}
    assert is_gone(outbox, digest=OTHER)
    if not held:
        hold(outbox)
    with outbox.reading("t", DIGEST) as reading:
        assert read_all(reading) == dict(zip(LAYERS, BLOCKS, strict=True))
    assert outbox.take_freed() == set()


def test_a_cancel_under_the_name_of_a_held_prompt_leaves_it_alone(outbox):
    hold(outbox)
    outbox.cancel(["t"])
    with outbox.reading("t", DIGEST) as reading:
        assert read_all(reading) == dict(zip(LAYERS, BLOCKS, strict=True))


def test_another_prompts_digest_is_refused(outbox):
    hold(outbox)
    with pytest.raises(GoneError, match="another prompt's"), outbox.reading("t", OTHER):
        pass
    assert not is_gone(outbox)


def test_an_unknown_transfer_is_waited_for_and_then_gone(outbox):
    start = time.monotonic()
    with pytest.raises(GoneError, match="no such transfer was announced"):
        outbox.reading("t", DIGEST).__enter__()
    assert time.monotonic() - start >= 0.05


@pytest.mark.parametrize("bring", [announce, hold])
def test_a_transfer_that_comes_while_it_is_waited_for_is_found(clock, bring):
    outbox = Outbox(GROUPS, LEASE_S, clock, announce_s=20.0)
    gone = []
    waiting = threading.Thread(target=lambda: gone.append(is_gone(outbox)))
    waiting.start()
    bring(outbox)
    waiting.join(5)
    assert gone == [False]


def test_an_ended_transfer_is_gone_at_once(clock):
    outbox = Outbox(GROUPS, LEASE_S, clock, announce_s=20.0)
    start = time.monotonic()
    outbox.release(["t"])
    with pytest.raises(GoneError, match="the lease has ended"):
        outbox.reading("t", DIGEST).__enter__()
    assert time.monotonic() - start < 5


def test_ended_transfers_are_remembered_up_to_a_bound(outbox, monkeypatch):
    monkeypatch.setattr(outbox_module, "REMEMBERED", 3)
    outbox.release([f"t{i}" for i in range(100)])
    assert len(outbox._gone) == 3
    for name in ("t96", "t99"):
        hold(outbox, name, name)
    assert outbox.take_freed() == {"t99"}
    assert not is_gone(outbox, "t96")


def test_positions_that_the_prompt_does_not_have_are_refused(outbox):
    hold(outbox)
    with outbox.reading("t", DIGEST) as reading:
        spans = (Span(0, 4), Span(0, 0))
        assert reading.next(LAYERS, spans) == [("a", spans[0])]
        with pytest.raises(GoneError, match="fewer blocks"), reading.copying("a", spans[0]):
            pass


def test_nothing_wanted_is_nothing_to_wait_for(outbox):
    announce(outbox)
    with outbox.reading("t", DIGEST) as reading:
        assert reading.next(LAYERS, (Span(2, 2), Span(0, 0))) == []


def test_layers_come_as_they_are_computed_each_position_once(outbox):
    announce(outbox, blocks=([11], [21]))
    with outbox.reading("t", DIGEST) as reading:
        outbox.computed({"t": (1, 0), "unknown": (9, 9)}, "a")
        assert reading.computing
        assert reading.next(LAYERS, SPANS) == [("a", Span(0, 1))]
        outbox.computed({"t": (1, 0)}, "b")
        announce(outbox, blocks=BLOCKS)
        outbox.computed({"t": (3, 2)}, "a")
        assert reading.next(LAYERS, SPANS) == [("a", Span(1, 3))]
        outbox.computed({"t": (3, 2)}, "b")
        assert reading.next(LAYERS, SPANS) == [("b", Span(0, 2))]
        assert reading.next(LAYERS, SPANS) == []
        reading.finish(0, 1)
    assert outbox.take_freed() == set()


def test_only_wanted_positions_come_while_they_are_computed(outbox):
    announce(outbox)
    spans = (Span(1, 2), Span(1, 2))
    with outbox.reading("t", DIGEST) as reading:
        outbox.computed({"t": (1, 1)}, "a")
        outbox.computed({"t": (3, 2)}, "b")
        assert reading.next(LAYERS, spans) == [("b", Span(1, 2))]
        hold(outbox)
        assert not reading.computing
        assert reading.next(LAYERS, spans) == [("a", Span(1, 2))]
        assert reading.next(LAYERS, spans) == []


def test_the_rest_comes_when_the_prompt_is_held(outbox):
    announce(outbox)
    with outbox.reading("t", DIGEST) as reading:
        outbox.computed({"t": (2, 0)}, "a")
        assert reading.next(LAYERS, SPANS) == [("a", Span(0, 2))]
        assert reading.computing
        # The last step is over, and the next one brings the order to hold the blocks.
        outbox.prefilled(["t", "unknown"])
        assert not reading.computing
        hold(outbox)
        assert reading.next(LAYERS, SPANS) == [("a", Span(2, 3)), ("b", Span(0, 2))]
        reading.finish(0, 1)
    assert outbox.take_freed() == {"r"}


def test_readers_that_were_done_before_the_hold_end_it_at_once(outbox):
    announce(outbox)
    for layer in LAYERS:
        outbox.computed({"t": TOTAL}, layer)
    for rank in range(2):
        with outbox.reading("t", DIGEST) as reading:
            read_all(reading)
            reading.finish(rank, 2)
    hold(outbox)
    assert outbox.take_freed() == {"r"}
    assert outbox.take_expired() == 0


def test_a_release_while_the_prompt_is_computed_ends_it_when_it_is_held(outbox):
    announce(outbox)
    with outbox.reading("t", DIGEST) as reading:
        outbox.release(["t"])
        hold(outbox)
        assert outbox.take_freed() == set()
        with pytest.raises(GoneError):
            reading.next(LAYERS, SPANS)
    assert outbox.take_freed() == {"r"}
    assert len(outbox) == 0


def test_a_prefill_that_stands_still_is_given_up_by_its_reader():
    outbox = Outbox(GROUPS, 0.05)
    announce(outbox)
    with outbox.reading("t", DIGEST) as reading, pytest.raises(GoneError, match="does not go on"):
        reading.next(LAYERS, SPANS)


def test_a_cancel_waits_for_copies_and_fails_their_readers(outbox):
    announce(outbox)
    outbox.computed({"t": TOTAL}, "a")
    cancelled = threading.Event()

    def cancel():
        outbox.cancel(["t"])
        cancelled.set()

    with outbox.reading("t", DIGEST) as reading:
        thread = threading.Thread(target=cancel)
        with reading.copying("a", SPANS[0]):
            thread.start()
            wait_until(lambda: reading._entry.ended)
            assert not cancelled.is_set()
        assert cancelled.wait(5)
        thread.join()
        with pytest.raises(GoneError, match="given up"):
            reading.next(LAYERS, SPANS)
        with pytest.raises(GoneError, match="given up"), reading.copying("a", SPANS[0]):
            pass
    assert is_gone(outbox)
    assert len(outbox) == 0


def test_a_cancel_wakes_a_reader_that_waits_for_a_layer():
    outbox = Outbox(GROUPS, 60.0)
    announce(outbox)
    errors = []
    waiting = threading.Event()

    def read():
        with contextlib.suppress(GoneError), outbox.reading("t", DIGEST) as reading:
            waiting.set()
            try:
                reading.next(LAYERS, SPANS)
            except GoneError as error:
                errors.append(str(error))

    thread = threading.Thread(target=read)
    thread.start()
    assert waiting.wait(5)
    outbox.cancel(["t"])
    thread.join(5)
    assert errors == ["the prefill was given up"]


def test_what_was_cancelled_is_freed_when_it_is_held_after_all(outbox):
    announce(outbox)
    outbox.cancel(["t", "unknown"])
    announce(outbox)
    hold(outbox)
    assert outbox.take_freed() == {"r"}
    assert is_gone(outbox)
