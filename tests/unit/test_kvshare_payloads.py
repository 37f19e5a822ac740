"""KV in three tiers: the same bits from each, or the news that they are lost."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.unit.kvshare_kv import SEGMENT, Store, all_read, stores
from vllm_plugins.kv_connectors.kvshare import segment_file
from vllm_plugins.kv_connectors.kvshare.payloads import Piece, State


@pytest.fixture
def store():
    with stores() as make:
        yield make


def test_host_memory_alone_returns_what_was_saved(store):
    one = store()
    one.save(1, 2, 3)
    lease = one.lease(1, 3)
    assert one.payloads.state(lease) == State.READY
    one.check_load(3, 1, 2)
    assert one.payloads.bytes == 3 * SEGMENT
    one.payloads.forget(1)
    assert one.payloads.state(lease) == State.FAILED
    assert one.payloads.take_lost() == {1}
    assert one.payloads.take_lost() == set()


def test_what_was_dropped_from_memory_comes_back_from_disk(store, tmp_path):
    one = store(tmp_path / "kv", segments=2)
    one.fill(6)
    assert sorted(one.payloads._stored) == [4, 5]
    assert one.payloads.take_lost() == set()
    for keys in [(0,), (1, 2), (5, 0), (3,)]:
        lease = one.lease(*keys)
        all_read(one.payloads)
        assert one.payloads.state(lease) == State.READY
        one.payloads.start(lease)
        one.check_load(*keys)
        one.payloads.release(lease)
    assert one.payloads.bytes == sum(kv.nbytes for kv in one.payloads._stored.values())


def test_a_lease_waits_while_its_file_is_read(store, tmp_path, monkeypatch):
    one = store(tmp_path / "kv", segments=1)
    one.save(1)
    one.written()
    one.save(2)
    one.written()
    go = threading.Event()
    real = segment_file.read_kv

    def slow(*args):
        assert go.wait(20)
        return real(*args)

    monkeypatch.setattr(segment_file, "read_kv", slow)
    lease = one.lease(1)
    for _ in range(3):
        one.payloads.poll()
        assert one.payloads.state(lease) == State.WAITING
    go.set()
    all_read(one.payloads)
    assert one.payloads.state(lease) == State.READY
    one.check_load(1)


def test_what_is_forgotten_while_it_is_written_or_read_is_gone(store, tmp_path, monkeypatch):
    go, begun = threading.Event(), threading.Event()
    real = segment_file.write

    def slow(*args):
        begun.set()
        assert go.wait(20)
        return real(*args)

    monkeypatch.setattr(segment_file, "write", slow)
    one = store(tmp_path / "kv", segments=4)
    one.save(1, 2)
    assert begun.wait(20)
    one.payloads.forget(1)
    one.payloads.forget(2)
    assert one.payloads.bytes == 0
    go.set()
    one.written()
    assert list((tmp_path / "kv").iterdir()) == []
    assert len(one.payloads) == 0

    one.save(3)
    one.written()
    one.payloads._drop(3)
    reading = threading.Event()
    monkeypatch.setattr(segment_file, "read_kv", lambda *args: reading.wait(20))
    lease = one.lease(3)
    one.payloads.forget(3)
    assert one.payloads.state(lease) == State.FAILED
    assert one.payloads.bytes == 0
    reading.set()
    one.written()
    one.payloads.poll()
    assert len(one.payloads) == 0
    assert list((tmp_path / "kv").iterdir()) == []


@pytest.mark.parametrize("fault", ["absent", "truncated", "flipped", "too long"])
def test_a_damaged_file_is_lost_and_removed(store, tmp_path, fault):
    one = store(tmp_path / "kv", segments=3)
    one.save(1, 2)
    one.written()
    one.payloads._drop(1)
    path = tmp_path / "kv" / "1.safetensors"
    data = bytearray(path.read_bytes())
    if fault == "flipped":
        data[-5] ^= 1
    elif fault == "truncated":
        data = data[:-5]
    elif fault == "too long":
        data += b"0" * 5
    path.write_bytes(data)
    if fault == "absent":
        path.unlink()
    lease = one.lease(1, 2)
    all_read(one.payloads)
    assert one.payloads.state(lease) == State.FAILED
    assert one.payloads.take_lost() == {1}
    one.payloads.release(lease)
    one.written()
    assert not path.exists()
    assert one.payloads.state(one.lease(2)) == State.READY


@pytest.mark.parametrize("fault", ["shorter", "dtype", "heads"])
def test_kv_of_another_form_is_lost(store, fault):
    one = store()
    one.save(1)
    kv = one.payloads._stored[1]
    one.payloads.bytes -= kv.nbytes
    kv = {"shorter": kv[:, :, :22], "dtype": kv.float(), "heads": kv[:, :, :, :1]}[fault]
    one.payloads._stored[1] = kv
    one.payloads.bytes += kv.nbytes
    assert one.payloads.state(one.payloads.lease([Piece(1, 3, 20)])) == State.FAILED
    assert one.payloads.take_lost() == {1}
    assert one.payloads.bytes == 0


def test_another_life_keeps_what_the_index_knows_and_nothing_else(store, tmp_path):
    one = store(tmp_path / "kv", segments=4)
    one.save(1, 2, 3)
    one.written()
    one.close()
    two = store(tmp_path / "kv", segments=4)
    two.slots = one.slots
    two.payloads.keep_only([2, 3, 77])
    assert two.payloads.take_lost() == {77}
    two.written()
    assert sorted(p.name for p in (tmp_path / "kv").iterdir()) == ["2.safetensors", "3.safetensors"]
    lease = two.lease(2, 3)
    all_read(two.payloads)
    assert two.payloads.state(lease) == State.READY
    two.check_load(3, 2)


def test_the_second_use_brings_a_segment_to_the_device(store):
    one = store(device_pages=2)
    one.save(1, 2)
    for uses in range(3):
        lease = one.lease(1)
        one.payloads.start(lease)
        assert (1 in one.device) == (uses > 0)
        one.check_load(1, 2)
        one.payloads.release(lease)
    # From now on the host's copy is not looked at.
    one.payloads._stored[1].fill_(7)
    one.check_load(1)
    one.payloads.forget(1)
    assert 1 not in one.device


def test_what_leaves_host_memory_leaves_the_device(store, tmp_path):
    one = store(tmp_path / "kv", segments=1, device_pages=2)
    one.save(1)
    one.written()
    for _ in range(2):
        lease = one.lease(1)
        one.payloads.start(lease)
        one.payloads.release(lease)
    assert 1 in one.device
    one.save(2)
    assert 1 not in one.device


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["save", "lease", "release", "forget", "settle", "poll"]),
        st.integers(0, 11),
        st.integers(0, 11),
    ),
    max_size=60,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(OPERATIONS, st.sampled_from([0, 3]))
def test_any_sequence_keeps_the_books_and_the_bits(tmp_path_factory, operations, device_pages):
    one = Store(tmp_path_factory.mktemp("kv") / "rank0", 3, device_pages)
    leases, gone, new = [], set(), iter(range(1000))
    try:
        for do, a, b in operations:
            known = sorted(set(one.slots) - gone)
            if do == "save":
                one.save(next(new))
            elif do == "lease" and known:
                keys = {known[a % len(known)], known[b % len(known)]}
                leases.append((keys, one.lease(*keys)))
            elif do == "release" and leases:
                one.payloads.release(leases.pop(a % len(leases))[1])
            elif do == "forget" and known:
                gone.add(known[a % len(known)])
                one.payloads.forget(known[a % len(known)])
            elif do == "settle":
                one.written()
                all_read(one.payloads)
            else:
                one.payloads.poll()
            for keys, lease in leases:
                if one.payloads.state(lease) == State.READY:
                    one.payloads.start(lease)
                    one.check_load(*keys)
            gone |= one.payloads.take_lost()
            check_books(one, leases)
    finally:
        one.close()


def check_books(one, leases):
    payloads = one.payloads
    reading = sum(size for _, size in payloads._reads.values())
    assert payloads.bytes == reading + sum(kv.nbytes for kv in payloads._stored.values())
    assert payloads.bytes <= payloads._limit
    held = [key for _, lease in leases if lease.granted for key in lease.keys]
    assert payloads._held == {key: held.count(key) for key in held}
    if one.device is not None:
        assert set(one.device._rows) <= set(payloads._stored)
