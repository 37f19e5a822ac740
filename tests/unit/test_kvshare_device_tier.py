"""The device tier keeps segments bit for bit, within its memory, and drops the longest idle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.unit.kvshare_kv import SHAPE, bits, random_kv
from vllm_plugins.kv_connectors.kvshare.device_tier import PAGE_TOKENS, ArenaSize, DeviceTier
from vllm_plugins.kv_connectors.kvshare.segment_file import KVShape

CPU = torch.device("cpu")
PAGES = 6


def tier(pages=PAGES, shape=SHAPE):
    # One byte less than another page: what is not a whole page is not taken.
    nbytes = (pages + 1) * PAGE_TOKENS * shape.bytes_per_token - 1
    return DeviceTier(ArenaSize(shape, nbytes), CPU)


def loaded(device, key, offset, length, layer, half):
    out = torch.full((length, SHAPE.kv_heads, SHAPE.head_size), torch.nan, dtype=SHAPE.dtype)
    device.load(key, offset, layer, half, out)
    return out


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 9), st.integers(1, (PAGES + 1) * PAGE_TOKENS)),
        st.tuples(st.just("forget"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("load"), st.integers(0, 9), st.integers(0, 2**16)),
    ),
    max_size=40,
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(OPERATIONS)
def test_any_sequence_returns_what_a_plain_dictionary_would(operations):
    device, oracle, idle = tier(), {}, []
    for number, (do, key, value) in enumerate(operations):
        if do == "put":
            fresh = key not in device
            kv = random_kv(value, seed=number) if fresh else oracle[key]
            device.put(key, kv)
            if fresh and -(-value // PAGE_TOKENS) <= PAGES:
                oracle[key] = kv
            if key in oracle:
                idle = [k for k in idle if k != key] + [key]
            # What had to go was idle longest, and no more of it than was needed.
            while sum(-(-kv.shape[2] // PAGE_TOKENS) for kv in oracle.values()) > PAGES:
                del oracle[idle.pop(0)]
        elif do == "forget":
            device.forget(key)
            oracle.pop(key, None)
            idle = [k for k in idle if k != key]
        elif key in device:
            kv = oracle[key]
            offset = value % kv.shape[2]
            length = 1 + value % (kv.shape[2] - offset)
            layer, half = value % SHAPE.layers, value % 2
            expected = kv[layer, half, offset : offset + length]
            assert bits(loaded(device, key, offset, length, layer, half)) == bits(expected)
        assert {key for key in range(10) if key in device} == set(oracle)
    for key, kv in oracle.items():
        for layer in range(SHAPE.layers):
            for half in range(2):
                assert bits(loaded(device, key, 0, kv.shape[2], layer, half)) == bits(
                    kv[layer, half]
                )


def test_pages_come_back_and_none_is_lost():
    device = tier()
    for key in range(50):
        device.put(key, random_kv(PAGE_TOKENS + 1, seed=key))
    assert len(device) == PAGES // 2
    for key in range(50):
        device.forget(key)
    assert sorted(device._free) == list(range(PAGES))
    device.put(99, random_kv(PAGES * PAGE_TOKENS))
    assert 99 in device


def test_a_segment_that_can_never_fit_drives_nobody_out():
    device = tier()
    device.put(1, random_kv(10))
    device.put(2, random_kv(PAGES * PAGE_TOKENS + 1))
    assert 1 in device
    assert 2 not in device


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_arena_is_within_the_memory_it_was_given(dtype):
    shape = KVShape(2, 3, 8, dtype)
    device = tier(shape=shape)
    assert device._arena.nbytes == PAGES * PAGE_TOKENS * shape.bytes_per_token
    assert device._arena.dtype == dtype


def test_without_room_for_a_page_nothing_is_kept():
    device = DeviceTier(ArenaSize(SHAPE, 10), CPU)
    device.put(1, random_kv(1))
    assert len(device) == 0
