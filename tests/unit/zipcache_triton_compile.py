"""Compiles ZipCache's kernels for sm_90, without a GPU; `test_zipcache_triton` runs this.

The first argument, if there is one, is a folder for what was compiled.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.unit.hip_triton_compile import Hopper, resources
from vllm_plugins.attention_backends.zipcache.batch import LayerMemory, Seals
from vllm_plugins.attention_backends.zipcache.key_transform import KeyTransform
from vllm_plugins.attention_backends.zipcache.page import PageFormat
from vllm_plugins.attention_backends.zipcache.triton_kernels import ops, transform
from vllm_plugins.attention_backends.zipcache.triton_kernels.batches import (
    FIELDS,
    DeviceBatch,
    Workspace,
)

# Query heads, kv heads, head size, block size, share of keys with four bits.
CASES = [(32, 8, 128, 64, 0.6), (32, 8, 128, 64, 1.0), (32, 8, 128, 64, 0.8)]


def main(folder: str) -> None:
    """Compile what each case launches; fail on anything in local memory."""
    driver.set_active(Hopper())
    compiled = []
    # The kernel that is warmed up serves any number of tokens.
    assert all(x.do_not_specialize for x in transform._transform.params if x.name == "tokens")

    def compile_only(self, grid):
        return lambda *args, **options: compiled.append(
            (self.__name__, self.run(*args, grid=grid, warmup=True, **options))
        )

    JITFunction.__getitem__ = compile_only
    for case in CASES:
        launch(*case)
        for number, (name, kernel) in enumerate(compiled):
            registers, stack, local = resources(kernel.asm["cubin"])
            print(case, name, registers, "registers", kernel.metadata.shared, "bytes shared",
                  stack, local, flush=True)  # fmt: skip
            for kind in ("ttgir", "ptx", "cubin") if folder else ():
                code = kernel.asm[kind]
                path = Path(folder) / f"{name}.{number}.{kind}"
                path.write_bytes(code if isinstance(code, bytes) else code.encode())
            assert stack == local == 0
        compiled.clear()


def launch(heads: int, kv_heads: int, size: int, block_size: int, of_keys: float) -> None:
    """Launch every kernel as the backend does: prompts and decodes, and both kinds of seals."""
    page, dtype = PageFormat.of(block_size, size, "4/2", 0.6, of_keys), torch.bfloat16
    layer = LayerMemory.take(page, kv_heads, 4, 4, dtype)
    layer.cache = torch.zeros(8, kv_heads, page.bytes, dtype=torch.uint8)
    ints = torch.zeros(8, dtype=torch.int32)
    batch = DeviceBatch(
        ints[:5], ints[:4], torch.zeros(4, 64, dtype=torch.int32),
        torch.zeros(64, dtype=torch.int64), ints, torch.zeros(8, FIELDS.value, dtype=torch.int32),
        ints, ints, ints[:1], torch.zeros(2, 2, dtype=torch.int32), 64, 64, True,
    )  # fmt: skip
    query = torch.zeros(64, heads, size, dtype=dtype)
    key = torch.zeros(64, kv_heads, size, dtype=dtype)
    space = Workspace.take(4, 64, heads, kv_heads, size, 33, "cpu")
    ops.zipcache_attend(layer, query, key, key, torch.empty_like(query), batch, space, 0.1)
    ops.zipcache_write(layer, key, key, batch)
    ops.zipcache_score(layer, query, key, batch, space, 0.1)
    ops.zipcache_seal(layer, Seals(ints, ints, ints, torch.zeros(8, block_size)))
    square = torch.zeros(kv_heads, size, size, dtype=dtype)
    by = KeyTransform(square, square, torch.zeros(kv_heads, size))
    ops.zipcache_transform(by, query, key)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        main(sys.argv[1] if len(sys.argv) > 1 else "")
