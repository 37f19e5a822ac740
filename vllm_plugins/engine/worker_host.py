"""The worker host: vLLM's own worker with plug-ins listening to its life.

It is the patch-free handle to what lives in a worker: the model, the KV cache and the attention
backends' metadata builders. Everything that differs between the two model runners (V1 and V2) is
known here and nowhere else. With no listener every method is the stock one and nothing more.

``--worker-cls`` is set to ``WORKER_HOST``. The name resolves to a class that is made on first use
from the platform's own worker, because which one that is can only be asked where vLLM runs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_plugins.engine.attention_host import plugin_attention
from vllm_plugins.engine.step_reports import with_reports
from vllm_plugins.errors import PluginError
from vllm_plugins.plugin import WorkerPlugin
from vllm_plugins.settings import enabled_plugins

if TYPE_CHECKING:
    import numpy as np
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.utils import AttentionGroup

    from vllm_plugins.engine.step_reports import Report

# Device types whose worker the host knows, as vLLM's platforms name it in their own defaults.
PLATFORM_WORKERS = {
    "cpu": "vllm.v1.worker.cpu_worker.CPUWorker",
    "cuda": "vllm.v1.worker.gpu_worker.Worker",
}
# How V2 names the requests that it makes up before it serves any, to compile kernels.
WARM_UP_IDS = ("_warmup_", "_v2_mixed_warmup_")


@dataclass(frozen=True)
class RunnerView:
    """What plug-ins see of a worker's model runner, the same for V1 and V2.

    Attributes:
        config: The engine's configuration.
        model: The loaded model.
        device: Where the model and the KV cache are.
        kv_cache_config: Groups of layers that share block tables, and the number of blocks.
        attention_groups: For each KV cache group its attention groups: a backend, the names of its
            layers and its metadata builders.
        runner: The model runner itself, for what the two kinds keep in different places.
    """

    config: VllmConfig
    model: torch.nn.Module
    device: torch.device
    kv_cache_config: KVCacheConfig
    attention_groups: list[list[AttentionGroup]]
    runner: Any

    def attention_layer(self, name: str) -> Any:
        """Return the attention module of a layer, which holds its ``kv_cache`` and ``impl``."""
        return self.config.compilation_config.static_forward_context[name]

    @property
    def draft_model(self) -> Any:
        """The model that drafts for this one, as it is without vLLM's wrappers for graphs."""
        return self.runner.get_draft_model()

    def media_spans(self, common: CommonAttentionMetadata) -> list[list[tuple[int, int]]]:
        """Return where each request of a step has embeddings of media items among its tokens.

        Args:
            common: The step's metadata.

        Returns:
            For each request, in the step's order, positions [start, end) of each item, ascending.
        """
        return [
            [(first, last + 1) for f in own for first, last in f.mm_position.extract_embeds_range()]
            for _, own in self.media_features(common)
        ]

    def media_features(self, common: CommonAttentionMetadata) -> list[tuple[int, Sequence[Any]]]:
        """Return each request's prompt length in tokens and its media items, in the step's order.

        Args:
            common: The step's metadata.
        """
        if self.config.use_v2_model_runner:
            assert common.req_idx is not None
            rows, states = common.req_idx.tolist(), self.runner.req_states
            held = self.runner.encoder_cache.mm_features
            names = map(states.index_to_req_id.get, rows)
            lengths = states.prompt_len.np
            return [
                (int(lengths[row]), held.get(name, ()))
                for row, name in zip(rows, names, strict=True)
            ]
        requests = map(self.runner.requests.__getitem__, self.runner.input_batch.req_ids)
        return [(request.num_prompt_tokens, request.mm_features) for request in requests]

    def prompt_lengths(self, common: CommonAttentionMetadata) -> np.ndarray:
        """Return the length of each request's prompt in tokens, in the step's order.

        Args:
            common: The step's metadata.

        Returns:
            int32, shape (requests,); without entries where a batch is a dummy.
        """
        if self.config.use_v2_model_runner:
            assert common.req_idx is not None
            return self.runner.req_states.prompt_len.np[common.req_idx]
        batch = self.runner.input_batch
        return batch.num_prompt_tokens[: batch.num_reqs]


