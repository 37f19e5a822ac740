"""Sealing: which tokens of a block are salient, and their low planes side by side in the page."""

import triton
import triton.language as tl

from vllm_plugins.attention_backends.zipcache.batch import LayerMemory, Seals
from vllm_plugins.attention_backends.zipcache.triton_kernels.pack import pack_keys, pack_values
from vllm_plugins.attention_backends.zipcache.triton_kernels.pages import (
    RAW,
    chooses,
    part,
    quarter_pad,
    sealed_rows,
    typed,
)

# Tokens that are compared with others, or copied, at once.
CHUNK = tl.constexpr(32)


@triton.jit
def _scores(sums: tl.tensor, weight: tl.tensor, t: tl.tensor, forced: tl.tensor) -> tl.tensor:
    """Return some tokens' scores."""
    # What is no number is below all others, or a quota would be exceeded and pages written over.
    score = tl.load(sums + t) * tl.load(weight + t)
    return tl.where(t < forced, float("inf"), tl.where(score >= 0.0, score, -1.0))


@triton.jit
def _mark(bits: tl.tensor, chosen: tl.tensor) -> None:
    """Write the bits of a chunk of tokens."""
    chosen = tl.reshape(chosen.to(tl.int32), [CHUNK // 8, 8])
    byte = tl.sum(chosen << tl.arange(0, 8)[None, :], axis=1)
    tl.store(bits + tl.arange(0, CHUNK // 8), byte.to(tl.uint8))


@triton.jit
def _choose(
    sums: tl.tensor, weight: tl.tensor, forced: tl.tensor, page: tl.tensor,
    block_size: tl.constexpr, head: tl.constexpr, n_k: tl.constexpr, n_v: tl.constexpr,
) -> None:  # fmt: skip
    """Write which tokens have the highest scores; of equal ones the earlier wins."""
    k_bits: tl.constexpr = part("k_bitmap", block_size, head, n_k, n_v)
    v_bits: tl.constexpr = part("v_bitmap", block_size, head, n_k, n_v)
    # Whose bits are there if there are only one's.
    quota: tl.constexpr = n_k if chooses(n_k, block_size) else n_v
    for begin in tl.static_range(0, block_size, CHUNK):
        t = begin + tl.arange(0, CHUNK)
        score = _scores(sums, weight, t, forced)[:, None]
        before = tl.zeros([CHUNK], tl.int32)
        for other in range(0, block_size, CHUNK):
            u = other + tl.arange(0, CHUNK)
            rival = _scores(sums, weight, u, forced)[None, :]
            wins = (rival > score) | ((rival == score) & (u[None, :] < t[:, None]))
            before += tl.sum(wins.to(tl.int32), axis=1)
        _mark(page + k_bits + begin // 8, before < quota)
        if v_bits != k_bits:
            _mark(page + v_bits + begin // 8, before < n_v)


@triton.jit
def _keep_low(
    staged: tl.tensor, low: tl.tensor, words: tl.tensor, j: tl.tensor, quota: tl.constexpr,
    block_size: tl.constexpr, row: tl.constexpr,
) -> None:  # fmt: skip
    """Copy the salient tokens' rows of a staged plane."""
    for begin in range(0, block_size, CHUNK):
        t = begin + tl.arange(0, CHUNK)
        rank, is_salient = sealed_rows(words, t, quota, block_size)
        mask = is_salient[:, None] & (j < row)[None, :]
        plane = tl.load(staged + t[:, None] * row + j[None, :], mask=mask)
        tl.store(low + rank[:, None] * row + j[None, :], plane, mask=mask)


@triton.jit
def _seal(
    block: tl.tensor, source: tl.tensor, forced: tl.tensor, weight: tl.tensor, cache: tl.tensor,
    halves: tl.tensor, words: tl.tensor, residual: tl.tensor, residual_sums: tl.tensor,
    staging: tl.tensor, staging_sums: tl.tensor, page_block: tl.tensor, page_head: tl.tensor,
    kv_heads: tl.constexpr, scaled: tl.constexpr, block_size: tl.constexpr, head: tl.constexpr,
    quarter: tl.constexpr, n_k: tl.constexpr, n_v: tl.constexpr,
) -> None:  # fmt: skip
    """Seal one block of one KV head."""
    # Heads and blocks share an axis of the grid: the other ones end at 65535 programs.
    h, i = tl.program_id(0) % kv_heads, tl.program_id(0) // kv_heads
    place = tl.load(source + i)
    at = tl.load(block + i).to(tl.int64) * page_block + h * page_head
    k_bits = words + at // 4 + part("k_bitmap", block_size, head, n_k, n_v, 4)
    v_bits = words + at // 4 + part("v_bitmap", block_size, head, n_k, n_v, 4)
    is_raw = place <= RAW
    held = tl.where(is_raw, -place + RAW, place).to(tl.int64) * kv_heads + h
    sums = residual_sums + held * block_size
    if is_raw == 0:
        sums = staging_sums + held * block_size
    _choose(
        sums, weight + i.to(tl.int64) * block_size, tl.load(forced + i), cache + at, block_size,
        head, n_k, n_v,
    )  # fmt: skip
    # The bits are read again, by other threads than those that have written them.
    tl.debug_barrier()
    j = tl.arange(0, quarter)
    k_low = cache + at + part("k_low", block_size, head, n_k, n_v)
    v_low = cache + at + part("v_low", block_size, head, n_k, n_v)
    if is_raw:
        keys = residual + held * (2 * block_size * head)
        values = keys + block_size * head
        # In this order the compiler finds registers for everything, whatever the quotas are.
        pack_values(
            values, values, head, block_size, cache + at, halves + at // 2, v_bits, v_low, n_v, j,
            chooses(n_v, block_size), scaled, block_size, head, n_k, n_v,
        )  # fmt: skip
        pack_keys(
            keys, keys, head, block_size, cache + at, halves + at // 2, k_bits, k_low, n_k, j,
            chooses(n_k, block_size), block_size, head, n_k, n_v,
        )  # fmt: skip
    else:
        staged = staging + held * (2 * block_size * (head // 4))
        _keep_low(staged, k_low, k_bits, j, n_k, block_size, head // 4)
        staged += block_size * (head // 4)
        _keep_low(staged, v_low, v_bits, j, n_v, block_size, head // 4)


def seal(layer: LayerMemory, seals: Seals) -> None:
    """Apply blocks' quotas.

    Args:
        layer: The layer's memory.
        seals: The blocks, on the layer's device.
    """
    page, kv_heads = layer.page, layer.residual.shape[1]
    _seal[(kv_heads * len(seals.block),)](
        seals.block, seals.source, seals.forced, seals.weight, *typed(layer.cache),
        layer.residual, layer.residual_sums, layer.staging, layer.staging_sums,
        *layer.cache.stride()[:2], kv_heads=kv_heads, scaled=layer.scaled,
        block_size=page.block_size, head=page.head_size, quarter=quarter_pad(page.head_size),
        n_k=page.k_salient, n_v=page.v_salient, num_warps=8,
    )  # fmt: skip
