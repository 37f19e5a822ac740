"""The compiled CPU kernels (``csrc/``): writing a batch, attending to packed pages, sealing blocks.

Where none were built, `torch_kernels` does the same, more slowly.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from vllm_plugins.attention_backends.zipcache.batch import Batch, LayerMemory, Seals
from vllm_plugins.engine.cpu_library import load_cpu_library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class _Layer(ctypes.Structure):
    """``zipcache::Layer`` of ``csrc/call.h``, field by field."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "cache"),
        *_fields(ctypes.c_int64, "block_stride", "head_stride"),
        *_fields(ctypes.c_void_p, "residual", "residual_sums", "staging", "staging_sums"),
        *_fields(ctypes.c_int32, "kv_heads", "head_size", "block_size", "k_salient", "v_salient"),
        *_fields(ctypes.c_int32, "scale_values", "dtype"),
    )


class _Batch(ctypes.Structure):
    """``zipcache::Batch``, field by field."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "query", "key", "value", "out"),
        *_fields(ctypes.c_int64, "query_stride", "key_stride", "value_stride", "out_stride"),
        *_fields(ctypes.c_void_p, "lse", "block_table"),
        *_fields(ctypes.c_int64, "table_stride"),
        *_fields(ctypes.c_void_p, "state", "start", "length", "position", "residual_row"),
        *_fields(ctypes.c_void_p, "score_from", "reset", "probe_start", "probe"),
        *_fields(ctypes.c_int32, "num_rows", "heads"),
        *_fields(ctypes.c_float, "scale"),
    )


class _Seals(ctypes.Structure):
    """``zipcache::Seals``, field by field."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "block", "source", "forced", "weight"),
        *_fields(ctypes.c_int32, "num_blocks"),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the kernels for this machine's instructions, or None where none were built."""
    package = __name__.rpartition(".")[0]
    size = sum(ctypes.sizeof(x) for x in (_Layer, _Batch, _Seals))
    kernels = load_cpu_library(package, "zipcache_call_size", size)
    if kernels is None:
        return None
    for function, second in (("write", _Batch), ("attend", _Batch), ("seal", _Seals)):
        call = getattr(kernels, f"zipcache_{function}")
        call.argtypes = [ctypes.POINTER(_Layer), ctypes.POINTER(second)]
        call.restype = None
    kernels.zipcache_page_size.argtypes = [ctypes.POINTER(_Layer)]
    kernels.zipcache_page_size.restype = ctypes.c_int64
    return kernels


def page_size(layer: LayerMemory) -> int:
    """Return the bytes in use of a page, as the kernels count them."""
    kernels = library()
    assert kernels is not None
    return int(kernels.zipcache_page_size(ctypes.byref(_layer(layer))))


def write(layer: LayerMemory, key: torch.Tensor, value: torch.Tensor, batch: Batch) -> None:
    """Write a batch's keys and values where their blocks' states say.

    Args:
        layer: The layer's memory.
        key: Shape (tokens, kv heads, head size), the last two axes contiguous, in the model's
            dtype.
        value: As ``key``.
        batch: The batch.
    """
    kernels = library()
    assert kernels is not None
    call = _batch(batch, key, value)
    kernels.zipcache_write(ctypes.byref(_layer(layer)), ctypes.byref(call))


def attend(
    layer: LayerMemory,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    batch: Batch,
    scale: float,
) -> None:
    """Attend, and add the probes' attention to the sums of their requests' blocks.

    The batch's own keys and values are read as they came, everything before from the cache.

    Args:
        layer: The layer's memory, after `write` of the batch.
        query: Shape (tokens, heads, head size).
        key: As `write` takes it.
        value: As ``key``.
        out: Of the shape of ``query``, its last two axes contiguous; the rows of the batch's tokens
            are written.
        batch: The batch.
        scale: Of the scores.
    """
    kernels = library()
    assert kernels is not None
    call = _batch(batch, key, value)
    if query.stride()[1:] != (query.shape[2], 1):
        # Heads that a model has cut out of wider ones.
        query = query.contiguous()
    lse = torch.empty(query.shape[:2], dtype=torch.float32)
    call.query, call.query_stride = query.data_ptr(), query.stride(0)
    call.out, call.out_stride = out.data_ptr(), out.stride(0)
    call.lse, call.heads, call.scale = lse.data_ptr(), query.shape[1], scale
    kernels.zipcache_attend(ctypes.byref(_layer(layer)), ctypes.byref(call))


def seal(layer: LayerMemory, seals: Seals) -> None:
    """Apply blocks' quotas.

    Args:
        layer: The layer's memory.
        seals: The blocks.
    """
    kernels = library()
    assert kernels is not None
    call = _Seals(num_blocks=len(seals.block))
    for name in ("block", "source", "forced", "weight"):
        setattr(call, name, getattr(seals, name).data_ptr())
    kernels.zipcache_seal(ctypes.byref(_layer(layer)), ctypes.byref(call))


def _layer(layer: LayerMemory) -> _Layer:
    page = layer.page
    return _Layer(
        cache=layer.cache.data_ptr(),
        block_stride=layer.cache.stride(0),
        head_stride=layer.cache.stride(1),
        residual=layer.residual.data_ptr(),
        residual_sums=layer.residual_sums.data_ptr(),
        staging=layer.staging.data_ptr(),
        staging_sums=layer.staging_sums.data_ptr(),
        kv_heads=layer.residual.shape[1],
        head_size=page.head_size,
        block_size=page.block_size,
        k_salient=page.k_salient,
        v_salient=page.v_salient,
        scale_values=layer.scaled,
        dtype=DTYPES[layer.residual.dtype],
    )


def _batch(batch: Batch, key: torch.Tensor, value: torch.Tensor) -> _Batch:
    assert key.stride(1) == value.stride(1) == key.shape[2], "heads must be contiguous"
    call = _Batch(
        key=key.data_ptr(),
        value=value.data_ptr(),
        key_stride=key.stride(0),
        value_stride=value.stride(0),
        table_stride=batch.block_table.stride(0),
        num_rows=len(batch.start),
    )
    for name in ("block_table", "state", "start", "length", "position", "residual_row",
                 "score_from", "reset", "probe_start", "probe"):  # fmt: skip
        setattr(call, name, getattr(batch, name).data_ptr())
    return call
