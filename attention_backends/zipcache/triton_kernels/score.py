"""Scores of tokens: the attention that a step's probes pay them, added to what is kept.

The softmax of a probe is known once it has attended (its log-sum-exp), so only its scores are
computed again, of blocks that are not sealed. A prompt's probes score all blocks that it has
written; a decoding query that is one scores the block that it fills (`blocks.BlockLife`).
"""

import torch
import triton
import triton.language as tl

from vllm_plugins.attention_backends.zipcache.batch import LayerMemory
from vllm_plugins.attention_backends.zipcache.triton_kernels.batches import (
    DeviceBatch,
    Workspace,
    part_of_row,
    row_of_batch,
)
from vllm_plugins.attention_backends.zipcache.triton_kernels.keys import (
    load_keys,
    load_own,
    open_block,
)
from vllm_plugins.attention_backends.zipcache.triton_kernels.pages import (
    LOG2E,
    SEALED,
    quarter_pad,
    typed,
)

# Programs of one prompt and KV head; with eight heads, twice an H100's multiprocessors.
PROGRAMS = 32
# Tokens, and probes times query heads, in registers at once.
TILE, COLUMNS = 32, 32


@triton.jit
def _column_score(
    k: tl.tensor, query: tl.tensor, mask: tl.tensor, quarter: tl.constexpr, head: tl.constexpr
) -> tl.tensor:
    q = tl.load(query + quarter * (head // 4), mask=mask, other=0.0)
    return tl.dot(k, tl.trans(q), input_precision="ieee")


@triton.jit
def _attention(
    k0: tl.tensor, k1: tl.tensor, k2: tl.tensor, k3: tl.tensor, at: tl.tensor, query: tl.tensor,
    lse: tl.tensor, probes: tl.tensor, num_probes: tl.tensor, position: tl.tensor, scale: float,
    query_token: tl.tensor, query_head: tl.tensor, heads: tl.tensor, h: tl.tensor,
    group: tl.constexpr, head: tl.constexpr, quarter: tl.constexpr, tile: tl.constexpr,
    columns: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the attention of a row's probes to some keys, summed over probes and query heads."""
    j, total = tl.arange(0, quarter), tl.zeros([tile], tl.float32)
    for begin in range(0, num_probes * group, columns):
        c = begin + tl.arange(0, columns)
        exists = c < num_probes * group
        token = tl.load(probes + c // group, mask=exists, other=0)
        of_head = h * group + c % group
        mask = exists[:, None] & (j < head // 4)[None, :]
        q = query + token.to(tl.int64)[:, None] * query_token
        q += of_head[:, None] * query_head + j[None, :]
        score = _column_score(k0, q, mask, 0, head) + _column_score(k1, q, mask, 1, head)
        score += _column_score(k2, q, mask, 2, head) + _column_score(k3, q, mask, 3, head)
        all_of = tl.load(lse + token.to(tl.int64) * heads + of_head, mask=exists, other=0.0)
        seen = exists[None, :] & (position + token[None, :] >= at[:, None])
        p = tl.exp2(tl.where(seen, score * scale - all_of[None, :], float("-inf")))
        total += tl.sum(p, axis=1)
    return total


# The width of a block table is not known when kernels are warmed up, and of no use.
@triton.jit(do_not_specialize=["table_row"])
def _score(
    rows: tl.tensor, query_start: tl.tensor, seq_lens: tl.tensor, table: tl.tensor,
    slots: tl.tensor, state: tl.tensor, parts: tl.tensor, probes: tl.tensor, query: tl.tensor,
    key: tl.tensor, lse: tl.tensor, cache: tl.tensor, halves: tl.tensor, words: tl.tensor,
    residual: tl.tensor, residual_sums: tl.tensor, staging: tl.tensor, staging_sums: tl.tensor,
    scale: float, table_row: tl.tensor, query_token: tl.tensor, query_head: tl.tensor,
    key_token: tl.tensor, key_head: tl.tensor, page_block: tl.tensor, page_head: tl.tensor,
    single: tl.constexpr, group: tl.constexpr, block_size: tl.constexpr, head: tl.constexpr,
    quarter: tl.constexpr, n_k: tl.constexpr, n_v: tl.constexpr, tile: tl.constexpr,
    columns: tl.constexpr,
) -> None:  # fmt: skip
    """Score some blocks of a row."""
    first, h, kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    m = tl.load(rows + tl.program_id(2))
    start, length, position = row_of_batch(query_start, seq_lens, m)
    if length == 0 or (single and length != 1):
        return
    record, is_written = part_of_row(parts, slots, start + length - 1, block_size)
    num_probes = tl.load(record + 4)
    if is_written == 0 or num_probes == 0:
        return
    reset, end = tl.load(record + 2), position + length
    probes += tl.load(record + 3)
    query += start.to(tl.int64) * query_token
    key += start.to(tl.int64) * key_token + h * key_head
    heads = kv_heads * group
    lse += start.to(tl.int64) * heads
    j, blocks = tl.arange(0, quarter), (end + block_size - 1) // block_size
    for i in range(tl.load(record + 1) + first, blocks, tl.num_programs(0)):
        page = tl.load(table + m.to(tl.int64) * table_row + i)
        place = tl.load(state + page)
        if place != SEALED:
            opened, half, low, _, raw, bits, held = open_block(
                page, place, h, kv_heads, cache, halves, words, staging, residual, page_block,
                page_head, block_size, head, n_k, n_v,
            )  # fmt: skip
            sums = residual_sums + held * block_size
            if place >= 0:
                sums = staging_sums + held * block_size
            for begin in range(0, block_size, tile):
                t = begin + tl.arange(0, tile)
                at = i * block_size + t
                k0, k1, k2, k3 = load_keys(
                    opened, half, low, raw, bits, place, t, at < position, j, block_size, head,
                    n_k, n_v,
                )  # fmt: skip
                # The step's own keys are seen as they came.
                own, n = (at >= position) & (at < end), at - position
                k0 = tl.where(own[:, None], load_own(key, key_token, n, own, j, 0, head), k0)
                k1 = tl.where(own[:, None], load_own(key, key_token, n, own, j, 1, head), k1)
                k2 = tl.where(own[:, None], load_own(key, key_token, n, own, j, 2, head), k2)
                k3 = tl.where(own[:, None], load_own(key, key_token, n, own, j, 3, head), k3)
                total = _attention(
                    k0, k1, k2, k3, at, query, lse, probes, num_probes, position, scale,
                    query_token, query_head, heads, h, group, head, quarter, tile, columns,
                )  # fmt: skip
                # Whoever starts from zero does so with the whole block.
                old = tl.load(sums + t, mask=at < tl.where(reset == 0, end, 0), other=0.0)
                last = tl.where(reset == 0, end, blocks * block_size)
                tl.store(sums + t, old + total, mask=at < last)


def score(
    layer: LayerMemory,
    query: torch.Tensor,
    key: torch.Tensor,
    batch: DeviceBatch,
    space: Workspace,
    scale: float,
) -> None:
    """Add the probes' attention to the sums of their requests' blocks.

    Args:
        layer: The layer's memory, after `write.write` of the batch.
        query: Shape (tokens, heads, head size), the last axis contiguous.
        key: The step's keys, shape (tokens, kv heads, head size).
        batch: The batch.
        space: What layers share; its ``lse`` is that of the batch's queries.
        scale: Of the scores.
    """
    if batch.single:
        rows = batch.rows[: len(batch.seq_lens)]
        _launch(layer, query, key, batch, space, scale, rows, 1, True)
    if batch.prompts is not None:
        programs = min(batch.blocks, PROGRAMS)
        _launch(layer, query, key, batch, space, scale, batch.prompts, programs, False)


def _launch(
    layer: LayerMemory,
    query: torch.Tensor,
    key: torch.Tensor,
    batch: DeviceBatch,
    space: Workspace,
    scale: float,
    rows: torch.Tensor,
    programs: int,
    single: bool,
) -> None:
    page, kv_heads = layer.page, key.shape[1]
    _score[(programs, kv_heads, len(rows))](
        rows, batch.query_start, batch.seq_lens, batch.block_table, batch.slots, batch.state,
        batch.parts, batch.probes, query, key, space.lse, *typed(layer.cache), layer.residual,
        layer.residual_sums, layer.staging, layer.staging_sums, scale * LOG2E,
        batch.block_table.stride(0), *query.stride()[:2], *key.stride()[:2],
        *layer.cache.stride()[:2], single=single, group=query.shape[1] // kv_heads,
        block_size=page.block_size, head=page.head_size, quarter=quarter_pad(page.head_size),
        n_k=page.k_salient, n_v=page.v_salient, tile=TILE, columns=COLUMNS, num_warps=4,
    )  # fmt: skip
