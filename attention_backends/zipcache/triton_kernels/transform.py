"""Queries and keys into the basis in which keys are kept (`key_transform`).

A program takes some rows of one KV head, a query of a token and head each, or a token's key, and
multiplies them by the head's whole matrix. What that costs is reading the matrices, 64 KiB a KV
head with 128 channels, once for every 32 rows.
"""

import torch
import triton
import triton.language as tl

from vllm_plugins.attention_backends.zipcache.key_transform import KeyTransform

# One number for decode and prompts, so that there is one kernel of each kind to compile.
ROWS = 32


# Its number of tokens is not known when kernels are warmed up, and of no use.
@triton.jit(do_not_specialize=["tokens"])
def _transform(
    x: tl.tensor, out: tl.tensor, matrix: tl.tensor, centre: tl.tensor, tokens: tl.tensor,
    x_token: tl.tensor, x_head: tl.tensor, kv_heads: tl.constexpr, group: tl.constexpr,
    rows: tl.constexpr, head: tl.constexpr, padded: tl.constexpr, inner: tl.constexpr,
    centred: tl.constexpr,
) -> None:  # fmt: skip
    """Multiply rows of one KV head by its matrix."""
    # Heads and tiles share an axis of the grid: the other ones end at 65535 programs.
    h, i = tl.program_id(0) % kv_heads, tl.program_id(0) // kv_heads
    row = i * rows + tl.arange(0, rows)
    token, of_head = (row // group).to(tl.int64), h * group + row % group
    there = (token < tokens)[:, None]
    column, d = tl.arange(0, padded), tl.arange(0, inner)
    wide = (column < head)[None, :]
    at = x + (token * x_token + of_head * x_head)[:, None]
    total = tl.zeros([rows, padded], tl.float32)
    for begin in tl.static_range(0, head, inner):
        part = tl.load(at + begin + d[None, :], mask=there, other=0.0)
        place = matrix + (h * head + begin + d[:, None]) * head + column[None, :]
        by = tl.load(place, mask=wide, other=0.0).to(part.dtype)
        total = tl.dot(part, by, total, input_precision="ieee")
    if centred:
        total -= tl.load(centre + h * head + column, mask=column < head, other=0.0)[None, :]
    place = out + ((token * kv_heads * group + of_head) * head)[:, None] + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=there & wide)


def transform(
    by: KeyTransform, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transform queries and keys; arguments and results are those of `KeyTransform.apply`."""
    return _launch(query, by.queries, by.centre, False), _launch(key, by.keys, by.centre, True)


def _launch(
    x: torch.Tensor, matrix: torch.Tensor, centre: torch.Tensor, centred: bool
) -> torch.Tensor:
    tokens, heads, head = x.shape
    kv_heads = len(matrix)
    assert heads % kv_heads == 0, "the matrices are not this layer's"
    group = heads // kv_heads
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # Heads are multiples of 16, so whole pieces of them are.
    inner = next(n for n in (64, 32, 16) if head % n == 0)
    _transform[(kv_heads * triton.cdiv(tokens * group, ROWS),)](
        x, out, matrix, centre, tokens, *x.stride()[:2], kv_heads=kv_heads, group=group, rows=ROWS,
        head=head, padded=triton.next_power_of_2(head), inner=inner, centred=centred,
    )  # fmt: skip
    return out
