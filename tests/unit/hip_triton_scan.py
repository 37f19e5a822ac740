"""Selection by the Triton kernels against plain loops in float64; `test_hip_triton` runs this."""

import dataclasses

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.unit.hip_kernels import listed, run
from tests.unit.hip_problem import SMALL, Problem, blocks, chunk_score, decodes, select
from vllm_plugins.attention_backends.hip.plan import LayerPlan, Stage
from vllm_plugins.attention_backends.hip.query_blocks import DENSE
from vllm_plugins.attention_backends.hip.selection import NONE
from vllm_plugins.attention_backends.hip.triton_kernels import keep

# Lengths at the edges of sink, window, chunks and cache blocks, and beyond what stages keep.
EDGES = [1, 8, 9, 16, 17, 33, 64, 65, 129, 193, 500]


def scattered(plan, stride):
    stages = tuple(dataclasses.replace(x, query_stride=stride) for x in plan.stages)
    return dataclasses.replace(plan, stages=stages)


@pytest.mark.parametrize(("lengths", "centre"), [(EDGES, True), ([150, 470], False)])
def test_decode_selects_by_the_letter(lengths, centre):
    plan = dataclasses.replace(SMALL, centre=centre)
    problem = Problem(lengths)
    query, kept = problem.queries(len(lengths)), problem.kept(plan)
    for x in kept:
        x.fill_(7)
    run(problem, query, decodes([n - 1 for n in lengths], 0), plan, kept)
    for row, n in enumerate(lengths):
        wanted = select(problem, query[row : row + 1], row, n - 1, plan, plan.overlap)
        assert listed(kept, row) == wanted
        # Sorted, and padded at the end.
        assert all(x[row].tolist() == sorted(x[row].tolist()) for x in kept)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "dtype", "layout"),
    [
        (8, 1, 64, torch.bfloat16, "HND"),
        (6, 2, 96, torch.float16, "NHD"),
        (3, 3, 128, torch.bfloat16, "NHD"),
        (4, 2, 256, torch.float16, "HND"),
        (4, 1, 128, torch.float16, "NHD"),
        (5, 1, 64, torch.float16, "HND"),
        (14, 2, 96, torch.bfloat16, "NHD"),
        (2, 1, 256, torch.bfloat16, "NHD"),
    ],
)
@pytest.mark.parametrize("length", [1, 40])
def test_dtypes_groups_and_head_sizes(heads, kv_heads, size, dtype, layout, length):
    problem = Problem(
        [333], heads=heads, kv_heads=kv_heads, size=size, dtype=dtype, seed=1, block=16
    )
    query, position = problem.queries(length), 333 - length
    kept_row = [0] if length == 1 else None
    block = blocks(
        start=[0], length=[length], row=[0], position=[position], level=[0], kept_row=kept_row
    )
    _, kept = run(problem, query, block, scattered(SMALL, 8), layout=layout)
    chosen = query[:: 8 if length > 8 else 1]
    overlap = SMALL.overlap if length == 1 else 0
    assert listed(kept, 0) == select(problem, chosen, 0, position, SMALL, overlap)


def next_survivors(problem, query, row, position, kept, stage):
    """Survivors of a stage that starts from what the one before it has kept."""
    end = max(position + 1 - SMALL.window + SMALL.overlap, SMALL.sink)
    coarse, this = SMALL.stages[stage - 1].chunk, SMALL.stages[stage]
    starts = [x for s in kept for x in range(s, min(s + coarse, end), this.chunk)]
    scores = {s: chunk_score(problem, query, row, s, min(s + this.chunk, end)) for s in starts}
    return sorted(sorted(starts, key=lambda s: (-scores[s], s))[: this.keep_chunks])


