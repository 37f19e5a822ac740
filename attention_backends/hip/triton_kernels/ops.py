"""HiP's kernels as operators of torch.

| operator | does |
| --- | --- |
| `vllm_plugins::hip_select` | the pruning stages that are due; writes the lists of survivors |
| `vllm_plugins::hip_decode` | attention of few queries of each request; writes ``out`` |
| `vllm_plugins::hip_prefill` | attention of prompts' query blocks; writes ``out`` |

None waits for the device, and no grid depends on what is there. The functions here call them with
plans; operators take a plan's numbers.
"""

import functools
from collections.abc import Sequence

import torch

from vllm_plugins.attention_backends.hip.plan import LayerPlan, Stage
from vllm_plugins.attention_backends.hip.triton_kernels import decode, keep, prefill
from vllm_plugins.attention_backends.hip.triton_kernels.blocks import Batch

_LIBRARY = torch.library.Library("vllm_plugins", "FRAGMENT")
_BATCH = "Tensor query, Tensor keys, Tensor block_table, Tensor blocks, int queries"
_ATTEND = "Tensor values, Tensor selected, int chunk, int sink, int window, float scale"


def hip_select(batch: Batch, plan: LayerPlan, overlap: int, lists: Sequence[torch.Tensor]) -> None:
    """Run the stages that are due; arguments are those of `keep.select`."""
    torch.ops.vllm_plugins.hip_select(
        batch.query, batch.keys, batch.block_table, batch.blocks, batch.queries, batch.max_len,
        lists, [x.chunk for x in plan.stages], [x.query_stride for x in plan.stages], plan.sink,
        plan.window, overlap, plan.centre,
    )  # fmt: skip


def hip_decode(
    batch: Batch,
    values: torch.Tensor,
    selected: torch.Tensor,
    plan: LayerPlan,
    scale: float,
    dense_len: int,
    out: torch.Tensor,
) -> None:
    """Attend with few queries; arguments are those of `decode.decode`."""
    torch.ops.vllm_plugins.hip_decode(
        batch.query, batch.keys, batch.block_table, batch.blocks, batch.queries, values, selected,
        plan.stages[-1].chunk, plan.sink, plan.window, scale, dense_len, out,
    )  # fmt: skip


def hip_prefill(
    batch: Batch,
    values: torch.Tensor,
    selected: torch.Tensor,
    plan: LayerPlan,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attend with a prompt's queries; arguments are those of `prefill.prefill`."""
    torch.ops.vllm_plugins.hip_prefill(
        batch.query, batch.keys, batch.block_table, batch.blocks, batch.queries, values, selected,
        plan.stages[-1].chunk, plan.sink, plan.window, scale, out,
    )  # fmt: skip


@functools.cache
def _plan(
    chunks: tuple[int, ...],
    keeps: tuple[int, ...],
    strides: tuple[int, ...],
    sink: int,
    window: int,
    centre: bool,
) -> LayerPlan:
    stages = (Stage(c, c * k, s) for c, k, s in zip(chunks, keeps, strides, strict=True))
    # The overlap is another argument of kernels: nothing of a prompt is kept.
    return LayerPlan(sink, window, 0, tuple(stages), centre)


def _select(
    query: torch.Tensor,
    keys: torch.Tensor,
    block_table: torch.Tensor,
    blocks: torch.Tensor,
    queries: int,
    max_len: int,
    lists: list[torch.Tensor],
    chunks: list[int],
    strides: list[int],
    sink: int,
    window: int,
    overlap: int,
    centre: bool,
) -> None:
    keeps = tuple(x.shape[1] for x in lists)
    plan = _plan(tuple(chunks), keeps, tuple(strides), sink, window, centre)
    batch = Batch(query, keys, block_table, blocks, queries, max_len)
    keep.select(batch, plan, overlap, lists)


def _decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    block_table: torch.Tensor,
    blocks: torch.Tensor,
    queries: int,
    values: torch.Tensor,
    selected: torch.Tensor,
    chunk: int,
    sink: int,
    window: int,
    scale: float,
    dense_len: int,
    out: torch.Tensor,
) -> None:
    plan = _plan((chunk,), (selected.shape[1],), (1,), sink, window, True)
    batch = Batch(query, keys, block_table, blocks, queries)
    decode.decode(batch, values, selected, plan, scale, dense_len, out)


def _prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    block_table: torch.Tensor,
    blocks: torch.Tensor,
    queries: int,
    values: torch.Tensor,
    selected: torch.Tensor,
    chunk: int,
    sink: int,
    window: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    plan = _plan((chunk,), (selected.shape[1],), (1,), sink, window, True)
    batch = Batch(query, keys, block_table, blocks, queries)
    prefill.prefill(batch, values, selected, plan, scale, out)


def _nothing(*_: object) -> None:
    """Stand in for an operator where shapes alone are asked for: none returns a tensor."""


for _name, _arguments, _run in (
    (
        "hip_select",
        f"{_BATCH}, int max_len, Tensor(a!)[] lists, int[] chunks, int[] strides, int sink, "
        "int window, int overlap, bool centre",
        _select,
    ),
    ("hip_decode", f"{_BATCH}, {_ATTEND}, int dense_len, Tensor(a!) out", _decode),
    ("hip_prefill", f"{_BATCH}, {_ATTEND}, Tensor(a!) out", _prefill),
):
    _LIBRARY.define(f"{_name}({_arguments}) -> ()")
    # On CPU there is Triton's interpreter.
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vllm_plugins::{_name}", _nothing, lib=_LIBRARY)
