"""Handles of caches: read back as written, refused where they lie, and opened as they were."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.pd_direct import MemfdCaches, mapped_bytes
from vllm_plugins.kv_connectors.pd.direct import (
    MAX_KEY_BYTES,
    CacheHandles,
    LayerView,
    StorageHandle,
    UnavailableError,
    export_caches,
    open_caches,
)
from vllm_plugins.kv_connectors.pd.geometry import Heads, Shard
from vllm_plugins.kv_connectors.pd.pages import Pages
from vllm_plugins.wire.frame import Limits, encode_header

BLOCKS, HEADS, TOKENS, WIDTH = 6, 4, 8, 6
OWN = Heads(8, 8 + HEADS)


def pages_of(caches, blocks=BLOCKS, heads=OWN, tokens=TOKENS):
    return Pages(caches, blocks, tokens, heads, "same")


@pytest.fixture
def memory():
    made = MemfdCaches()
    yield made
    made.close()


@pytest.fixture
def exported(memory):
    """Two layers in one storage, one with rows of half a block, one without heads."""
    pool = torch.randn(BLOCKS, 2, TOKENS, HEADS, WIDTH)
    caches = {
        "a": pool[:, 0].permute(0, 2, 1, 3),
        "b": pool[:, 1].permute(0, 2, 1, 3),
        "halves": torch.randn(2 * BLOCKS, HEADS, TOKENS // 2, WIDTH),
        "latent": torch.randn(BLOCKS, TOKENS, WIDTH, dtype=torch.bfloat16),
        "fp8": torch.randn(BLOCKS, HEADS, TOKENS, WIDTH).to(torch.float8_e4m3fn),
    }
    pages = pages_of(memory.move(caches))
    return pages, export_caches(pages, memory)


def test_handles_are_read_back_as_they_were_written(exported):
    pages, handles = exported
    assert len(handles.storages) == 4
    header = json.loads(encode_header(handles.to_json()))
    assert CacheHandles.from_json(header, pages.shard) == handles


def test_mapped_caches_are_the_same_memory(exported, memory):
    pages, handles = exported
    own = pages_of({name: cache.clone() for name, cache in pages.caches.items()})
    mapped = open_caches(handles, pages.shard, own, memory)
    assert mapped.shard == pages.shard
    assert memory.opened == 4
    for name, cache in pages.caches.items():
        assert mapped.caches[name].stride() == cache.stride()
        assert torch.equal(mapped.caches[name].view(torch.uint8), cache.view(torch.uint8))
        cache.zero_()
        assert not mapped.caches[name].any()
    before = mapped_bytes()
    del mapped
    assert mapped_bytes() == before // 2


def test_only_storages_of_own_layers_are_opened(exported, memory):
    pages, handles = exported
    own = pages_of({name: pages.caches[name].clone() for name in ("b", "latent")})
    assert list(open_caches(handles, pages.shard, own, memory).caches) == ["b", "latent"]
    assert memory.opened == 2


def test_handles_of_200_layers_fit_into_a_header():
    view = LayerView(199, 1 << 40, (1 << 20, 1 << 10, 1 << 10, 1 << 10), (1 << 40,) * 4, "bfloat16")
    storage = StorageHandle(bytes(MAX_KEY_BYTES), 1 << 47, 1 << 47)
    handles = CacheHandles("x" * 64, 1 << 24, (storage,) * 200, (view,) * 200)
    assert len(encode_header(handles.to_json())) < Limits().header_bytes / 8


SIZE = 4 * BLOCKS * HEADS * TOKENS * WIDTH
PLAIN = {
    "device": "here",
    "num_blocks": BLOCKS,
    "storages": [["ab" * 66, SIZE, 0]],
    "layers": [[0, 0, [BLOCKS, HEADS, TOKENS, WIDTH],
                [HEADS * TOKENS * WIDTH, TOKENS * WIDTH, WIDTH, 1], "float32"]],
}  # fmt: skip
SHARD = Shard(("a",), OWN, TOKENS, (4 * TOKENS * WIDTH,), "same")


def layer(place, value):
    """Return the plain handles with another value in the layer's description."""
    changed = list(PLAIN["layers"][0])
    changed[place] = value
    return {"layers": [changed]}


