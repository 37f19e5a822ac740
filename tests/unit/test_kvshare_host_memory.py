"""Host memory over a disk is bounded, and who reads keeps what it reads."""

import threading

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.unit.kvshare_kv import all_read, stores
from vllm_plugins.kv_connectors.kvshare import segment_file
from vllm_plugins.kv_connectors.kvshare.payloads import PATIENCE_SECONDS, State


@pytest.fixture
def store():
    with stores() as make:
        yield make


@pytest.mark.parametrize("cause", ["disk", "room"])
def test_nobody_waits_for_ever(store, tmp_path, monkeypatch, cause):
    one = store(tmp_path / "kv", segments=1)
    one.save(1)
    one.written()
    one.save(2)
    one.written()
    go = threading.Event()
    if cause == "disk":
        monkeypatch.setattr(segment_file, "read_kv", lambda *args: go.wait(20))
    else:
        one.lease(2)
    lease = one.lease(1)
    one.now = PATIENCE_SECONDS - 0.1
    assert one.payloads.state(lease) == State.WAITING
    one.now = PATIENCE_SECONDS
    assert one.payloads.state(lease) == State.FAILED
    # It was only slow: the segment is still good.
    assert one.payloads.take_lost() == set()
    one.payloads.release(lease)
    go.set()


def test_a_segment_in_use_is_not_dropped_for_others(store, tmp_path):
    one = store(tmp_path / "kv", segments=3)
    one.save(1, 2)
    one.written()
    lease = one.lease(1, 2)
    for key in range(10, 20):
        one.save(key)
        one.written()
        assert one.payloads.state(lease) == State.READY
    one.check_load(1, 2)
    one.payloads.release(lease)
    one.save(20)
    one.written()
    one.save(21)
    assert 1 not in one.payloads._stored or 2 not in one.payloads._stored


def test_requests_get_their_memory_in_the_order_of_their_arrival(store, tmp_path):
    one = store(tmp_path / "kv", segments=2)
    one.fill(4)
    first, second, third = one.lease(0), one.lease(1, 2), one.lease(0)
    all_read(one.payloads)
    states = [one.payloads.state(lease) for lease in (first, second, third)]
    # The third would find room at once, and so would all that come after it.
    assert states == [State.READY, State.WAITING, State.WAITING]
    one.save(9)
    assert one.payloads.take_lost() == {9}
    one.payloads.release(first)
    one.payloads.poll()
    all_read(one.payloads)
    assert one.payloads.state(second) == State.READY
    assert one.payloads.state(third) == State.WAITING
    one.payloads.release(second)
    one.payloads.poll()
    all_read(one.payloads)
    assert one.payloads.state(third) == State.READY
    one.check_load(0)
    one.payloads.release(third)
    assert not one.payloads._held


def test_one_that_gave_up_waiting_is_not_in_the_way(store, tmp_path):
    one = store(tmp_path / "kv", segments=2)
    one.fill(4)
    first, second, third = one.lease(0), one.lease(1, 2), one.lease(0)
    one.payloads.release(second)
    all_read(one.payloads)
    assert one.payloads.state(third) == State.READY
    for lease in (first, third):
        one.payloads.release(lease)
    assert not one.payloads._held


def test_a_request_that_needs_more_than_all_memory_is_refused_at_once(store, tmp_path):
    one = store(tmp_path / "kv", segments=2)
    one.fill(4)
    large, small = one.lease(0, 1, 2), one.lease(0)
    assert one.payloads.state(large) == State.FAILED
    assert one.payloads.take_lost() == set()
    all_read(one.payloads)
    assert one.payloads.state(small) == State.READY


def test_memory_is_bounded_however_slow_the_writer_is(store, tmp_path, monkeypatch):
    go = threading.Event()
    real = segment_file.write

    def slow(*args):
        assert go.wait(20)
        return real(*args)

    monkeypatch.setattr(segment_file, "write", slow)
    one = store(tmp_path / "kv", segments=3)
    for key in range(10):
        one.save(key)
        assert one.payloads.bytes <= one.payloads._limit
    # The newest are lost, and the scheduler hears of it.
    assert one.payloads.take_lost() == set(range(3, 10))
    go.set()
    one.written()
    one.save(20, 21)
    one.written()
    lease = one.lease(0, 20)
    all_read(one.payloads)
    assert one.payloads.state(lease) == State.READY
    one.check_load(0, 20)


def test_a_full_disk_leaves_segments_in_memory_as_long_as_they_fit(store, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    one = store(tmp_path / "kv", segments=2)
    one.save(1)
    one.written()
    monkeypatch.setattr(segment_file, "write", full)
    one.save(2)
    one.written()
    assert one.payloads.take_lost() == set()
    lease = one.lease(2)
    assert one.payloads.state(lease) == State.READY
    one.check_load(2)
    one.payloads.release(lease)
    one.save(3)
    one.written()
    # Room for one more: what is on disk goes first here, as it was idle longest.
    assert one.payloads.take_lost() == set()
    one.save(4)
    one.written()
    assert one.payloads.take_lost() == {2}
    monkeypatch.undo()
    one.save(5)
    one.written()
    lease = one.lease(1, 5)
    all_read(one.payloads)
    assert one.payloads.state(lease) == State.READY
    one.check_load(1, 5)