def test_each_request_runs_the_stages_that_are_due_and_no_others():
    levels = [0, 1, 2, 3, DENSE]
    problem = Problem([500] * 5, seed=2)
    _, kept = run(problem, problem.queries(5), decodes([480] * 5, 0), SMALL)
    before, query = [x.clone() for x in kept], problem.queries(5)
    run(problem, query, decodes([485] * 5, levels), SMALL, kept)
    for row, level in enumerate(levels):
        due = level if level != DENSE else len(SMALL.stages)
        for stage in range(due):
            assert torch.equal(kept[stage][row], before[stage][row])
        for stage in range(due, len(SMALL.stages)):
            if stage:
                lists = listed(kept, row)
                assert lists[stage] == next_survivors(
                    problem, query[row : row + 1], row, 485, lists[stage - 1], stage
                )
            assert not torch.equal(kept[stage][row], before[stage][row])


def test_rows_of_nobody_and_padding_are_left_alone():
    problem = Problem([300, 400], seed=3)
    kept = problem.kept(SMALL, 5)
    for x in kept:
        x[:] = torch.arange(x.shape[1]) * -7 - 1
    before = [x.clone() for x in kept]
    block = blocks(
        start=[0, 0, 1], length=[1, 0, 1], row=[0, 1, 1], position=[299, 0, 399], level=[0, 0, 0],
        kept_row=[3, 0, 1],
    )  # fmt: skip
    query = problem.queries(2)
    run(problem, query, block, SMALL, kept)
    for row in (0, 2, 4):
        assert all(torch.equal(x[row], y[row]) for x, y in zip(kept, before, strict=True))
    for row, (request, kept_row) in enumerate([(0, 3), (1, 1)]):
        wanted = select(
            problem, query[row : row + 1], request, [299, 399][row], SMALL, SMALL.overlap
        )
        assert listed(kept, kept_row) == wanted


def test_drafts_are_scored_together():
    lengths, problem = [1, 2, 3, 4, 8], Problem([300] * 5, seed=4)
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    query = problem.queries(sum(lengths))
    block = blocks(
        start=starts, length=lengths, row=list(range(5)), position=[300 - n for n in lengths],
        level=[0] * 5, kept_row=[4, 3, 2, 1, 0],
    )  # fmt: skip
    # The stride is about prompts.
    _, kept = run(problem, query, block, scattered(SMALL, 4))
    for row, (start, n) in enumerate(zip(starts, lengths, strict=True)):
        own = query[start : start + n]
        assert listed(kept, 4 - row) == select(problem, own, row, 300 - n, SMALL, SMALL.overlap)


@pytest.mark.parametrize("stride", [1, 4])
def test_blocks_of_prompts(stride):
    lengths = [64, 33, 9, 8, 1]
    problem, plan = Problem([450] * 5, heads=2, kv_heads=1, seed=5), scattered(SMALL, stride)
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    position = [320, 384, 192, 392, 0]
    query = problem.queries(sum(lengths))
    block = blocks(
        start=starts, length=lengths, row=list(range(5)), position=position, level=[0] * 5
    )
    _, kept = run(problem, query, block, plan)
    for row, (start, n) in enumerate(zip(starts, lengths, strict=True)):
        own = query[start : start + n][:: stride if n > 8 else 1]
        assert listed(kept, row) == select(problem, own, row, position[row], SMALL, 0)


@pytest.mark.parametrize("length", [1, 10])
def test_chunks_of_one_key_find_the_exact_best_although_all_scores_are_negative(length):
    plan = LayerPlan(sink=8, window=16, overlap=16, stages=(Stage(1, 50),))
    problem = Problem([300], heads=1, kv_heads=1, seed=6)
    problem.cache.abs_()
    query, position = -problem.queries(length).abs(), 300 - length
    kept_row = [0] if length == 1 else None
    block = blocks(
        start=[0], length=[length], row=[0], position=[position], level=[0], kept_row=kept_row
    )
    _, kept = run(problem, query, block, plan)
    end = 300 if length == 1 else position + 1 - plan.window
    scores = np.abs(problem.keys[0][8:end, 0]) @ query[:, 0].double().numpy().T
    best = np.argsort(-scores.max(axis=1))[:50]
    assert listed(kept, 0)[0] == sorted((best + 8).tolist())


