"""HiP's operators as torch sees them; `test_hip_triton` runs this."""

import pytest
import torch

from tests.unit.hip_kernels import cuda_cache
from tests.unit.hip_problem import SMALL, Problem, decodes
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
