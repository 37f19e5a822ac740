"""SpecVLM's part in a worker: connects the drafter with the KV cache, and counts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_plugins.engine.draft_sampling import KERNEL, repair_draft_sampling
from vllm_plugins.engine.worker_host import WorkerListener
from vllm_plugins.spec_decode.specvlm.draft_rows import plan_image
from vllm_plugins.spec_decode.specvlm.metrics import DraftMeter

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_plugins.engine.worker_host import RunnerView
    from vllm_plugins.spec_decode.specvlm.model import SpecVlmModel
    from vllm_plugins.spec_decode.specvlm.plugin import SpecVlmOptions

logger = init_logger("vllm.vllm_plugins.specvlm")


class SpecVlmListener(WorkerListener):
    """Connects the drafter with the worker.

    Args:
        options: The plug-in's options.
        config: The engine's configuration.
    """

    def __init__(self, options: SpecVlmOptions, config: VllmConfig) -> None:
        self._options = options
        self._config = config
        self._drafter: SpecVlmModel | None = None
        self._meter: DraftMeter | None = None

    def on_device_ready(self, device: torch.device) -> None:
        """Make drafts verified at the right temperature on CPU."""
        if device.type == "cpu" and repair_draft_sampling():
            logger.info("vllm-plugins: specvlm replaces vLLM's CPU kernel %s", KERNEL)

    def on_kv_cache_ready(self, runner: RunnerView) -> None:
        """Give the drafter the view of the worker."""
        drafter = runner.draft_model
        drafter.on_kv_cache_ready(runner)
        self._drafter = drafter.model
        self._meter = DraftMeter(self._config, drafter.model.tally)
        settings = drafter.model.settings
        length = settings.grid[0] * settings.grid[1]
        logger.info(
            "vllm-plugins: specvlm is on (speculative decoding): %d drafts a round, up to %s "
            "requests; mode %s; the drafter sees about %d of an image's %d rows, more where whole "
            "blocks ask for it; %s",
            self._options.num_speculative_tokens,
            self._options.draft_until_batch or "any number of",
            settings.mode,
            plan_image(settings, (0, length), 1).kept,
            length,
            settings.model_dump(mode="json"),
        )

    def around_execute_model(
        self, scheduler_output: SchedulerOutput
    ) -> AbstractContextManager[Any]:
        """Publish what earlier steps have counted; say whether this one drafts."""
        if self._drafter is not None:
            self._drafter.is_drafting = scheduler_output.num_spec_tokens_to_schedule > 0
        if self._meter is not None:
            self._meter.step()
        return nullcontext()
