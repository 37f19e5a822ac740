"""Prefill by the Triton kernels against plain loops in float64; `test_hip_triton` runs this."""

import numpy as np
import pytest
import torch

from tests.unit.hip_kernels import close, listed, run
from tests.unit.hip_problem import SMALL, Problem, attended, blocks
from vllm_plugins.attention_backends.hip.plan import QUERY_BLOCK
from vllm_plugins.attention_backends.hip.query_blocks import DENSE


def check(problem, query, out, start, length, row, position, selected, plan):
    """Compare first, middle and last query: the loops in float64 are slow."""
    for t in sorted({0, 1 % length, length // 2, length - 1}):
        if selected is None:
            seen = range(position + t + 1)
        else:
            seen = attended(position, length, selected, plan, t)
        wanted = problem.attend(query[start + t], row, position + t, seen)
        close(out[start + t], wanted, problem.dtype)


def test_sparse_and_dense_blocks_of_several_prompts():
    lengths = [64, 64, 33, 9, 1, 64, 20]
    positions = [0, 384, 448, 40, 0, 130, 5]
    levels = [0, 0, 0, 0, 0, DENSE, DENSE]
    rows = [0, 1, 1, 2, 3, 1, 4]
    problem = Problem([64, 500, 50, 1, 40], seed=0)
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    query = problem.queries(sum(lengths) + 3)
    block = blocks(start=starts, length=lengths, row=rows, position=positions, level=levels)
    out, kept = run(problem, query, block, SMALL)
    assert out[sum(lengths) :].isnan().all()
    for m, (start, n) in enumerate(zip(starts, lengths, strict=True)):
        selected = None if levels[m] == DENSE else listed(kept, m)[-1]
        check(problem, query, out, start, n, rows[m], positions[m], selected, SMALL)
        assert out[start : start + n].isfinite().all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "dtype", "layout"),
    [
        (8, 1, 64, torch.bfloat16, "HND"),
        (3, 1, 96, torch.float16, "NHD"),
        (2, 2, 128, torch.bfloat16, "NHD"),
        (2, 1, 256, torch.float16, "HND"),
        (2, 1, 128, torch.float32, "NHD"),
        (4, 1, 128, torch.float16, "NHD"),
        (5, 1, 64, torch.float16, "HND"),
        (6, 1, 96, torch.bfloat16, "NHD"),
        (7, 1, 256, torch.bfloat16, "NHD"),
    ],
)
def test_dtypes_groups_and_head_sizes(heads, kv_heads, size, dtype, layout):
    problem = Problem(
        [310], heads=heads, kv_heads=kv_heads, size=size, dtype=dtype, seed=1, block=16
    )
    query = problem.queries(54)
    block = blocks(start=[0], length=[54], row=[0], position=[256], level=[3])
    kept = problem.kept(SMALL)
    kept[-1][0] = torch.tensor([8, 96, 104, 232])
    out, kept = run(problem, query, block, SMALL, kept, layout=layout)
    check(problem, query, out, 0, 54, 0, 256, listed(kept, 0)[-1], SMALL)


def test_every_key_counts_once():
    problem = Problem([500, 300], heads=2, kv_heads=1, seed=2)
    values = problem.cache[..., 32:, :]
    values[~values.isnan()] = 1.0
    query = problem.queries(2 * QUERY_BLOCK)
    block = blocks(start=[0, 64], length=[64, 64], row=[0, 1], position=[436, 192], level=[0, 0])
    out, _ = run(problem, query, block, SMALL)
    close(out, np.ones(out.shape))


def test_pages_strides_and_later_keys_change_no_bit():
    problem = Problem([400], heads=2, kv_heads=1, seed=3)
    query = problem.queries(64)
    block = blocks(start=[0], length=[64], row=[0], position=[256], level=[0])
    wanted, _ = run(problem, query, block, SMALL)
    order = torch.randperm(len(problem.cache))
    problem.cache = problem.cache[order]
    problem.table = order.argsort()[problem.table.long()].to(torch.int32)
    for x in range(320, 400):
        problem.cache[problem.table[0, x // 32].long(), :, x % 32 :: 32] = torch.nan
    found, _ = run(problem, query, block, SMALL, layout="NHD")
    assert torch.equal(found, wanted)
