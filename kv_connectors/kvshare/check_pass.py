"""The check layer, of which most tokens need no more than their keys and values.

What a token's deviation is measured by, and what later tokens attend to there, comes before the
layer's attention. Only the tokens that are chosen then go through the rest of the layer: LMCache's
CacheBlend likewise chooses before the check layer's attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_plugins.engine.partial_forward import PartialForward, slot_mapping

if TYPE_CHECKING:
    from vllm_plugins.engine.kv_pages import KVPages
    from vllm_plugins.engine.partial_forward import Rows


class _AttentionReached(Exception):  # noqa: N818 - no error, but the end of what is wanted
    """Ends a layer where its attention would begin.

    Args:
        inputs: Queries, keys and values, as attention would get them: (rows, heads * head size).
    """

    def __init__(self, inputs: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.inputs = inputs


def _stop(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    raise _AttentionReached(inputs)


class CheckForward(PartialForward):
    """A partial forward that can also end where a layer's attention begins."""

    @torch.inference_mode()
    def write_keys_values(self, rows: Rows, layer: int, pages: KVPages) -> None:
        """Compute one layer's keys and values of one request's rows into the cache.

        The rows keep their hidden states, which are those before the layer.

        Args:
            rows: No more than one pass holds.
            layer: The layer.
            pages: The paged cache.

        Raises:
            RuntimeError: The layer has no attention.
        """
        keys, values = self._keys_values(rows, layer)
        slots = slot_mapping(rows.block_ids, rows.positions, pages.block_size)
        shape = (len(rows.positions), pages.num_heads, pages.head_size)
        pages.write(layer, keys.view(shape), values.view(shape), self._tensor(slots))

    def _keys_values(self, rows: Rows, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        module = self._stack.layers[layer]
        hook = module.self_attn.attn.register_forward_pre_hook(_stop)
        try:
            module(self._positions([rows]), *self._inputs([rows]))
        except _AttentionReached as reached:
            _, keys, values = reached.inputs
            return keys, values
        finally:
            hook.remove()
        raise RuntimeError(f"layer {layer} did not call its attention")
