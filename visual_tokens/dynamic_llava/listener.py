"""Dynamic-LLaVA's part in a worker: hands the KV cache to the model and counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_plugins.engine.worker_host import WorkerListener
from vllm_plugins.visual_tokens.dynamic_llava.metrics import Meter

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_plugins.engine.step_reports import Report
    from vllm_plugins.engine.worker_host import RunnerView
    from vllm_plugins.visual_tokens.dynamic_llava.plugin import Pruning

MUCH_MORE = 1.1
"""Times the wanted tokens from which rounding to blocks is worth a warning."""

logger = init_logger("vllm.vllm_plugins.dynamic_llava")


class DynamicLlavaListener(WorkerListener):
    """Gives the model's layers their view of the KV cache.

    Args:
        pruning: What is dropped.
        config: The engine's configuration.
    """

    def __init__(self, pruning: Pruning, config: VllmConfig) -> None:
        self._pruning = pruning
        self._config = config
        self._model: Any = None
        self._meter: Meter | None = None

    def on_model_loaded(self, model: torch.nn.Module) -> None:
        """Remember the model, whose class is the plug-in's."""
        self._model = model
        logger.info("vllm-plugins: dynamic_llava is on (model): %s", self._pruning)
        if not (self._pruning.drops or self._pruning.text):
            logger.warning("vllm-plugins: dynamic_llava drops nothing: image_keep_rate is 1")

    def on_kv_cache_ready(self, runner: RunnerView) -> None:
        """Let the upper layers see holes."""
        self._meter = Meter(self._config)
        if self._pruning.drops or self._pruning.text:
            self._model.on_kv_cache_ready(runner)
        if self._pruning.drops:
            self._warn_of_rounding()

    def _warn_of_rounding(self) -> None:
        """Say once how far blocks are from the wanted tokens, for an image behind a short text."""
        block_size = self._config.cache_config.block_size
        tokens = _image_tokens(self._config.model_config.hf_config)
        wanted = int(tokens * self._pruning.keep_rate)
        spans = ((start, start + tokens) for start in range(block_size))
        kept = max(self._pruning.plan_span(span, block_size).kept for span in spans)
        if kept > MUCH_MORE * wanted:
            logger.warning(
                "vllm-plugins: dynamic_llava keeps up to %d of an image's %d tokens where %d are "
                "asked for, because only whole blocks of %d tokens can be left out",
                kept, tokens, wanted, block_size,
            )  # fmt: skip

    @contextmanager
    def _counting(self) -> Iterator[None]:
        yield
        if self._meter is not None:
            self._meter.write(self._model.tally)

    def around_execute_model(
        self, scheduler_output: SchedulerOutput
    ) -> AbstractContextManager[Any]:
        """Count what a step drops."""
        return self._counting()

    def report(self) -> Report | None:
        """Tell the manager of the upper layers' blocks how many answer tokens are forgotten."""
        if not (self._pruning.frees and self._pruning.text):
            return None
        report: Report | None = self._model.text_cache.report()
        return report


def _image_tokens(config: Any) -> int:
    """Return how many tokens an image has."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return int(side * side) + int(config.vision_feature_select_strategy == "full")
