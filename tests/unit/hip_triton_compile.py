"""Compiles HiP's kernels for sm_90, without a GPU; `test_hip_triton` runs this as a program."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vllm_plugins.attention_backends.hip.plan import FEW_QUERIES, QUERY_BLOCK
from vllm_plugins.attention_backends.hip.plugin import HipOptions
from vllm_plugins.attention_backends.hip.triton_kernels import ops
from vllm_plugins.attention_backends.hip.triton_kernels.blocks import Batch

# Query heads, kv heads, head size, queries of a block.
CASES = [(32, 8, 128, 1), (32, 8, 128, QUERY_BLOCK)]
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Hopper:
    """What Triton asks of a device when it compiles."""

    @staticmethod
    def get_current_target():
        return GPUTarget("cuda", 90, 32)

    @staticmethod
    def get_current_device():
        return 0

    @staticmethod
    def get_current_stream(device):
        return 0


def main():
    """Compile what each case launches; fail on anything in local memory."""
    driver.set_active(Hopper())
    compiled = []

    def compile_only(self, grid):
        return lambda *args, **options: compiled.append(
            (self.__name__, self.run(*args, grid=grid, warmup=True, **options))
        )

    JITFunction.__getitem__ = compile_only
    for case in CASES:
        launch(*case)
        for name, kernel in compiled:
            registers, stack, local = resources(kernel.asm["cubin"])
            print(case, name, registers, "registers", kernel.metadata.shared, "bytes shared")
            assert stack == local == 0
        compiled.clear()


def launch(heads, kv_heads, size, queries):
    plan, dtype = HipOptions().plan(8, 16), torch.bfloat16
    cache = torch.empty(64, kv_heads, 16, 2 * size, dtype=dtype)
    keys, values = cache.transpose(1, 2).split(size, dim=-1)
    query = torch.empty(2 * queries, heads, size, dtype=dtype)
    table, blocks = torch.zeros(2, 64, dtype=torch.int32), torch.zeros(2, 6, dtype=torch.int32)
    lists = [torch.zeros(2, x.keep_chunks, dtype=torch.int32) for x in plan.stages]
    batch = Batch(query, keys, table, blocks, queries, 131072)
    ops.hip_select(batch, plan, plan.overlap, lists)
    if queries <= FEW_QUERIES:
        ops.hip_decode(batch, values, lists[-1], plan, 0.1, 0, torch.empty_like(query))
    else:
        ops.hip_prefill(batch, values, lists[-1], plan, 0.1, torch.empty_like(query))


def resources(cubin):
    """Registers, bytes of stack and of local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ran = subprocess.run(
            [TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return [int(re.search(rf"{x}:(\d+)", ran.stdout)[1]) for x in ("REG", "STACK", "LOCAL")]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        main()
