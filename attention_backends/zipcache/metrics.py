"""Metrics of ZipCache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_plugins.attention_backends.zipcache.blocks import REASONS
from vllm_plugins.metrics import ACTIVE, Metrics, MetricSpec, engine_labels

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_plugins.attention_backends.zipcache.blocks import BlockLife

SEALED = MetricSpec(
    "zipcache_sealed_blocks_total",
    "counter",
    "Blocks whose tokens got their bits, by why then: prompt (it was read to its end), decode (a "
    "generated token filled the block), ended (the request did) or pressure (staging was full).",
    (),
    "reason",
)
STAGED = MetricSpec(
    "zipcache_staged_blocks", "gauge", "Filled blocks at four bits that wait for their scores."
)
TOKEN_BYTES = MetricSpec(
    "zipcache_token_bytes",
    "gauge",
    "Bytes of the cache that a token takes, in all layers of one rank.",
)

ALL = (SEALED, STAGED, TOKEN_BYTES)


class BlockMeter:
    """Counts what becomes of blocks, once in an engine: its ranks all do the same.

    Args:
        config: The engine's configuration.
    """

    def __init__(self, config: VllmConfig) -> None:
        from vllm.distributed import get_pp_group, get_tp_group

        self._metrics: Metrics | None = None
        # Values of an engine's processes are added up.
        if get_tp_group().is_first_rank and get_pp_group().is_first_rank:
            self._metrics = Metrics([ACTIVE, *ALL], engine_labels(config))
            self._metrics.set(ACTIVE.name, 1, "zipcache")
            for reason in REASONS:
                self._metrics.inc(SEALED.name, 0, reason)
        self._before = dict.fromkeys(REASONS, 0)

    def set_token_bytes(self, count: int) -> None:
        """Say what a token takes, in bytes."""
        if self._metrics is not None:
            self._metrics.set(TOKEN_BYTES.name, count)

    def step(self, life: BlockLife, is_counting: bool = True) -> None:
        """Count what a step has sealed.

        Args:
            life: The blocks.
            is_counting: Whether the step is of requests, and not one to warm up.
        """
        if self._metrics is None:
            return
        self._metrics.set(STAGED.name, life.num_staged)
        for reason, count in life.sealed.items():
            if count != self._before[reason]:
                if is_counting:
                    self._metrics.inc(SEALED.name, count - self._before[reason], reason)
                self._before[reason] = count
