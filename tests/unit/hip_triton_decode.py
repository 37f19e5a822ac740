"""Decode by the Triton kernels against plain loops in float64; `test_hip_triton` runs this."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.unit.hip_kernels import close, listed, run
from tests.unit.hip_problem import SMALL, Problem, attended, blocks, decodes
from vllm_plugins.attention_backends.hip.plan import LayerPlan, Stage
from vllm_plugins.attention_backends.hip.query_blocks import DENSE
from vllm_plugins.attention_backends.hip.selection import NONE

EDGES = [1, 7, 8, 9, 17, 24, 25, 64, 300]
# Three splits; the second holds selected blocks alone.
WIDE = LayerPlan(sink=40, window=96, overlap=8, stages=(Stage(64, 640), Stage(8, 600)))


def chosen(problem, plan, lists):
    """Lists of selected blocks that no stage has to find."""
    kept = problem.kept(plan, len(lists))
    for row, blocks_of_row in enumerate(lists):
        kept[-1][row, : len(blocks_of_row)] = torch.tensor(blocks_of_row, dtype=torch.int32)
    return kept


def check(problem, query, out, kept, position, plan, *, row=0, length=1, start=None, list_row=None):
    start = row if start is None else start
    selected = listed(kept, row if list_row is None else list_row)[-1]
    for t in range(length):
        seen = attended(position, length, selected, plan, t)
        wanted = problem.attend(query[start + t], row, position + t, seen)
        close(out[start + t], wanted, problem.dtype)


def test_sparse_and_dense_requests():
    problem = Problem(EDGES * 2)
    levels = [0] * len(EDGES) + [DENSE] * len(EDGES)
    query = problem.queries(2 * len(EDGES))
    out, kept = run(problem, query, decodes([n - 1 for n in EDGES * 2], levels), SMALL)
    for row, n in enumerate(EDGES):
        check(problem, query, out, kept, n - 1, SMALL, row=row)
        dense = row + len(EDGES)
        close(out[dense], problem.attend(query[dense], dense, n - 1, range(n)))
        assert listed(kept, dense) == [[], [], []]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "dtype", "layout"),
    [
        (8, 1, 64, torch.bfloat16, "HND"),
        (6, 2, 96, torch.float16, "NHD"),
        (3, 3, 128, torch.bfloat16, "NHD"),
        (14, 2, 256, torch.float16, "HND"),
        (2, 1, 128, torch.float32, "HND"),
        (4, 1, 128, torch.float16, "NHD"),
        (5, 1, 64, torch.float16, "HND"),
        (12, 2, 96, torch.bfloat16, "NHD"),
        (4, 1, 256, torch.bfloat16, "NHD"),
    ],
)
def test_dtypes_groups_and_head_sizes(heads, kv_heads, size, dtype, layout):
    problem = Problem(
        [150, 420], heads=heads, kv_heads=kv_heads, size=size, dtype=dtype, seed=1, block=16
    )
    query = problem.queries(2)
    out, kept = run(problem, query, decodes([149, 419], [DENSE, 3]), SMALL, layout=layout,
                    kept=chosen(problem, SMALL, [[], [16, 48, 400, 408]]))  # fmt: skip
    close(out[0], problem.attend(query[0], 0, 149, range(150)), dtype)
    check(problem, query, out, kept, 419, SMALL, row=1)


@pytest.mark.parametrize("length", [136, 137, 200, 777])
def test_keys_of_several_splits(length):
    problem = Problem([length], seed=2)
    query, position = problem.queries(1), length - 1
    # All blocks between sink and window, the last of which reaches into the window.
    lists = [list(range(40, position + 1 - 96 + 8, 8))[:75]]
    kept = chosen(problem, WIDE, lists)
    out, kept = run(problem, query, decodes([position], 2), WIDE, kept)
    check(problem, query, out, kept, position, WIDE)


def test_few_selected_blocks_leave_splits_empty():
    problem = Problem([600] * 3, seed=3)
    query = problem.queries(3)
    # None, in the first split alone, and behind the window's start alone.
    kept = chosen(problem, WIDE, [[], [48], [504, 512]])
    out, kept = run(problem, query, decodes([599] * 3, 2), WIDE, kept)
    for row in range(3):
        check(problem, query, out, kept, 599, WIDE, row=row)


def test_drafts_see_what_comes_before_them():
    lengths, problem = [1, 2, 3, 4], Problem([140, 300, 301, 30], heads=6, kv_heads=2, seed=4)
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    query = problem.queries(sum(lengths))
    positions = [n - k for n, k in zip([140, 300, 301, 30], lengths, strict=True)]
    block = blocks(
        start=starts, length=lengths, row=[0, 1, 2, 3], position=positions, level=[3, 3, DENSE, 3],
        kept_row=[3, 2, 1, 0],
    )  # fmt: skip
    kept = chosen(problem, SMALL, [[8, 16], [], [8, 64, 264, 280], [8, 112, 120]])
    out, kept = run(problem, query, block, SMALL, kept)
    for row in (0, 1, 3):
        check(problem, query, out, kept, positions[row], SMALL, row=row, length=lengths[row],
              start=starts[row], list_row=3 - row)  # fmt: skip
    for t in range(3):
        wanted = problem.attend(query[3 + t], 2, positions[2] + t, range(positions[2] + t + 1))
        close(out[3 + t], wanted)


def test_many_splits_of_a_dense_sequence():
    # More than are merged at once.
    problem = Problem([4400], heads=2, kv_heads=1, seed=5)
    query = problem.queries(1)
    # The last keys weigh most.
    for x in range(4300, 4400):
        problem.cache[problem.table[0, x // 32].long(), :, x % 32] *= 3
    problem.keys[0][4300:] *= 3
    out, _ = run(problem, query, decodes([4399], DENSE), SMALL)
    close(out[0], problem.attend(query[0], 0, 4399, range(4400)))


def test_every_key_counts_once():
    problem = Problem([300, 30])
    values = problem.cache[..., 32:, :]
    values[~values.isnan()] = 1.0
    out, _ = run(problem, problem.queries(2), decodes([299, 29], 0), SMALL)
    close(out, np.ones(out.shape))


def test_equal_scores_give_the_mean_over_the_union():
    problem = Problem([500], seed=6)
    out, kept = run(problem, torch.zeros(1, 4, 64), decodes([499], 0), SMALL)
    seen = sorted(attended(499, 1, listed(kept, 0)[-1], SMALL))
    close(out[0], problem.values[0][seen].mean(axis=0).repeat(2, axis=0))


def test_neighbours_pages_and_later_keys_change_no_bit():
    alone = Problem([450], seed=7, block=32)
    query = alone.queries(1)
    wanted, _ = run(alone, query, decodes([449], 0), SMALL)
    # Three requests, other pages, and keys behind the query.
    together = Problem([600, 600, 20], seed=8, block=96)
    for x in range(450):
        slot, old = together.table[1, x // 96].long(), alone.table[0, x // 32].long()
        together.cache[slot, :, x % 96] = alone.cache[old, :, x % 32]
        together.cache[slot, :, x % 96 + 96] = alone.cache[old, :, x % 32 + 32]
    batch = together.queries(3)
    batch[1] = query[0]
    found, _ = run(together, batch, decodes([599, 449, 19], 0), SMALL, layout="NHD")
    assert torch.equal(found[1], wanted[0])


def test_padding_is_not_written():
    problem = Problem([100], seed=9)
    block = blocks(
        start=[0, 0], length=[1, 0], row=[0, 0], position=[99, 0], level=[0, 0], kept_row=[0, 0]
    )
    query = problem.queries(2)
    out, kept = run(problem, query, block, SMALL)
    check(problem, query, out, kept, 99, SMALL)
    assert out[1].isnan().all()


def test_nothing_selected_is_sink_and_window():
    plan = dataclasses.replace(SMALL, stages=(Stage(32, 64), Stage(8, 0)))
    problem = Problem([300], seed=10)
    query = problem.queries(1)
    out, kept = run(problem, query, decodes([299], 0), plan)
    assert (kept[0] == NONE).all()
    close(out[0], problem.attend(query[0], 0, 299, [*range(8), *range(284, 300)]))
