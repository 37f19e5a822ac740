"""Writing a batch's keys and values: to the residual rows, or packed into pages.

A program takes one row and KV head. The tokens that share the residual row go in order and in one
program: those that fill a begun block, then those that begin the next one in its place. Whole
blocks are packed from the step's own keys and values by programs of their own.
"""

import torch
import triton
import triton.language as tl

from vllm_plugins.attention_backends.zipcache.batch import LayerMemory
from vllm_plugins.attention_backends.zipcache.triton_kernels.batches import (
    DeviceBatch,
    part_of_row,
    row_of_batch,
)
from vllm_plugins.attention_backends.zipcache.triton_kernels.pack import pack_keys, pack_values
from vllm_plugins.attention_backends.zipcache.triton_kernels.pages import (
    RAW,
    part,
    quarter_pad,
    typed,
)

# Programs of one prompt and KV head: with eight heads, twice an H100's multiprocessors.
PROGRAMS = 32
# Tokens that are copied at once.
COPY = tl.constexpr(16)


@triton.jit
def _append(
    raw: tl.tensor, sums: tl.tensor, key: tl.tensor, value: tl.tensor, key_token: tl.tensor,
    value_token: tl.tensor, offset: tl.tensor, count: tl.tensor, block_size: tl.constexpr,
    head: tl.constexpr, head_pad: tl.constexpr,
) -> None:  # fmt: skip
    """Copy tokens to a residual row, and let their sums start from zero."""
    d = tl.arange(0, head_pad)
    for begin in range(0, count, COPY):
        t = begin + tl.arange(0, COPY)
        here = t < count
        mask, at = here[:, None] & (d < head)[None, :], t.to(tl.int64)[:, None]
        to = raw + (offset + t)[:, None] * head + d[None, :]
        k = tl.load(key + at * key_token + d[None, :], mask=mask)
        v = tl.load(value + at * value_token + d[None, :], mask=mask)
        tl.store(to, k, mask=mask)
        tl.store(to + block_size * head, v, mask=mask)
        tl.store(sums + offset + t, tl.zeros([COPY], tl.float32), mask=here)


