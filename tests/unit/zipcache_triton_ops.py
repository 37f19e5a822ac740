"""ZipCache's operators as torch sees them; `test_zipcache_triton` runs this."""

from dataclasses import replace

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from tests.unit.zipcache_triton_problem import Problem
from vllm_plugins.attention_backends.zipcache.batch import Seals
from vllm_plugins.attention_backends.zipcache.triton_kernels import ops


@pytest.mark.parametrize("name", ["write", "attend", "score", "seal"])
def test_operators_say_what_they_change(name):
    problem = Problem([40], heads=2, kv_heads=1)
    query, key, value = (x.contiguous() for x in problem.step([1]))
    memory = problem.memory
    memory.cache = memory.cache.contiguous()
    # What has been poisoned equals nothing, not even itself.
    for x in (*vars(problem.space).values(), memory.residual, memory.residual_sums,
              memory.staging_sums):  # fmt: skip
        x.nan_to_num_(nan=1.0)
    layer, space = ops._of_layer(memory), tuple(vars(problem.space).values())
    step = (*layer, *vars(problem.batch([1])).values())
    out = torch.zeros_like(query)
    block = torch.tensor([int(problem.table[0, 0])], dtype=torch.int32)
    arguments = {
        "write": (*step, key, value),
        "attend": (*step, query, key, value, problem.scale, out, *space),
        "score": (*step, query, key, problem.scale, *space),
        "seal": (*layer, block, block * 0, block * 0, torch.ones(1, 32)),
    }[name]
    operator = getattr(torch.ops.vllm_plugins, f"zipcache_{name}").default
    checks = ("test_schema", "test_faketensor")
    found = torch.library.opcheck(operator, arguments, test_utils=checks)
    assert set(found.values()) == {"SUCCESS"}


def test_grids_have_room_for_any_batch(monkeypatch):
    """CUDA takes 65535 programs along every axis but the first; rows are fewer, tokens may not."""
    grids, many = [], 70_000
    monkeypatch.setattr(
        InterpretedFunction, "__getitem__", lambda _, grid: lambda *_, **__: grids.append(grid)
    )
    problem = Problem([40], heads=2, kv_heads=1)
    query, key, value = problem.step([2])
    tiles = torch.zeros(many, 2, dtype=torch.int32)
    batch = replace(problem.batch([2]), tiles=tiles, longest=2**22)
    step, nothing = (problem.memory, query, key), torch.zeros(many, dtype=torch.int32)
    ops.zipcache_write(problem.memory, key, value, batch)
    ops.zipcache_attend(*step, value, query, batch, problem.space, problem.scale)
    ops.zipcache_score(*step, batch, problem.space, problem.scale)
    ops.zipcache_seal(problem.memory, Seals(nothing, nothing, nothing, torch.ones(1, 32)))
    assert len(grids) == 4 and grids[1] == grids[3] == (many,)
    assert all(max(*grid[1:], 1, 1) < 2**16 for grid in grids)
