"""Counts what batches do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_plugins.attention_backends.hip import metrics
from vllm_plugins.attention_backends.hip.query_blocks import DENSE, QueryBlocks
from vllm_plugins.attention_backends.hip.worker import sparse_layers
from vllm_plugins.metrics import ACTIVE, Metrics, engine_labels

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class BatchMeter:
    """Counts what batches do, once in an engine: its ranks and groups of layers all do the same.

    The last of pipeline stages counts, since the first layers are the ones that are dense by
    default. A stage without sparse layers has nothing to count.

    Args:
        config: The engine's configuration.
        layers: Names of the layers whose batches these are.
    """

    def __init__(self, config: VllmConfig, layers: Sequence[str]) -> None:
        from vllm.distributed import get_pp_group, get_tp_group

        self._metrics: Metrics | None = None
        is_counting_rank = get_tp_group().is_first_rank and get_pp_group().is_last_rank
        if is_counting_rank and sparse_layers(config)[0] in layers:
            self._metrics = Metrics([ACTIVE, *metrics.ALL], engine_labels(config))
            self._metrics.set(ACTIVE.name, 1, "hip")
            for spec in (metrics.DECODES, metrics.PREFILLS):
                for kind in ("sparse", "dense"):
                    self._metrics.inc(spec.name, 0, kind)

    def count(self, decodes: QueryBlocks, prompts: QueryBlocks, num_stages: int) -> None:
        """Count one batch.

        Args:
            decodes: Query blocks of decodes, on the host.
            prompts: Those of prompts.
            num_stages: The level at which no stage runs.
        """
        counters = self._metrics
        if counters is None:
            return
        for spec, blocks in ((metrics.DECODES, decodes), (metrics.PREFILLS, prompts)):
            dense = blocks.level == DENSE
            for kind, chosen in (("dense", dense), ("sparse", ~dense)):
                queries = int(blocks.length[chosen].sum())
                if queries:
                    counters.inc(spec.name, queries, kind)
        sparse = decodes.level != DENSE
        levels = decodes.level[sparse].bincount(minlength=num_stages + 1).tolist()
        for stage, count in enumerate(levels[:num_stages]):
            if count:
                counters.inc(metrics.REFRESHES.name, count, str(stage))
        counters.inc(metrics.REUSED.name, levels[num_stages])
        counters.inc(metrics.CONTEXT.name, int((decodes.position + 1)[sparse].sum()))