# The width of a block table is not known when kernels are warmed up, and of no use.
@triton.jit(do_not_specialize=["table_row"])
def _write(
    rows: tl.tensor, query_start: tl.tensor, seq_lens: tl.tensor, table: tl.tensor,
    slots: tl.tensor, state: tl.tensor, parts: tl.tensor, key: tl.tensor, value: tl.tensor,
    cache: tl.tensor, halves: tl.tensor, words: tl.tensor, residual: tl.tensor,
    residual_sums: tl.tensor, staging: tl.tensor, staging_sums: tl.tensor,
    table_row: tl.tensor, key_token: tl.tensor, key_head: tl.tensor, value_token: tl.tensor,
    value_head: tl.tensor, page_block: tl.tensor, page_head: tl.tensor,
    single: tl.constexpr, scaled: tl.constexpr, block_size: tl.constexpr, head: tl.constexpr,
    head_pad: tl.constexpr, quarter: tl.constexpr, n_k: tl.constexpr, n_v: tl.constexpr,
) -> None:  # fmt: skip
    """Write some of a row's blocks."""
    first, h, kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    m = tl.load(rows + tl.program_id(2))
    start, length, position = row_of_batch(query_start, seq_lens, m)
    if length == 0 or (single and length != 1):
        return
    record, is_written = part_of_row(parts, slots, start + length - 1, block_size)
    row = tl.load(record)
    if is_written == 0 or row < -1:
        return
    key += start.to(tl.int64) * key_token + h * key_head
    value += start.to(tl.int64) * value_token + h * value_head
    j, t = tl.arange(0, quarter), tl.arange(0, block_size)
    begun = position % block_size
    raw = residual + (tl.maximum(row, 0).to(tl.int64) * kv_heads + h) * (2 * block_size * head)
    sums = residual_sums + (tl.maximum(row, 0).to(tl.int64) * kv_heads + h) * block_size
    # Number 0 is what shares the residual row, the others are whole blocks.
    skip = (block_size - begun) % block_size
    whole = tl.maximum(length - skip, 0) // block_size
    for k in range(first, whole + 1, tl.num_programs(0)):
        token = tl.where(k == 0, 0, skip + (k - 1) * block_size)
        offset = tl.where(k == 0, begun, 0)
        count = tl.minimum(block_size - offset, length - token)
        count = tl.where((k == 0) & (begun == 0), 0, count)
        page = tl.load(table + m.to(tl.int64) * table_row + (position + token) // block_size)
        place = tl.load(state + page)
        if (count > 0) & (offset + count == block_size) & (place > RAW):
            at = page.to(tl.int64) * page_block + h * page_head
            staged = staging + (tl.maximum(place, 0).to(tl.int64) * kv_heads + h) * (
                2 * block_size * (head // 4)
            )
            k_low, v_low = staged, staged + block_size * (head // 4)
            # Where there is no choice to make a quota is all tokens or none.
            if place < 0:
                k_low = cache + at + part("k_low", block_size, head, n_k, n_v)
                v_low = cache + at + part("v_low", block_size, head, n_k, n_v)
                bits = words + at // 4 + part("v_bitmap", block_size, head, n_k, n_v, 4)
                w = tl.arange(0, block_size // 32)
                tl.store(bits + w, tl.full(w.shape, -1 if n_v > 0 else 0, tl.int32))
            k_keep = tl.where(place >= 0, block_size, n_k)
            v_keep = tl.where(place >= 0, block_size, n_v)
            new = key + token.to(tl.int64) * key_token
            pack_keys(
                raw, new, key_token, offset, cache + at, halves + at // 2, words, k_low, k_keep, j,
                False, block_size, head, n_k, n_v,
            )  # fmt: skip
            new = value + token.to(tl.int64) * value_token
            pack_values(
                raw + block_size * head, new, value_token, offset, cache + at, halves + at // 2,
                words, v_low, v_keep, j, False, scaled, block_size, head, n_k, n_v,
            )  # fmt: skip
            if place >= 0:
                # What decoding queries have added to tokens of a begun block stays.
                old = tl.load(sums + t, mask=t < offset, other=0.0)
                at = (place.to(tl.int64) * kv_heads + h) * block_size
                tl.store(staging_sums + at + t, old)
        elif count > 0:
            _append(
                raw, sums, key, value, key_token, value_token, offset, count, block_size, head,
                head_pad,
            )  # fmt: skip
    rest = tl.maximum(length - skip, 0) % block_size
    if (first == 0) & (rest > 0):
        # Threads of this program may still read what is now written over.
        tl.debug_barrier()
        token = (length - rest).to(tl.int64)
        _append(
            raw, sums, key + token * key_token, value + token * value_token, key_token,
            value_token, 0, rest, block_size, head, head_pad,
        )  # fmt: skip


def write(layer: LayerMemory, key: torch.Tensor, value: torch.Tensor, batch: DeviceBatch) -> None:
    """Write a batch's keys and values where their blocks' states say.

    Args:
        layer: The layer's memory.
        key: Shape (tokens, kv heads, head size), the last axis contiguous, in the model's dtype.
        value: As ``key``.
        batch: The batch.
    """
    if batch.single:
        _launch(layer, key, value, batch, batch.rows[: len(batch.seq_lens)], 1, True)
    if batch.prompts is not None:
        programs = min(batch.longest // layer.page.block_size + 1, PROGRAMS)
        _launch(layer, key, value, batch, batch.prompts, programs, False)


def _launch(
    layer: LayerMemory,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: DeviceBatch,
    rows: torch.Tensor,
    programs: int,
    single: bool,
) -> None:
    page, kv_heads = layer.page, key.shape[1]
    _write[(programs, kv_heads, len(rows))](
        rows, batch.query_start, batch.seq_lens, batch.block_table, batch.slots, batch.state,
        batch.parts, key, value, *typed(layer.cache), layer.residual, layer.residual_sums,
        layer.staging, layer.staging_sums, batch.block_table.stride(0), *key.stride()[:2],
        *value.stride()[:2], *layer.cache.stride()[:2],
        single=single, scaled=layer.scaled, block_size=page.block_size, head=page.head_size,
        head_pad=triton.next_power_of_2(page.head_size), quarter=quarter_pad(page.head_size),
        n_k=page.k_salient, n_v=page.v_salient, num_warps=4,
    )  # fmt: skip
