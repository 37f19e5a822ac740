"""The compiled CPU kernels (``csrc/``): one call for a layer's selection and attention.

Where none were built, `torch_attention` does the same, more slowly.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_plugins.attention_backends.hip.plan import LayerPlan
from vllm_plugins.attention_backends.hip.query_blocks import QueryBlocks
from vllm_plugins.engine.cpu_library import load_cpu_library

MAX_STAGES = 4
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_int32_p = ctypes.c_void_p


class _Call(ctypes.Structure):
    """``hip::Call`` of ``csrc/call.h``, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "out", "cache")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "query_stride",
                "out_stride",
                "block_stride",
                "head_stride",
                "value_offset",
            )
        ),
        ("block_table", _int32_p),
        ("table_stride", ctypes.c_int64),
        *((name, _int32_p) for name in ("start", "length", "row", "position", "level", "kept_row")),
        ("kept", _int32_p * MAX_STAGES),
        *((name, ctypes.c_int32 * MAX_STAGES) for name in ("chunk", "keep_chunks", "query_step")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "num_blocks",
                "num_stages",
                "sink",
                "window",
                "overlap",
                "centre",
                "heads",
                "kv_heads",
                "head_size",
                "block_size",
                "dtype",
            )
        ),
        ("scale", ctypes.c_float),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the kernels for this machine's instructions, or None where none were built."""
    package = __name__.rpartition(".")[0]
    kernels = load_cpu_library(package, "hip_call_size", ctypes.sizeof(_Call))
    if kernels is not None:
        kernels.hip_attention.argtypes = [ctypes.POINTER(_Call)]
        kernels.hip_attention.restype = None
    return kernels


@dataclass(frozen=True)
class Paged:
    """A layer's KV cache and the block table of the batch.

    Attributes:
        cache: Keys of a block and head, then their values, row by row: shape (cache blocks, kv
            heads, 2 * block size, head size), the last two axes contiguous.
        block_table: int32, shape (requests, blocks).
    """

    cache: torch.Tensor
    block_table: torch.Tensor

    @property
    def block_size(self) -> int:
        """Tokens of a cache block."""
        return self.cache.shape[2] // 2


def attention(
    query: torch.Tensor,
    out: torch.Tensor,
    paged: Paged,
    blocks: QueryBlocks,
    plan: LayerPlan,
    kept: Sequence[torch.Tensor],
    scale: float,
) -> None:
    """Select and attend for every query block.

    Args:
        query: Shape (tokens, heads, head size), float32, bfloat16 or float16.
        out: Of the same shape, its last two axes contiguous; the rows of the blocks' tokens are
            written.
        paged: Keys and values, of the dtype of ``query``.
        blocks: The batch's query blocks, on CPU.
        plan: The layer's.
        kept: For each stage what was kept of each request, int32, shape (rows,
            ``stage.keep_chunks``); updated.
        scale: Of the scores.
    """
    kernels = library()
    assert kernels is not None
    heads, head_size = query.shape[1:]
    if query.stride()[1:] != (head_size, 1):
        # Heads that a model has cut out of wider ones.
        query = query.contiguous()
    call = _Call(
        query=query.data_ptr(),
        out=out.data_ptr(),
        cache=paged.cache.data_ptr(),
        query_stride=query.stride(0),
        out_stride=out.stride(0),
        block_stride=paged.cache.stride(0),
        head_stride=paged.cache.stride(1),
        value_offset=paged.block_size * head_size,
        block_table=paged.block_table.data_ptr(),
        table_stride=paged.block_table.stride(0),
        num_blocks=len(blocks),
        num_stages=len(plan.stages),
        sink=plan.sink,
        window=plan.window,
        overlap=plan.overlap,
        centre=plan.centre,
        heads=heads,
        kv_heads=paged.cache.shape[1],
        head_size=head_size,
        block_size=paged.block_size,
        dtype=DTYPES[query.dtype],
        scale=scale,
    )
    for name in ("start", "length", "row", "position", "level", "kept_row"):
        setattr(call, name, getattr(blocks, name).data_ptr())
    for i, stage in enumerate(plan.stages):
        call.kept[i] = kept[i].data_ptr()
        call.chunk[i], call.keep_chunks[i] = stage.chunk, stage.keep_chunks
        call.query_step[i] = stage.query_stride
    kernels.hip_attention(ctypes.byref(call))
