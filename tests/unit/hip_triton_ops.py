"""HiP's operators as torch sees them; `test_hip_triton` runs this."""

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from tests.unit.hip_kernels import cuda_cache
from tests.unit.hip_problem import SMALL, Problem, decodes
from vllm_plugins.attention_backends.hip.plan import QUERY_BLOCK
from vllm_plugins.attention_backends.hip.triton_kernels import ops
from vllm_plugins.attention_backends.hip.triton_kernels.blocks import pack

assert ops.Batch


@pytest.mark.parametrize("name", ["hip_select", "hip_decode", "hip_prefill"])
def test_operators_say_what_they_change(name):
    problem = Problem([40], seed=0)
    keys, values, _ = cuda_cache(problem)
    keys, values = keys.contiguous(), values.contiguous()
    query, kept = problem.queries(1), problem.kept(SMALL)
    start = (query, keys, problem.table, pack(decodes([39], 0)), 1)
    chunks = [x.chunk for x in SMALL.stages]
    plan = (SMALL.sink, SMALL.window)
    attend = (values, kept[-1], chunks[-1], *plan, problem.scale)
    arguments = {
        "hip_select": (*start, 40, kept, chunks, [1, 1, 1], *plan, SMALL.overlap, True),
        "hip_decode": (*start, *attend, 0, torch.empty_like(query)),
        "hip_prefill": (*start, *attend, torch.empty_like(query)),
    }[name]
    operator = getattr(torch.ops.vllm_plugins, name).default
    checks = ("test_schema", "test_faketensor")
    assert set(torch.library.opcheck(operator, arguments, test_utils=checks).values()) == {
        "SUCCESS"
    }


def test_grids_have_room_for_any_batch(monkeypatch):
    """CUDA takes 65535 programs along every axis but the first."""
    grids, many = [], 70_000
    monkeypatch.setattr(
        InterpretedFunction, "__getitem__", lambda _, grid: lambda *_, **__: grids.append(grid)
    )
    problem = Problem([400], seed=0)
    keys, values, _ = cuda_cache(problem)
    query, blocks = problem.queries(1), torch.zeros(many, 6, dtype=torch.int32)
    kept = [x.new_empty(many, x.shape[1]) for x in problem.kept(SMALL)]
    for queries in (1, QUERY_BLOCK):
        batch = ops.Batch(query, keys, problem.table, blocks, queries, 400)
        ops.hip_select(batch, SMALL, SMALL.overlap, kept)
    ops.hip_prefill(batch, values, kept[-1], SMALL, problem.scale, query)
    ops.hip_decode(batch, values, kept[-1], SMALL, problem.scale, 0, query)
    # Three stages score and keep, then attention, and in decode what merges it.
    assert len(grids) == 2 * 6 + 1 + 2
    assert all(grid[0] >= many and max(*grid[1:], 1, 1) < 2**16 for grid in grids)
