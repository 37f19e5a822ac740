"""ZipCache's operators as torch sees them; `test_zipcache_triton` runs this."""

from dataclasses import replace

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from tests.unit.zipcache_triton_problem import Problem, apart
from vllm_plugins.attention_backends.zipcache.batch import Seals
from vllm_plugins.attention_backends.zipcache.key_transform import KeyTransform
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


def basis(kv_heads, size, dtype, seed=0):
    """A basis of no particular kind, and a centre."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(kv_heads, size, size, generator=generator, dtype=torch.float64)
    mean = torch.randn(kv_heads, size, generator=generator)
    return KeyTransform.of(torch.linalg.qr(matrix)[0] * 1.3, mean, dtype)


@pytest.mark.parametrize(
    ("tokens", "kv_heads", "group", "size", "dtype"),
    [
        (1, 2, 1, 64, torch.float32), (3, 1, 8, 96, torch.bfloat16),
        (33, 2, 4, 128, torch.float16), (70, 3, 3, 64, torch.bfloat16),
        (5, 1, 2, 256, torch.bfloat16), (32, 2, 5, 80, torch.float16),
    ],
)  # fmt: skip
def test_bases_are_changed_as_on_the_cpu(tokens, kv_heads, group, size, dtype):
    generator = torch.Generator().manual_seed(tokens)
    query, key = (
        apart(torch.randn(tokens, n, size, generator=generator).to(dtype))
        for n in (kv_heads * group, kv_heads)
    )
    by = basis(kv_heads, size, dtype)
    for found, wanted in zip(ops.zipcache_transform(by, query, key), by.apply(query, key),
                             strict=True):  # fmt: skip
        assert found.shape == wanted.shape and found.dtype == dtype and found.is_contiguous()
        # Sums are taken in another order, so that a number may be rounded the other way.
        off = max(torch.finfo(dtype).eps * 2, 4e-6)
        torch.testing.assert_close(found.double(), wanted.double(), rtol=off, atol=off)


def test_the_change_of_a_basis_says_what_it_returns():
    query, key = torch.randn(3, 4, 32), torch.randn(3, 2, 32)
    arguments = (*vars(basis(2, 32, torch.float32)).values(), query, key)
    operator = torch.ops.vllm_plugins.zipcache_transform.default
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
    long = torch.empty(many * 32, 1, 16, device="meta")
    ops.transform.transform(basis(1, 16, torch.float32), long, long)
    assert len(grids) == 6 and grids[1] == grids[3] == grids[4] == (many,)
    assert all(max(*grid[1:], 1, 1) < 2**16 for grid in grids)
