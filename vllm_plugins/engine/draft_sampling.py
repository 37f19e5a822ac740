"""Verifying drafts at a temperature on CPU, where vLLM 0.32 does so with arbitrary temperatures.

Each draft is verified with its request's temperature, top-k and top-p, which a kernel repeats for
every draft. vLLM's implementation for CPU repeats them into a converted copy of its output unless
that is int64, so what is used is memory that nothing has written. Answers then do not have the
target's distribution, by any way of drafting. Greedy requests are not affected.
"""

from __future__ import annotations

from typing import Any

import torch

KERNEL = "vllm.v1.sample.rejection_sampler.expand_kernel"


def repair_draft_sampling() -> bool:
    """Register a kernel that is right where the registered one is not; return whether it did so.

    vLLM's own registry of platform kernels is used, in this process alone. Where Triton runs on the
    CPU nothing is registered, and its kernel is right.
    """
    from vllm.triton_utils import HAS_TRITON
    from vllm.triton_utils.dispatcher import register_kernels
    from vllm.v1.sample.rejection_sampler import expand_kernel

    if HAS_TRITON or _writes_its_output(expand_kernel):
        return False
    register_kernels({KERNEL: repeat_for_drafts})
    return True


def _writes_its_output(kernel: Any) -> bool:
    values, ends = torch.tensor([0.5, 2.0]), torch.tensor([1, 3], dtype=torch.int32)
    output = torch.full((3,), -1.0)
    kernel(output, values, ends, 0, 0)
    return output.tolist() == [0.5, 2.0, 2.0]


def repeat_for_drafts(
    output: torch.Tensor,
    values: torch.Tensor,
    ends: torch.Tensor,
    replace_from: float,
    replace_to: float,
    longest: int | None = None,
) -> None:
    """Repeat each request's value for each of its drafts, with one value exchanged for another.

    Args:
        output: Of any type, shape (drafts,); written.
        values: Of the same type, shape (requests,).
        ends: Number of drafts up to and including each request's, int, shape (requests,).
        replace_from: Value to exchange.
        replace_to: What for.
        longest: Most drafts of a request, which this implementation does not need.
    """
    counts = ends.diff(prepend=ends.new_zeros(1))
    exchanged = values.masked_fill(values == replace_from, replace_to)
    output.copy_(exchanged.repeat_interleave(counts))
