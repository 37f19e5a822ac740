"""Runs HiP's Triton kernels on the problems of `hip_problem`."""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from tests.unit.hip_problem import Problem
from vllm_plugins.attention_backends.hip.plan import FEW_QUERIES
from vllm_plugins.attention_backends.hip.query_blocks import DENSE
from vllm_plugins.attention_backends.hip.selection import NONE
from vllm_plugins.attention_backends.hip.triton_kernels import ops
from vllm_plugins.attention_backends.hip.triton_kernels.blocks import Batch, pack

# Triton's interpreter keeps bfloat16 as the integers of its bits, and multiplies matrices of these.
_create_dot = InterpreterBuilder.create_dot


def _dot(self, a, b, *rest):
    return _create_dot(self, _float32(a), _float32(b), *rest)


def _float32(x):
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


InterpreterBuilder.create_dot = _dot

# It also prepares Triton's modules again whenever a kernel calls a function, for most of its time.
_prepared = set()


def _call(self, *args, **kwargs):
    if self.fn.__module__ not in _prepared:
        _prepared.add(self.fn.__module__)
        return _prepare_and_call(self, *args, **kwargs)
    return self.rewrite()(*args, **kwargs)


_prepare_and_call = InterpretedFunction.__call__
InterpretedFunction.__call__ = _call

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def close(found, wanted, dtype=torch.float32):
    np.testing.assert_allclose(
        found.double().numpy(), wanted, rtol=0, atol=TOLERANCE[dtype] * np.abs(wanted).max()
    )


def listed(kept, row):
    return [[x for x in stage[row].tolist() if x != NONE] for stage in kept]


# Larger than what a key of a problem can score. NaN would not do among keys: the interpreter's
# maximum passes over it.
POISON = 1e4


def cuda_cache(problem: Problem, layout="HND"):
    """A layer's cache as it is on CUDA: values behind keys, in strides that are not contiguous.

    Returns:
        Keys and values, shape (cache blocks, block size, kv heads, head size), and the cache.
    """
    size = problem.cache.shape[2] // 2
    cache = torch.cat([problem.cache[:, :, :size], problem.cache[:, :, size:]], dim=-1)
    if layout == "NHD":
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    # Another layer's part lies between two blocks of this one.
    apart = torch.full((len(cache), 2, *cache.shape[1:]), torch.nan, dtype=cache.dtype)
    strides = (2 * cache.stride(0), *cache.stride()[1:])
    ours = apart.flatten().as_strided(cache.shape, strides)
    ours.copy_(cache)
    keys, values = ours.transpose(1, 2).split(problem.size, dim=-1)
    keys.nan_to_num_(nan=POISON)
    return keys, values, ours


def run(problem, query, blocks, plan, kept=None, *, queries=None, layout="HND", table=None):
    """Select and attend as the backend does; return the output and what is kept.

    Blocks of more than `FEW_QUERIES` queries, or without rows of their own, are a prompt's.
    """
    keys, values, _ = cuda_cache(problem, layout)
    most = int(blocks.length.max()) if queries is None else queries
    position = blocks.position + blocks.length
    is_decode = bool((blocks.kept_row >= 0).all())
    if kept is None:
        kept = problem.kept(plan, len(blocks) if not is_decode else None)
    packed = pack(blocks)
    if not is_decode:
        packed[:, 5] = torch.arange(len(blocks))
    out = torch.full_like(query, torch.nan)
    table = problem.table if table is None else table
    batch = Batch(query, keys, table, packed, most, int(position.max()))
    ops.hip_select(batch, plan, plan.overlap if is_decode else 0, kept)
    if most <= FEW_QUERIES:
        dense = position[blocks.level == DENSE]
        longest = int(dense.max()) if len(dense) else 0
        ops.hip_decode(batch, values, kept[-1], plan, problem.scale, longest, out)
    else:
        ops.hip_prefill(batch, values, kept[-1], plan, problem.scale, out)
    return out, kept