LIES = {
    "no device": {"device": None},
    "a long device": {"device": "x" * 257},
    "no storages": {"storages": []},
    "storages are a text": {"storages": "ab"},
    "too many storages": {"storages": PLAIN["storages"] * 4097},
    "a storage of two": {"storages": [["ab", 1]]},
    "a handle that is a number": {"storages": [[1, SIZE, 0]]},
    "a handle that is empty": {"storages": [["", SIZE, 0]]},
    "a handle that is too long": {"storages": [["ab" * (MAX_KEY_BYTES + 1), SIZE, 0]]},
    "a handle that is no hexadecimal": {"storages": [["xy", SIZE, 0]]},
    "a storage's size below zero": {"storages": [["ab", -1, 0]]},
    "a storage's size is a fraction": {"storages": [["ab", 1.5, 0]]},
    "a storage's offset beyond all": {"storages": [["ab", SIZE, 1 << 60]]},
    "a storage that is a byte short": {"storages": [["ab", SIZE - 1, 0]]},
    "no blocks": {"num_blocks": 0},
    "blocks are true": {"num_blocks": True},
    "millions of millions of blocks": {"num_blocks": 1 << 40},
    "other blocks than the cache": {"num_blocks": 4},
    "no layers": {"layers": []},
    "a layer too many": {"layers": PLAIN["layers"] * 2},
    "layers are null": {"layers": None},
    "a layer of four": {"layers": [PLAIN["layers"][0][:4]]},
    "a layer in no storage": layer(0, 1),
    "a storage below zero": layer(0, -1),
    "an offset behind the end": layer(1, 1),
    "an offset below zero": layer(1, -1),
    "a flat cache": layer(2, [BLOCKS, HEADS * TOKENS * WIDTH]),
    "a cache of five dimensions": layer(2, [1, BLOCKS, HEADS, TOKENS, WIDTH]),
    "an empty cache": layer(2, [BLOCKS, HEADS, 0, WIDTH]),
    "other heads": layer(2, [BLOCKS, 2 * HEADS, TOKENS // 2, WIDTH]),
    "larger blocks": layer(2, [BLOCKS, HEADS, TOKENS, WIDTH + 1]),
    "more rows": layer(2, [2 * BLOCKS, HEADS, TOKENS, WIDTH]),
    "a stride below zero": layer(3, [HEADS * TOKENS * WIDTH, TOKENS * WIDTH, WIDTH, -1]),
    "a stride beyond the end": layer(3, [HEADS * TOKENS * WIDTH, TOKENS * WIDTH, WIDTH, 2]),
    "a stride missing": layer(3, [HEADS * TOKENS * WIDTH, TOKENS * WIDTH, WIDTH]),
    "a wider type": layer(4, "float64"),
    "a type that is none": layer(4, "load"),
    "a type that is a list": layer(4, []),
}  # fmt: skip


def test_the_plain_handles_are_true():
    assert CacheHandles.from_json(PLAIN, SHARD).to_json() == PLAIN


@pytest.mark.parametrize("change", LIES)
def test_handles_that_lie_are_refused_before_anything_is_opened(change):
    with pytest.raises(ValueError):
        CacheHandles.from_json(PLAIN | LIES[change], SHARD)


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(2 * BLOCKS, HEADS, TOKENS // 2, WIDTH),
        torch.zeros(BLOCKS, HEADS, TOKENS, WIDTH, dtype=torch.int32),
        torch.zeros(BLOCKS, HEADS, WIDTH, TOKENS),
        torch.zeros(BLOCKS, TOKENS, WIDTH),
    ],
    ids=["rows of half a block", "another type", "another width", "no heads"],
)
def test_caches_with_other_rows_are_not_opened(memory, other):
    pages = pages_of(memory.move({"a": torch.zeros(BLOCKS, HEADS, TOKENS, WIDTH)}))
    handles = export_caches(pages, memory)
    with pytest.raises(UnavailableError, match="divided in another way"):
        open_caches(handles, pages.shard, pages_of({"a": other}), memory)
    assert memory.opened == 0


def test_what_cannot_be_exported_or_opened_is_said(memory):
    plain = pages_of({"a": torch.zeros(BLOCKS, HEADS, TOKENS, WIDTH)})
    with pytest.raises(UnavailableError, match="no memory file"):
        export_caches(plain, memory)
    handles = export_caches(pages_of(memory.move(plain.caches)), memory)
    memory.close()
    with pytest.raises(UnavailableError, match="cannot be opened"):
        open_caches(handles, plain.shard, plain, memory)


FORMS = st.sampled_from(["heads first", "tokens first", "in a larger one", "in one pool", "latent"])
TYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn, torch.float16]


