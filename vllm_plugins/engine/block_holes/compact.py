"""Running layers on the rows of a step that are left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context

from vllm_plugins.engine.block_holes.plan import Hole, StepPlan, plan_step

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_plugins.engine.block_holes.plan import Span
    from vllm_plugins.engine.block_holes.view import HoleView


def plan_current_step(
    view: HoleView, layer: str, plan_span: Callable[[Span, int], Hole]
) -> StepPlan | None:
    """Plan the step whose forward pass is running; None if all of its rows go on.

    Args:
        view: The layers that see holes.
        layer: Name of the attention of one of them.
        plan_span: Plans the hole of a span, given a block's size in tokens.
    """
    context = get_forward_context()
    # Without metadata, memory is being profiled or a graph without attention is captured.
    if not isinstance(context.attn_metadata, dict) or layer not in context.attn_metadata:
        return None
    builder = view.builder_of(layer)
    common = builder.hole_step
    if common is None or common.max_query_len == 1 or builder.hole_flags is None:
        return None
    assert view.spans is not None
    spans = view.spans(common)
    if not any(spans):
        return None
    size = builder.kv_cache_spec.block_size
    starts = common.query_start_loc_cpu.numpy()[: len(spans) + 1]
    # Exact for every request that still has prompt to compute, and only those have media rows.
    ends = common.seq_lens_cpu_upper_bound.numpy()[: len(spans)]
    holes = [[plan_span(span, size) for span in of_request] for of_request in spans]
    return plan_step(holes, np.asarray(starts), np.asarray(ends))


@contextmanager
def compact_rows(view: HoleView, layers: Sequence[str], plan: StepPlan) -> Iterator[None]:
    """Let layers that run meanwhile take the rows of a plan, and hide its holes from then on.

    Args:
        view: The layers that see holes.
        layers: Names of their attentions.
        plan: Of the step whose forward pass is running.
    """
    context = get_forward_context()
    metadata, slots = dict(context.attn_metadata), dict(context.slot_mapping)
    for builder in {id(found): found for found in map(view.builder_of, layers)}.values():
        own = [name for name in layers if name in builder.layer_names]
        built, slots_of_rows = builder.hole_hide(plan)
        metadata.update(dict.fromkeys(own, built))
        slots.update(dict.fromkeys(own, slots_of_rows))
    before = context.attn_metadata, context.slot_mapping, context.cudagraph_runtime_mode
    context.attn_metadata, context.slot_mapping = metadata, slots
    # Graphs were captured for other numbers of rows.
    context.cudagraph_runtime_mode = CUDAGraphMode.NONE
    try:
        yield
    finally:
        context.attn_metadata, context.slot_mapping, context.cudagraph_runtime_mode = before