def is_warm_up(output: SchedulerOutput) -> bool:
    """Return whether a step is of requests that V2 made up, and of no scheduler's.

    Args:
        output: What the step is told.
    """
    names = output.num_scheduled_tokens or output.finished_req_ids
    return bool(names) and all(name.startswith(WARM_UP_IDS) for name in names)


class WorkerListener:
    """What a plug-in does in a worker; every method may be left as it is."""

    def on_device_ready(self, device: torch.device) -> None:
        """Act once the device is initialised, before any memory is measured or taken."""

    def on_model_loaded(self, model: torch.nn.Module) -> None:
        """Act once the weights are loaded, before memory is profiled."""

    def on_kv_cache_ready(self, runner: RunnerView) -> None:
        """Act once the KV cache exists, before graphs are captured and requests arrive."""

    def around_execute_model(
        self, scheduler_output: SchedulerOutput
    ) -> AbstractContextManager[Any]:
        """Return a context that encloses one step of the model."""
        return nullcontext()

    def report(self) -> Report | None:
        """Begin to tell the plug-in's part in the scheduler of the step just run, if it is to know.

        Policies find it in `Step.reports`. Nothing here may wait for the device.
        """
        return None

    def shutdown(self) -> None:
        """Release what the listener holds; the worker ends."""


class WorkerHost:
    """Mixed in before a platform's worker class; its own attributes start with ``plugin_``."""

    model_runner: Any
    device: torch.device

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        self.plugin_config = vllm_config
        self.plugin_enabled = enabled_plugins(vllm_config)
        self.plugin_by_name: dict[str, WorkerListener] = {
            item.plugin.name: item.plugin.listener(item.options, vllm_config)
            for item in self.plugin_enabled
            if isinstance(item.plugin, WorkerPlugin)
        }
        self.plugin_listeners = list(self.plugin_by_name.values())

    def init_device(self) -> None:
        """Initialise the device with vLLM's own method."""
        super().init_device()  # type: ignore[misc]
        for listener in self.plugin_listeners:
            listener.on_device_ready(self.device)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model with vLLM's own method, its layers with a plug-in's attention."""
        with plugin_attention(self.plugin_enabled):
            super().load_model(*args, **kwargs)  # type: ignore[misc]
        for listener in self.plugin_listeners:
            listener.on_model_loaded(self.model_runner.get_model())

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        """Make the KV cache with vLLM's own method."""
        super().initialize_from_config(*args, **kwargs)  # type: ignore[misc]
        if self.plugin_listeners:
            view = self.plugin_view()
            for listener in self.plugin_listeners:
                listener.on_kv_cache_ready(view)

    def plugin_view(self) -> RunnerView:
        """Return the view of this worker's runner; the KV cache must exist."""
        runner = self.model_runner
        return RunnerView(
            self.plugin_config,
            runner.get_model(),
            self.device,
            runner.kv_cache_config,
            runner.attn_groups,
            runner,
        )

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Run one step with vLLM's own method, inside the listeners' contexts."""
        if not self.plugin_listeners:
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        with self._plugin_around(scheduler_output):
            return super().execute_model(scheduler_output)  # type: ignore[misc]

    @contextmanager
    def _plugin_around(self, scheduler_output: SchedulerOutput) -> Iterator[None]:
        with ExitStack() as stack:
            for listener in self.plugin_listeners:
                stack.enter_context(listener.around_execute_model(scheduler_output))
            yield

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Draw a step's tokens with vLLM's own method; the listeners' reports go with them."""
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        told = ((name, listener.report()) for name, listener in self.plugin_by_name.items())
        return with_reports(output, {name: report for name, report in told if report is not None})

    def shutdown(self) -> None:
        """Let the listeners release what they hold, then shut the worker down."""
        for listener in self.plugin_listeners:
            listener.shutdown()
        super().shutdown()  # type: ignore[misc]


@functools.cache
def _host_class(worker: type[Any]) -> type[Any]:
    return type("PluginWorker", (WorkerHost, worker), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """Make ``PluginWorker`` from the platform's worker, the first time somebody asks for it."""
    if name != "PluginWorker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    device = current_platform.device_type
    if device not in PLATFORM_WORKERS:
        raise PluginError(
            "--worker-cls", f"plug-ins have no worker for '{device}'", "use a CPU or CUDA build"
        )
    return _host_class(resolve_obj_by_qualname(PLATFORM_WORKERS[device]))
