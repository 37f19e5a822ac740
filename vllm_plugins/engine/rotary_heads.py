"""Rotary embedding of queries and keys by head on CPU, which vLLM 0.32's kernel rotates wrongly.

LFM2's attention hands its queries and keys over as (tokens, heads, head size). The kernel for CPU
is right for (tokens, heads * head size) alone: of the former it rotates other numbers, so that all
tokens but a prompt's first are wrong, and depend on what else is in the batch. Models that hand two
dimensions over are not affected, nor are other devices.
"""

from __future__ import annotations

import torch

# Of the probe; the kernel's vectors are shorter than its head.
TOKENS, HEADS, HEAD_SIZE = 3, 2, 64


def repair_rotary_embedding() -> bool:
    """Register an embedding that is right where the kernel is not; return whether it did so.

    vLLM's own registry of out-of-tree layers is used, in this process alone, and on CPU alone. It
    has to happen before a model is made.
    """
    from vllm.model_executor.custom_op import CustomOp, op_registry_oot
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or RotaryEmbedding.__name__ in op_registry_oot:
        return False
    current_platform.import_kernels()
    if _rotates_by_head():
        return False

    class FlatRotaryEmbedding(RotaryEmbedding):
        """Rotates queries and keys as rows of all heads, whatever form they come in."""

        # For those who tell embeddings apart by their class: the rotation is the same.
        stands_in_for = RotaryEmbedding

        def forward_cpu(
            self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            """Return queries and keys of the forms given, rotated; those given may be overwritten.

            Args:
                positions: Of tokens, shape (tokens,).
                query: Shape (tokens, heads, head size) or (tokens, heads * head size).
                key: Likewise, or None.
            """
            flat = key if key is None else key.flatten(1)
            rotated, rotated_key = super().forward_cpu(positions, query.flatten(1), flat)
            if key is not None and rotated_key is not None:
                rotated_key = rotated_key.view(key.shape)
            return rotated.view(query.shape), rotated_key

    name = RotaryEmbedding.name
    CustomOp.register_oot(FlatRotaryEmbedding, name=RotaryEmbedding.__name__)
    # Under which it is switched on and off.
    FlatRotaryEmbedding.name = name
    return True


def _rotates_by_head() -> bool:
    from vllm._custom_ops import rotary_embedding

    numbers = torch.Generator().manual_seed(0)
    rows = torch.randn(TOKENS, HEADS * HEAD_SIZE, generator=numbers)
    angles = torch.randn(TOKENS, HEAD_SIZE, generator=numbers)
    by_head, by_row = rows.view(TOKENS, HEADS, HEAD_SIZE).clone(), rows.clone()
    for query in (by_head, by_row):
        rotary_embedding(torch.arange(TOKENS), query, query.clone(), HEAD_SIZE, angles, True)
    return torch.equal(by_head.flatten(1), by_row)
