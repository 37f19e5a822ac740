"""Attention of prompts: pages, then the step's own keys and values as they came, causally.

A program takes one KV head and a tile of queries with all query heads that share it, so that what
is rebuilt of a page serves them all (FlashAttention-2 otherwise). A prompt in one chunk reads no
page.
"""

import torch
import triton
import triton.language as tl

from vllm_plugins.attention_backends.zipcache.batch import LayerMemory
from vllm_plugins.attention_backends.zipcache.triton_kernels.batches import (
    DeviceBatch,
    Workspace,
    row_of_batch,
)
from vllm_plugins.attention_backends.zipcache.triton_kernels.keys import (
    load_keys,
    load_own,
    load_values,
    open_block,
)
from vllm_plugins.attention_backends.zipcache.triton_kernels.pages import (
    LOG2E,
    quarter_pad,
    softmax_step,
    typed,
)

# Queries times query heads of a program: what a Hopper warp group's matrix product takes, twice.
ROWS = 128
# Keys in registers at once.
KEYS = 64


def tile_tokens(group: int) -> int:
    """Return the queries of a tile.

    Args:
        group: Query heads of a KV head.
    """
    return max(ROWS // group, 1)


@triton.jit
def _score(
    q0: tl.tensor, q1: tl.tensor, q2: tl.tensor, q3: tl.tensor,
    k0: tl.tensor, k1: tl.tensor, k2: tl.tensor, k3: tl.tensor,
) -> tl.tensor:  # fmt: skip
    score = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    score = tl.dot(q1, tl.trans(k1), score, input_precision="ieee")
    score = tl.dot(q2, tl.trans(k2), score, input_precision="ieee")
    return tl.dot(q3, tl.trans(k3), score, input_precision="ieee")


@triton.jit
def _add(total: tl.tensor, fade: tl.tensor, p: tl.tensor, v: tl.tensor) -> tl.tensor:
    return tl.dot(p.to(v.dtype), v, total * fade[:, None], input_precision="ieee")


# The width of a block table is not known when kernels are warmed up, and of no use.
@triton.jit(do_not_specialize=["table_row"])
def _attend_tile(
    tiles: tl.tensor, query_start: tl.tensor, seq_lens: tl.tensor, table: tl.tensor,
    state: tl.tensor, query: tl.tensor, key: tl.tensor, value: tl.tensor, cache: tl.tensor,
    halves: tl.tensor, words: tl.tensor, residual: tl.tensor, staging: tl.tensor, lse: tl.tensor,
    out: tl.tensor, scale: float, table_row: tl.tensor, query_token: tl.tensor,
    query_head: tl.tensor, key_token: tl.tensor, key_head: tl.tensor, value_token: tl.tensor,
    value_head: tl.tensor, out_token: tl.tensor, out_head: tl.tensor, page_block: tl.tensor,
    page_head: tl.tensor, kv_heads: tl.constexpr, tokens: tl.constexpr, group: tl.constexpr,
    rows: tl.constexpr, block_size: tl.constexpr, head: tl.constexpr, quarter: tl.constexpr,
    n_k: tl.constexpr, n_v: tl.constexpr, keys: tl.constexpr,
) -> None:  # fmt: skip
    """Attend with a tile of queries and the query heads of a KV head."""
    # Heads and tiles share an axis of the grid: the other ones end at 65535 programs.
    h, i = tl.program_id(0) % kv_heads, tl.program_id(0) // kv_heads
    m, first = tl.load(tiles + 2 * i), tl.load(tiles + 2 * i + 1)
    start, length, position = row_of_batch(query_start, seq_lens, m)
    row: tl.constexpr = head // 4
    r, j = tl.arange(0, rows), tl.arange(0, quarter)
    t, of_head = first + r // group, h * group + r % group
    exists = (r < tokens * group) & (t < length)
    here = exists[:, None] & (j < row)[None, :]
    token = (start + t).to(tl.int64)
    at = query + token[:, None] * query_token + of_head[:, None] * query_head + j[None, :]
    q0, q1 = tl.load(at, mask=here, other=0.0), tl.load(at + row, mask=here, other=0.0)
    q2, q3 = (
        tl.load(at + 2 * row, mask=here, other=0.0),
        tl.load(at + 3 * row, mask=here, other=0.0),
    )
    key += start.to(tl.int64) * key_token + h * key_head
    value += start.to(tl.int64) * value_token + h * value_head
    table += m.to(tl.int64) * table_row
    a0, a1 = tl.zeros([rows, quarter], tl.float32), tl.zeros([rows, quarter], tl.float32)
    a2, a3 = tl.zeros([rows, quarter], tl.float32), tl.zeros([rows, quarter], tl.float32)
    weight, peak = tl.zeros([rows], tl.float32), tl.full([rows], float("-inf"), tl.float32)
    for b in range(0, (position + block_size - 1) // block_size):
        page = tl.load(table + b)
        place = tl.load(state + page)
        opened, half, low, next_low, raw, bits, _ = open_block(
            page, place, h, kv_heads, cache, halves, words, staging, residual, page_block,
            page_head, block_size, head, n_k, n_v,
        )  # fmt: skip
        for begin in range(0, tl.minimum(block_size, position - b * block_size), keys):
            n = begin + tl.arange(0, keys)
            valid = b * block_size + n < position
            k0, k1, k2, k3 = load_keys(
                opened, half, low, raw, bits, place, n, valid, j, block_size, head, n_k, n_v
            )
            score = _score(q0, q1, q2, q3, k0, k1, k2, k3) * scale
            score = tl.where(valid[None, :], score, float("-inf"))
            p, fade, weight, peak = softmax_step(score, weight, peak)
            v0, v1, v2, v3 = load_values(
                opened, half, low + next_low, raw, bits, place, n, valid, j, block_size, head,
                n_k, n_v,
            )  # fmt: skip
            a0, a1 = _add(a0, fade, p, v0), _add(a1, fade, p, v1)
            a2, a3 = _add(a2, fade, p, v2), _add(a3, fade, p, v3)
    for begin in range(0, tl.minimum(first + tokens, length), keys):
        n = begin + tl.arange(0, keys)
        valid = n < length
        score = _score(
            q0, q1, q2, q3, load_own(key, key_token, n, valid, j, 0, head),
            load_own(key, key_token, n, valid, j, 1, head),
            load_own(key, key_token, n, valid, j, 2, head),
            load_own(key, key_token, n, valid, j, 3, head),
        ) * scale  # fmt: skip
        score = tl.where(n[None, :] <= t[:, None], score, float("-inf"))
        p, fade, weight, peak = softmax_step(score, weight, peak)
        a0 = _add(a0, fade, p, load_own(value, value_token, n, valid, j, 0, head))
        a1 = _add(a1, fade, p, load_own(value, value_token, n, valid, j, 1, head))
        a2 = _add(a2, fade, p, load_own(value, value_token, n, valid, j, 2, head))
        a3 = _add(a3, fade, p, load_own(value, value_token, n, valid, j, 3, head))
    tl.store(lse + token * (kv_heads * group) + of_head, peak + tl.log2(weight), mask=exists)
    kind: tl.constexpr = out.dtype.element_ty
    by = 1.0 / weight[:, None]
    at = out + token[:, None] * out_token + of_head[:, None] * out_head + j[None, :]
    tl.store(at, (a0 * by).to(kind), mask=here)
    tl.store(at + row, (a1 * by).to(kind), mask=here)
    tl.store(at + 2 * row, (a2 * by).to(kind), mask=here)
    tl.store(at + 3 * row, (a3 * by).to(kind), mask=here)


def prefill(
    layer: LayerMemory,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    batch: DeviceBatch,
    space: Workspace,
    scale: float,
) -> None:
    """Attend with the rows that have more tokens than one; arguments as of `decode.decode`."""
    assert batch.tiles is not None
    page, heads, kv_heads = layer.page, query.shape[1], key.shape[1]
    group = heads // kv_heads
    narrow = page.head_size <= 128 and query.element_size() == 2
    _attend_tile[(kv_heads * len(batch.tiles),)](
        batch.tiles, batch.query_start, batch.seq_lens, batch.block_table, batch.state, query,
        key, value, *typed(layer.cache), layer.residual, layer.staging, space.lse, out,
        scale * LOG2E, batch.block_table.stride(0), *query.stride()[:2], *key.stride()[:2],
        *value.stride()[:2], *out.stride()[:2], *layer.cache.stride()[:2],
        kv_heads=kv_heads, tokens=tile_tokens(group), group=group,
        rows=max(triton.next_power_of_2(group), ROWS),
        block_size=page.block_size, head=page.head_size, quarter=quarter_pad(page.head_size),
        n_k=page.k_salient, n_v=page.v_salient,
        keys=min(KEYS if narrow else KEYS // 2, page.block_size), num_warps=8, num_stages=2,
    )  # fmt: skip
