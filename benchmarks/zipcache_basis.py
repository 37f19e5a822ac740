"""What changing the basis of queries and keys costs ZipCache on CPU, a layer and step.

    taskset -c 0 python benchmarks/zipcache_basis.py [--out FILE.json]

Each of 16 layers has matrices of its own, so that they are read from memory as in a model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from in_process import write

from vllm_plugins.attention_backends.zipcache.key_transform import KeyTransform, rotation

LAYERS, ROUNDS = 16, 15
HEADS, KV_HEADS, SIZE = 32, 8, 128


def measure(tokens: int, dtype: torch.dtype) -> dict[str, object]:
    """Return milliseconds of one layer, over rounds of all layers.

    Args:
        tokens: Of the step.
        dtype: The model's.
    """
    matrix = rotation(SIZE).expand(KV_HEADS, SIZE, SIZE)
    layers = [KeyTransform.of(matrix, torch.zeros(KV_HEADS, SIZE), dtype) for _ in range(LAYERS)]
    query, key = (torch.randn(tokens, n, SIZE).to(dtype) for n in (HEADS, KV_HEADS))
    taken = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for layer in layers:
            layer.apply(query, key)
        taken.append(1000 * (time.perf_counter() - begin) / LAYERS)
    return {
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "median ms": statistics.median(taken),
        "least ms": min(taken),
        "most ms": max(taken),
        "bytes of matrices": layers[0].bytes,
    }


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(n, x) for x in (torch.bfloat16, torch.float32) for n in (1, 8, 1024)]
    for row in rows:
        print(row)
    shape = {"heads": HEADS, "kv heads": KV_HEADS, "head size": SIZE, "threads": 1}
    write(args.out, {**shape, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
