"""Decode over what is not packed: the query's own key and value, and residual rows."""

import triton
import triton.language as tl


@triton.jit
def own_score(
    q: tl.tensor, key: tl.tensor, j: tl.tensor, quarter: tl.constexpr, head: tl.constexpr
) -> tl.tensor:
    """Return a quarter's part of the score of the query's own key."""
    k = tl.load(key + quarter * (head // 4) + j, mask=j < head // 4, other=0.0)
    return tl.sum(q * k.to(tl.float32)[None, :], axis=1)


@triton.jit
def own_value(
    value: tl.tensor, is_first: tl.tensor, j: tl.tensor, quarter: tl.constexpr,
    rows: tl.constexpr, head: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return a quarter of the query's own value for the first split, zero for the others."""
    mask = j < tl.where(is_first, head // 4, 0)
    v = tl.load(value + quarter * (head // 4) + j, mask=mask, other=0.0).to(tl.float32)
    return tl.zeros([rows, 1], tl.float32) + v[None, :]


@triton.jit
def raw_score(
    q: tl.tensor, keys: tl.tensor, t: tl.tensor, seen: tl.tensor, j: tl.tensor,
    quarter: tl.constexpr, head: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return a quarter's part of the scores of some keys of a residual row."""
    mask = (t < seen)[:, None] & (j < head // 4)[None, :]
    at = keys + t[:, None] * head + quarter * (head // 4) + j[None, :]
    k = tl.load(at, mask=mask, other=0.0)
    return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def raw_values(
    total: tl.tensor, fade: tl.tensor, p: tl.tensor, values: tl.tensor, t: tl.tensor,
    seen: tl.tensor, j: tl.tensor, quarter: tl.constexpr, head: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Add weighted values of a residual row to a quarter of the sums."""
    mask = (t < seen)[:, None] & (j < head // 4)[None, :]
    at = values + t[:, None] * head + quarter * (head // 4) + j[None, :]
    v = tl.load(at, mask=mask, other=0.0)
    return total * fade[:, None] + tl.dot(p, v, input_precision="ieee")