def cache_of(form, blocks, parts, heads, tokens, width, dtype, seed):
    rows, slots = blocks * parts, tokens // parts
    raw = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        size = torch.empty(0, dtype=dtype).element_size()
        data = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), generator=raw)
        return data.to(torch.uint8).view(dtype)

    if form == "latent":
        return numbers(rows, slots, width)
    if form == "tokens first":
        return numbers(rows, slots, heads, width).permute(0, 2, 1, 3)
    if form == "in a larger one":
        return numbers(rows, heads, slots, 3 * width)[..., width : 2 * width]
    if form == "in one pool":
        return numbers(rows, 3, heads, slots, width)[:, 1]
    return numbers(rows, heads, slots, width)


@given(
    form=FORMS,
    other=FORMS,
    parts=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from(TYPES),
    heads=st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(0, 5), st.integers(1, 6)),
    pools=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    width=st.integers(1, 9),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_a_copy_from_mapped_caches_is_that_of_a_plain_loop(
    form, other, parts, dtype, heads, pools, width, data
):
    """Any heads of two workers, any forms of both caches: the shared heads come, no other byte."""
    theirs = Heads(min(heads[0], heads[1] - 1), heads[1])
    ours = Heads(min(heads[2], heads[3] - 1), heads[3])
    shared = theirs & ours
    if (form == "latent") != (other == "latent"):
        other = form
    if form != "latent" and not len(shared):
        return
    count = data.draw(st.integers(1, min(pools)))
    blocks = data.draw(st.permutations(range(pools[0])))[:count]
    targets = data.draw(st.permutations(range(pools[1])))[:count]
    memory = MemfdCaches()
    try:
        source = cache_of(form, pools[0], parts, len(theirs), 4, width, dtype, 1)
        writer = pages_of(memory.move({"a": source}), pools[0], theirs, 4)
        target = cache_of(other, pools[1], parts, len(ours), 4, width, dtype, 2)
        reader = pages_of({"a": target}, pools[1], ours, 4)
        expected = reader.caches["a"].clone()
        header = json.loads(encode_header(export_caches(writer, memory).to_json()))
        handles = CacheHandles.from_json(header, writer.shard)
        reader.copy(
            open_caches(handles, writer.shard, reader, memory), ["a"], blocks, targets, shared
        )
    finally:
        memory.close()
    raw = writer.caches["a"]
    for block, place in zip(blocks, targets, strict=True):
        for part in range(parts):
            old, new = block * parts + part, place * parts + part
            if form == "latent":
                expected[new] = raw[old]
                continue
            for head in range(shared.first, shared.last):
                expected[new, head - ours.first] = raw[old, head - theirs.first]
    assert torch.equal(reader.caches["a"].view(torch.uint8), expected.view(torch.uint8))
