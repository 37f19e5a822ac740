"""Residual rows that have left the device: of sessions whose place others have in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_plugins.attention_backends.zipcache.batch import LayerMemory
from vllm_plugins.attention_backends.zipcache.blocks import BlockLife


class AwayRows:
    """What such rows hold, on the host.

    Rows leave while sessions wait for a turn that could begin, which is rare: the step waits for
    the copies.
    """

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def step(self, life: BlockLife, layers: Sequence[LayerMemory]) -> None:
        """Move rows as a step wants them, after its blocks are sealed and before it writes.

        Args:
            life: The blocks, after `BlockLife.begin_step`.
            layers: Memory of all packed layers, always in one order.
        """
        for name, row in life.leaving.items():
            self._rows[name] = [
                (x.residual[row].to("cpu", copy=True), x.residual_sums[row].to("cpu", copy=True))
                for x in layers
            ]
        for name, row in life.returning.items():
            for x, (tokens, sums) in zip(layers, self._rows[name], strict=True):
                x.residual[row].copy_(tokens)
                x.residual_sums[row].copy_(sums)
        for name in self._rows.keys() - life.away:
            del self._rows[name]
