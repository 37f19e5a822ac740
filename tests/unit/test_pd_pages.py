"""A worker's KV cache as bytes: the same as a plain loop over its numbers, and back again."""

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.pd.geometry import Heads
from vllm_plugins.kv_connectors.pd.pages import Pages

BLOCKS, HEADS, TOKENS, WIDTH = 6, 4, 8, 6
# The worker's heads, as numbered in the whole model.
FIRST = 8
OWN = Heads(FIRST, FIRST + HEADS)
LAYER = "layer"


def numbers(*shape, dtype=torch.float32, seed=1):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype)


def heads_first(parts=1, **kwargs):
    return numbers(BLOCKS * parts, HEADS, TOKENS // parts, WIDTH, **kwargs)


def tokens_first(parts=1, **kwargs):
    """The same view with another order in memory."""
    stored = numbers(BLOCKS * parts, TOKENS // parts, HEADS, WIDTH, **kwargs)
    return stored.permute(0, 2, 1, 3)


def headless(parts=1, **kwargs):
    return numbers(BLOCKS * parts, TOKENS // parts, WIDTH, **kwargs)


def inside_a_larger_one(parts=1, **kwargs):
    larger = numbers(BLOCKS * parts, HEADS, TOKENS // parts, 3 * WIDTH, **kwargs)
    return larger[..., WIDTH : 2 * WIDTH]


FORMS = [heads_first, tokens_first, inside_a_larger_one, headless]
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn]


def pages_of(cache):
    return Pages({LAYER: cache}, BLOCKS, TOKENS, OWN, "same")


def naive_bytes(cache, blocks, heads, parts):
    """Return what a plain loop copies: block, part, head, token, number."""
    raw = cache.contiguous().view(torch.uint8).numpy()
    out = bytearray()
    for block in blocks:
        for row in range(block * parts, (block + 1) * parts):
            if raw.ndim == 3:
                out += raw[row].tobytes()
            else:
                for head in range(heads.first - FIRST, heads.last - FIRST):
                    out += raw[row, head].tobytes()
    return bytes(out)


SLICES = [OWN, Heads(FIRST, FIRST + 1), Heads(FIRST + 1, FIRST + 3), Heads(FIRST + 3, FIRST + 4)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_blocks_leave_and_come_as_a_plain_loop_says(form, parts, dtype):
    source = form(parts, dtype=dtype)
    target = form(parts, dtype=dtype, seed=2)
    pages, others = pages_of(source), pages_of(target)
    leaving, coming = [4, 0, 5], [1, 2, 3]
    for heads in SLICES:
        data = bytearray(len(leaving) * pages.block_bytes(LAYER, heads))
        pages.gather(LAYER, leaving, heads, data)
        assert data == naive_bytes(source, leaving, heads, parts)
        untouched = naive_bytes(target, [0, 4, 5], OWN, parts)
        others.scatter(LAYER, coming, heads, data)
        assert naive_bytes(target, coming, heads, parts) == data
        assert naive_bytes(target, [0, 4, 5], OWN, parts) == untouched


@pytest.mark.parametrize("form", [heads_first, tokens_first], ids=lambda form: form.__name__)
def test_other_heads_stay_as_they_are(form):
    cache = form()
    before = cache.clone()
    pages, heads = pages_of(cache), Heads(FIRST + 1, FIRST + 2)
    pages.scatter(LAYER, [3], heads, bytearray(pages.block_bytes(LAYER, heads)))
    before[3, 1] = 0
    assert torch.equal(cache, before)


def test_two_sides_need_not_share_strides():
    source, target = heads_first(), tokens_first(seed=2)
    data = bytearray(BLOCKS * pages_of(source).block_bytes(LAYER, OWN))
    pages_of(source).gather(LAYER, range(BLOCKS), OWN, data)
    pages_of(target).scatter(LAYER, range(BLOCKS), OWN, data)
    assert torch.equal(source, target)


def test_data_go_into_and_come_out_of_a_part_of_a_buffer():
    cache = heads_first(dtype=torch.bfloat16)
    pages = pages_of(cache)
    size = pages.block_bytes(LAYER, OWN)
    buffer = np.zeros(3 * size, np.uint8)
    pages.gather(LAYER, [2], OWN, memoryview(buffer)[size : 2 * size])
    assert buffer[size : 2 * size].tobytes() == naive_bytes(cache, [2], OWN, 1)
    assert not buffer[:size].any()
    assert not buffer[2 * size :].any()


def test_the_description_counts_bytes_of_a_block_of_the_pool():
    caches = {"a": heads_first(4), "b": headless(2, dtype=torch.bfloat16)}
    pages = Pages(caches, BLOCKS, TOKENS, OWN, "same")
    per_head = 4 * TOKENS * WIDTH
    assert pages.shard.bytes_per_head == (per_head, 2 * TOKENS * WIDTH)
    assert (pages.shard.layers, pages.shard.heads) == (("a", "b"), OWN)
    assert pages.block_bytes("a", Heads(FIRST, FIRST + 3)) == 3 * per_head
    # Without heads there is nothing to divide.
    assert pages.block_bytes("b", OWN) == 2 * TOKENS * WIDTH


@pytest.mark.parametrize(
    "cache",
    [
        [torch.zeros(BLOCKS, 2)],
        torch.zeros(BLOCKS, 2),
        torch.zeros(2, BLOCKS, HEADS, TOKENS, WIDTH),
        torch.zeros(BLOCKS + 1, HEADS, TOKENS, WIDTH),
        torch.zeros(0, HEADS, TOKENS, WIDTH),
        torch.zeros(BLOCKS, TOKENS, HEADS, WIDTH),
    ],
    ids=["list", "2-d", "5-d", "no multiple of the pool", "empty", "tokens in place of heads"],
)
def test_a_cache_of_another_form_is_refused(cache):
    with pytest.raises(PluginError) as caught:
        pages_of(cache)
    assert str(caught.value) == (
        "--plugin pd: the cache of layer is not paged attention's; use another model"
    )
