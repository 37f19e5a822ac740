"""Random attention problems for HiP, and what is right about them in float64 and plain loops."""

from __future__ import annotations

import numpy as np
import torch

from vllm_plugins.attention_backends.hip.cpu_kernels import Paged
from vllm_plugins.attention_backends.hip.plan import LayerPlan, Stage
from vllm_plugins.attention_backends.hip.query_blocks import QueryBlocks
from vllm_plugins.attention_backends.hip.selection import NONE

SMALL = LayerPlan(
    sink=8, window=16, overlap=16, stages=(Stage(32, 128), Stage(16, 64), Stage(8, 32))
)


class Problem:
    """Requests with keys and values in a paged cache whose every other slot is NaN."""

    def __init__(self, lengths, *, heads=4, kv_heads=2, size=64, block=32, dtype=torch.float32,
                 seed=0, smooth=False):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        self.heads, self.kv_heads, self.size, self.scale = heads, kv_heads, size, size**-0.5
        per_row = max(-(-n // block) for n in lengths)
        count = per_row * len(lengths) + 3
        order = torch.randperm(count, generator=generator)[: per_row * len(lengths)]
        self.table = order.view(len(lengths), per_row).to(torch.int32)
        self.cache = torch.full((count, kv_heads, 2 * block, size), torch.nan, dtype=dtype)
        self.keys, self.values = [], []
        for row, n in enumerate(lengths):
            keys, values = torch.randn(2, n, kv_heads, size, generator=generator).to(dtype)
            if smooth:
                # Neighbouring keys score alike, as in text.
                keys = torch.cumsum(keys, dim=0) / torch.arange(1, n + 1)[:, None, None].sqrt()
            at = torch.arange(n)
            slot = self.table[row, at // block].long()
            self.cache[slot, :, at % block] = keys
            self.cache[slot, :, at % block + block] = values
            self.keys.append(keys.double().numpy())
            self.values.append(values.double().numpy())
        self.generator, self.dtype = generator, dtype

    @property
    def paged(self):
        return Paged(self.cache, self.table)

    def queries(self, tokens):
        shape = (tokens, self.heads, self.size)
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def kept(self, plan, rows=None):
        rows = len(self.keys) if rows is None else rows
        return [torch.full((rows, s.keep_chunks), NONE, dtype=torch.int32) for s in plan.stages]

    def attend(self, query, row, position, seen):
        """Exact attention of one query token to the positions ``seen``, (heads, size)."""
        group, seen = self.heads // self.kv_heads, np.asarray(sorted(seen))
        out = np.empty((self.heads, self.size))
        for h in range(self.heads):
            k, v = self.keys[row][seen, h // group], self.values[row][seen, h // group]
            scores = k @ query[h].double().numpy() * self.scale
            p = np.exp(scores - scores.max())
            out[h] = p @ v / p.sum()
        return out


def blocks(*, start, length, row, position, level, kept_row=None):
    """Query blocks from lists."""
    kept_row = [-1] * len(start) if kept_row is None else kept_row
    columns = (start, length, row, position, level, kept_row)
    return QueryBlocks(*(torch.tensor(x, dtype=torch.int32) for x in columns))


def decodes(positions, level, *, kept=True):
    """One query for each request."""
    n = len(positions)
    levels = level if isinstance(level, list) else [level] * n
    rows = list(range(n))
    return blocks(start=rows, length=[1] * n, row=rows, position=list(positions), level=levels,
                  kept_row=rows if kept else None)  # fmt: skip


def chunk_score(problem, query, row, first, last, centre=True):
    """SelectRep by the letter: each head bisects on its own; the best score seen."""
    group, best = problem.heads // problem.kv_heads, -np.inf
    for h in range(problem.heads):

        def score(a, b, h=h):
            at = (a + b) // 2 if centre else a
            k = problem.keys[row][at, h // group]
            return max(float(q[h].double().numpy() @ k) for q in query)

        a, b = first, last
        if b - a == 1:
            best = max(best, score(a, b))
        while b - a > 1:
            middle = (a + b) // 2
            left, right = score(a, middle), score(middle, b)
            best = max(best, left, right)
            a, b = (a, middle) if left >= right else (middle, b)
    return best


def select(problem, query, row, position, plan, overlap):
    """Survivors of every stage for one query block, as lists of first positions."""
    end = max(position + 1 - plan.window + overlap, plan.sink)
    found, starts = [], list(range(plan.sink, end, plan.stages[0].chunk))
    for i, stage in enumerate(plan.stages):
        if i:
            coarse = plan.stages[i - 1].chunk
            starts = [x for s in starts for x in range(s, min(s + coarse, end), stage.chunk)]
        if len(starts) > stage.keep_chunks:
            q = query[:: stage.query_stride]
            scores = {
                s: chunk_score(problem, q, row, s, min(s + stage.chunk, end), plan.centre)
                for s in starts
            }
            best = sorted(starts, key=lambda s: (-scores[s], s))[: stage.keep_chunks]
            starts = sorted(best)
        found.append(starts)
    return found


def attended(position, length, selected, plan, t=0):
    """Positions that query ``t`` of a block sees."""
    window = max(position + 1 - plan.window, 0)
    seen = set(range(min(plan.sink, position + length))) | set(range(window, position + t + 1))
    chunk = plan.stages[-1].chunk
    seen |= {x for s in selected for x in range(s, s + chunk) if x < window}
    return {x for x in seen if x <= position + t}