def test_more_candidates_than_are_handled_at_once():
    plan = LayerPlan(sink=8, window=16, overlap=1, stages=(Stage(1, 2100),))
    problem = Problem([2300], heads=1, kv_heads=1, seed=7)
    query = problem.queries(1)
    _, kept = run(problem, query, decodes([2299], 0), plan)
    scores = problem.keys[0][8:2285, 0] @ query[0, 0].double().numpy()
    assert listed(kept, 0)[0] == sorted((np.argsort(-scores)[:2100] + 8).tolist())
    # All the same: the first.
    _, kept = run(problem, query * 0, decodes([2299], 0), plan)
    assert listed(kept, 0)[0] == list(range(8, 2108))


def test_all_are_kept_where_there_are_no_more():
    plan = LayerPlan(sink=8, window=16, overlap=16, stages=(Stage(16, 480), Stage(1, 480)))
    problem = Problem([480, 100], heads=1, kv_heads=1, seed=7)
    _, kept = run(problem, problem.queries(2), decodes([479, 99], 0), plan)
    assert listed(kept, 0)[1] == list(range(8, 480))
    assert listed(kept, 1)[1] == list(range(8, 100))


@triton.jit
def ranks(scores, out, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(out + at, keep._rank(tl.load(scores + at)))


def test_ranks_are_ordered_like_scores():
    ordered = [-torch.inf, -1e30, -2.5, -1e-40, 0.0, 1e-40, 1.0, 1e30]
    out = torch.empty(8, dtype=torch.int32)
    ranks[(1,)](torch.tensor(ordered), out, 8)
    assert keep.NO_RANK.value < out[0] and (out.diff() > 0).all()
    # Both zeros are the same score.
    ranks[(1,)](torch.tensor([-0.0, 0.0] * 4), out, 8)
    assert (out == out[0]).all()


def test_equal_scores_keep_the_earliest_chunks():
    problem = Problem([300], seed=8)
    _, kept = run(problem, torch.zeros(1, 4, 64), decodes([299], 0), SMALL)
    assert listed(kept, 0)[-1] == [8, 16, 24, 32]
    # Some better ones, the rest equal.
    keys = problem.cache[:, :, :32]
    keys[~keys.isnan()] = 0
    for x in (160, 168, 240):
        keys[problem.table[0, x // 32].long(), :, x % 32 : x % 32 + 8] = 1
    _, kept = run(problem, torch.ones(1, 4, 64), decodes([299], 0), SMALL)
    assert listed(kept, 0)[-1] == [8, 160, 168, 240]


def test_pages_and_strides_change_no_bit():
    problem = Problem([350, 80], seed=9)
    query = problem.queries(2)
    _, wanted = run(problem, query, decodes([349, 79], 0), SMALL)
    order = torch.randperm(len(problem.cache))
    problem.cache = problem.cache[order]
    problem.table = order.argsort()[problem.table.long()].to(torch.int32)
    # A table is a part of a wider one.
    wide = torch.full((2, 40), 2**30, dtype=torch.int32)
    wide[:, : problem.table.shape[1]] = problem.table
    _, found = run(problem, query, decodes([349, 79], 0), SMALL, layout="NHD", table=wide)
    assert all(torch.equal(x, y) for x, y in zip(wanted, found, strict=True))


def test_nothing_is_selected_where_nothing_is_kept():
    plan = dataclasses.replace(SMALL, stages=(Stage(32, 64), Stage(8, 0)))
    problem = Problem([300], seed=10)
    _, kept = run(problem, problem.queries(1), decodes([299], 0), plan)
    assert (kept[0] == NONE).all() and kept[1].shape == (1, 0)
