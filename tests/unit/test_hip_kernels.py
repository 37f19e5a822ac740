"""HiP's selection and attention on CPU, compiled and in torch, against plain loops in float64."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.unit.hip_problem import SMALL, Problem, attended, blocks, decodes, select
from vllm_plugins.attention_backends.hip import cpu_kernels, torch_attention
from vllm_plugins.attention_backends.hip.batch import BatchPlanner, Rows
from vllm_plugins.attention_backends.hip.plan import LayerPlan, Stage
from vllm_plugins.attention_backends.hip.plugin import HipOptions
from vllm_plugins.attention_backends.hip.query_blocks import DENSE
from vllm_plugins.attention_backends.hip.selection import NONE
from vllm_plugins.engine.cpu_library import LIBRARIES

NUM_STAGES = len(SMALL.stages)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
# Those that this machine can run.
HERE = LIBRARIES.get(torch.backends.cpu.get_cpu_capability(), ())
CAPABILITIES = [capability for capability, (best, *_) in LIBRARIES.items() if best in HERE]


@pytest.fixture(params=["compiled", "torch"])
def path(request):
    if request.param == "torch":
        return torch_attention
    assert cpu_kernels.library() is not None, "the set-up has a compiler, so this must be built"
    return cpu_kernels


def run(path, problem, query, query_blocks, plan=SMALL, kept=None):
    out = torch.full_like(query, torch.nan)
    kept = problem.kept(plan) if kept is None else kept
    path.attention(query, out, problem.paged, query_blocks, plan, kept, problem.scale)
    return out, kept


def listed(kept, row):
    return [[x for x in stage[row].tolist() if x != NONE] for stage in kept]


def close(found, wanted, dtype=torch.float32):
    np.testing.assert_allclose(
        found.double().numpy(), wanted, rtol=0, atol=TOLERANCE[dtype] * np.abs(wanted).max()
    )


# Lengths at the edges of sink, window, chunks and cache blocks, and beyond what stages keep.
EDGES = [1, 7, 8, 9, 15, 16, 17, 24, 25, 31, 32, 33, 63, 64, 65, 96, 129, 200, 385, 500]


def test_decode_selects_and_attends_as_by_the_letter(path):
    problem = Problem(EDGES)
    query = problem.queries(len(EDGES))
    out, kept = run(path, problem, query, decodes([n - 1 for n in EDGES], 0))
    for row, n in enumerate(EDGES):
        wanted = select(problem, query[row : row + 1], row, n - 1, SMALL, SMALL.overlap)
        assert listed(kept, row) == wanted
        seen = attended(n - 1, 1, wanted[-1], SMALL)
        close(out[row], problem.attend(query[row], row, n - 1, seen))


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (14, 2), (5, 5)])
def test_any_number_of_heads_selects_as_by_the_letter(path, heads, kv_heads):
    problem = Problem(EDGES, heads=heads, kv_heads=kv_heads, seed=4)
    query = problem.queries(len(EDGES))
    _, kept = run(path, problem, query, decodes([n - 1 for n in EDGES], 0))
    for row, n in enumerate(EDGES):
        wanted = select(problem, query[row : row + 1], row, n - 1, SMALL, SMALL.overlap)
        assert listed(kept, row) == wanted


def test_heads_that_are_cut_out_of_wider_ones(path):
    problem = Problem([300])
    query = problem.queries(1)
    wanted, _ = run(path, problem, query, decodes([299], 0))
    wide = torch.cat([query, torch.full_like(query, torch.nan)], dim=2)[..., : problem.size]
    out = torch.empty_like(query)
    kept, args = problem.kept(SMALL), (problem.paged, decodes([299], 0), SMALL)
    path.attention(wide, out, *args, kept, problem.scale)
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("queries", [1, 3])
def test_large_chunks_that_many_heads_look_at(path, queries, centre):
    """The compiled kernel reads chunks of 64 and of 32 keys as a whole for so many heads."""
    stages = Stage(64, 128), Stage(32, 64), Stage(8, 32)
    plan = dataclasses.replace(SMALL, stages=stages, centre=centre)
    lengths = [150, 216, 217, 279, 280, 385, 500]
    problem = Problem(lengths, heads=8, kv_heads=1, seed=5)
    n = len(lengths)
    query = problem.queries(n * queries)
    starts, positions = [i * queries for i in range(n)], [x - queries for x in lengths]
    chosen = blocks(start=starts, length=[queries] * n, row=range(n), position=positions,
                    level=[0] * n, kept_row=range(n))  # fmt: skip
    _, kept = run(path, problem, query, chosen, plan, problem.kept(plan))
    for row, (start, position) in enumerate(zip(starts, positions, strict=True)):
        own = query[start : start + queries]
        assert listed(kept, row) == select(problem, own, row, position, plan, plan.overlap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(8, 1, 64), (6, 2, 96), (5, 5, 128), (14, 2, 256)]
)
def test_dtypes_groups_and_head_sizes(path, dtype, heads, kv_heads, size):
    lengths = [40, 333]
    problem = Problem(lengths, heads=heads, kv_heads=kv_heads, size=size, dtype=dtype, seed=1)
    query = problem.queries(2)
    out, kept = run(path, problem, query, decodes([n - 1 for n in lengths], 0))
    for row, n in enumerate(lengths):
        seen = attended(n - 1, 1, listed(kept, row)[-1], SMALL)
        close(out[row], problem.attend(query[row], row, n - 1, seen), dtype)


def test_dense_rows_attend_to_everything_and_leave_what_is_kept(path):
    problem = Problem(EDGES, block=64)
    query = problem.queries(len(EDGES))
    out, kept = run(path, problem, query, decodes([n - 1 for n in EDGES], DENSE))
    for row, n in enumerate(EDGES):
        close(out[row], problem.attend(query[row], row, n - 1, range(n)))
        assert listed(kept, row) == [[], [], []]


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_later_level_starts_from_what_was_kept(path, level):
    problem = Problem([500], seed=2)
    first, then = problem.queries(1), problem.queries(1)
    _, kept = run(path, problem, first, decodes([480], 0))
    before = [x.clone() for x in kept]
    out, kept = run(path, problem, then, decodes([485], level), kept=kept)
    for stage in range(level):
        assert torch.equal(kept[stage], before[stage])
    if level < NUM_STAGES:
        # The stage chose anew among the chunks that the one before it had kept.
        chunk = SMALL.stages[level - 1].chunk
        parents = {x + i for x in before[level - 1][0].tolist() for i in range(chunk)}
        assert set(listed(kept, 0)[level]) <= parents
        assert not torch.equal(kept[level], before[level])
    close(out[0], problem.attend(then[0], 0, 485, attended(485, 1, listed(kept, 0)[-1], SMALL)))


@pytest.mark.parametrize("length", [2, 3, 5, 9, 40, 64])
@pytest.mark.parametrize("stride", [1, 4])
def test_several_queries_of_a_block(path, length, stride):
    plan = dataclasses.replace(
        SMALL, stages=tuple(dataclasses.replace(s, query_stride=stride) for s in SMALL.stages)
    )
    problem = Problem([400], seed=3)
    query, position = problem.queries(length), 400 - length
    out, _ = run(
        path, problem, query,
        blocks(start=[0], length=[length], row=[0], position=[position], level=[0]), plan,
    )  # fmt: skip
    if length <= 8:
        # Decode scores every draft; the stride is about prompts.
        plan = SMALL
    chosen = select(problem, query, 0, position, plan, 0)[-1]
    for t in range(length):
        seen = attended(position, length, chosen, plan, t)
        close(out[t], problem.attend(query[t], 0, position + t, seen))


def test_a_block_of_a_prompt_that_is_dense(path):
    problem = Problem([200], heads=6, kv_heads=2, seed=4)
    query = problem.queries(64)
    out, _ = run(
        path, problem, query,
        blocks(start=[0], length=[64], row=[0], position=[130], level=[DENSE]),
    )  # fmt: skip
    for t in range(64):
        close(out[t], problem.attend(query[t], 0, 130 + t, range(131 + t)))


def test_every_key_counts_once(path):
    problem = Problem([500, 300, 30])
    problem.cache[..., 32:, :] = torch.where(problem.cache[..., 32:, :].isnan(), torch.nan, 1.0)
    query = problem.queries(3)
    out, _ = run(path, problem, query, decodes([499, 299, 29], 0))
    close(out, np.ones(out.shape))


def test_equal_scores_give_the_mean_over_the_union_and_keep_the_earliest_chunks(path):
    problem = Problem([500], seed=5)
    out, kept = run(path, problem, torch.zeros(1, 4, 64), decodes([499], 0))
    assert listed(kept, 0)[-1] == [8, 16, 24, 32]
    seen = sorted(attended(499, 1, listed(kept, 0)[-1], SMALL))
    close(out[0], problem.values[0][seen].mean(axis=0).repeat(2, axis=0))


def test_chunks_of_one_key_find_the_exact_best(path):
    plan = LayerPlan(sink=8, window=16, overlap=1, stages=(Stage(32, 512), Stage(1, 24)))
    problem = Problem([450], heads=1, kv_heads=1, seed=6)
    query = problem.queries(1)
    _, kept = run(path, problem, query, decodes([449], 0), plan)
    scores = problem.keys[0][8:435, 0] @ query[0, 0].double().numpy()
    assert listed(kept, 0)[-1] == sorted((np.argsort(-scores)[:24] + 8).tolist())


def test_a_needle_with_a_bump_is_found(path):
    plan = LayerPlan(sink=8, window=16, overlap=1, stages=(Stage(64, 512), Stage(8, 32)))
    problem = Problem([2000], heads=2, kv_heads=1, seed=7)
    query = problem.queries(1)
    needle, block = 1234, 32
    for x in range(needle - 32, needle + 33):
        bump = np.exp(-(((x - needle) / 16) ** 2)) * 40
        slot = problem.table[0, x // block].long()
        problem.cache[slot, 0, x % block] += bump * query[0].mean(0) / query[0].mean(0).norm()
    _, kept = run(path, problem, query, decodes([1999], 0), plan)
    assert any(s <= needle < s + 8 for s in listed(kept, 0)[-1])


def steps_behind_a_needle(path, overlap):
    """Decode while 8 keys that take all attention leave the window; return the largest error."""
    options = HipOptions(
        sink_tokens=8, window_tokens=64, overlap_tokens=16, refresh=(16, 8), top_k=32,
        stages=({"chunk": 32, "keep": 64}, {"chunk": 8}), dense_threshold=0,
    )  # fmt: skip
    plan = dataclasses.replace(options.plan(5, 8), overlap=overlap)
    needle, last, size = 208, 320, 32
    problem, planner = Problem([last], heads=2, kv_heads=1, seed=9), BatchPlanner(options, 1, 1)
    query, kept, worst = problem.queries(1), problem.kept(plan, 1), 0.0
    for x in range(last):
        slot = int(problem.table[0, x // size]), 0, x % size
        # The representatives of their chunk of 32 are among them.
        key = query[0, 0] * 2 if needle <= x < needle + 8 else problem.cache[slot] / 10
        problem.cache[slot], problem.keys[0][x, 0] = key, key.double().numpy()
    query[0, 1] = query[0, 0]
    for position in range(needle + 8, last):
        slots = problem.table[0, position // size].long()[None] * size + position % size
        one = torch.ones(1, dtype=torch.int32)
        rows = Rows(one * 0, one, one * position, one == 0, problem.table, slots, size)
        out, _ = run(path, problem, query, planner.plan(rows)[0], plan, kept)
        wanted = problem.attend(query[0], 0, position, range(position + 1))
        worst = max(worst, float(np.abs(out[0].double().numpy() - wanted).max()))
    return worst


def test_what_leaves_the_window_between_two_refreshes_is_found(path):
    """It has been a candidate, by the overlap of window and candidates, without which it is not."""
    assert steps_behind_a_needle(path, 16) < 1e-3 < 0.1 < steps_behind_a_needle(path, 1)


def test_a_selection_from_the_start_reads_nothing_of_what_was_kept(path):
    problem = Problem([333, 500], seed=5)
    query, found = problem.queries(2), []
    for rubbish in (NONE, 7):
        kept = [x.fill_(rubbish) for x in problem.kept(SMALL)]
        found.append(run(path, problem, query, decodes([332, 499], 0), kept=kept))
    (one, kept_by_one), (other, kept_by_other) = found
    assert torch.equal(one, other) and all(map(torch.equal, kept_by_one, kept_by_other))


def test_on_smooth_scores_selection_finds_far_more_mass_than_chance(path):
    plan = LayerPlan(sink=8, window=16, overlap=1, stages=(Stage(32, 512), Stage(8, 128)))
    ours, chance = [], []
    for seed in range(10):
        problem = Problem([2000], heads=1, kv_heads=1, seed=seed, smooth=True)
        query = problem.queries(1)
        _, kept = run(path, problem, query, decodes([1999], 0), plan)
        scores = problem.keys[0][8:1984, 0] @ query[0, 0].double().numpy()
        best = set((np.argsort(-scores)[:128] + 8).tolist())
        found = {x for s in listed(kept, 0)[-1] for x in range(s, s + 8)}
        ours.append(len(best & found) / 128)
        chance.append(128 / 1976)
    assert np.mean(ours) > 0.6 > 5 * np.mean(chance)


def test_the_error_is_bounded_by_the_mass_that_is_left_out(path):
    problem = Problem([700], heads=2, kv_heads=1, seed=8)
    query = problem.queries(1) * 2
    out, kept = run(path, problem, query, decodes([699], 0))
    seen = sorted(attended(699, 1, listed(kept, 0)[-1], SMALL))
    for h in range(2):
        scores = problem.keys[0][:, 0] @ query[0, h].double().numpy() * problem.scale
        p = np.exp(scores - scores.max())
        mass = p[seen].sum() / p.sum()
        exact = problem.attend(query[0], 0, 699, range(700))[h]
        largest = np.linalg.norm(problem.values[0][:, 0], axis=1).max()
        error = np.linalg.norm(out[0, h].double().numpy() - exact)
        assert 0 < error <= 2 * (1 - mass) * largest


def test_neighbours_pages_and_later_keys_change_nothing(path):
    alone = Problem([450], seed=9)
    query = alone.queries(1)
    wanted, _ = run(path, alone, query, decodes([449], 0))
    # Three requests, other pages, and keys behind the query.
    together = Problem([600, 450 + 150, 20], seed=10, block=96)
    for x in range(450):
        slot, offset = together.table[1, x // 96].long(), x % 96
        old = alone.table[0, x // 32].long()
        together.cache[slot, :, offset] = alone.cache[old, :, x % 32]
        together.cache[slot, :, offset + 96] = alone.cache[old, :, x % 32 + 32]
    batch = together.queries(3)
    batch[1] = query[0]
    found, _ = run(path, together, batch, decodes([599, 449, 19], 0))
    if path is cpu_kernels:
        assert torch.equal(found[1], wanted[0])
    close(found[1], wanted[0].double().numpy())


def test_threads_do_not_change_a_bit():
    problem = Problem([3000, 50], seed=11)
    query, threads = problem.queries(2), torch.get_num_threads()
    found = []
    for n in (1, 2):
        torch.set_num_threads(n)
        found.append(run(cpu_kernels, problem, query, decodes([2999, 49], [0, DENSE]))[0])
    torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_each_instruction_set_has_kernels_that_do_the_same(capability, monkeypatch):
    name = LIBRARIES[capability][0]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    kernels = cpu_kernels.library.__wrapped__()
    assert f"{name}." in kernels._name
    monkeypatch.setattr(cpu_kernels, "library", lambda: kernels)
    problem = Problem([500, 400], heads=6, kv_heads=2, seed=14)
    query = problem.queries(41)
    block = blocks(start=[0, 1], length=[1, 40], row=[0, 1], position=[499, 360], level=[0, 0])
    out, _ = run(cpu_kernels, problem, query, block)
    for start, length, row, position in ((0, 1, 0, 499), (1, 40, 1, 360)):
        chosen = select(problem, query[start : start + length], row, position, SMALL, 0)[-1]
        for t in {0, length - 1}:
            seen = attended(position, length, chosen, SMALL, t)
            close(out[start + t], problem.attend(query[start + t], row, position + t, seen))


def test_first_keys_can_represent(path):
    plan = dataclasses.replace(SMALL, centre=False)
    problem = Problem([500], seed=12)
    query = problem.queries(1)
    _, kept = run(path, problem, query, decodes([499], 0), plan)
    assert listed(kept, 0) == select(problem, query, 0, 499, plan, plan.overlap)


def test_nothing_selected_is_sink_and_window(path):
    plan = dataclasses.replace(SMALL, stages=(Stage(32, 64), Stage(8, 0)))
    problem = Problem([300], seed=13)
    query = problem.queries(1)
    out, _ = run(path, problem, query, decodes([299], 0), plan)
    close(out[0], problem.attend(query[0], 0, 299, [*range(8), *range(284, 300)]))
