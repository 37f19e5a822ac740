"""HiP's part in a worker: gives each attention layer its plan, before memory is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_plugins.engine.attention_host import attention_layers
from vllm_plugins.engine.worker_host import WorkerListener, is_warm_up
from vllm_plugins.errors import PluginError
from vllm_plugins.settings import enabled_plugins

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_plugins.attention_backends.hip.plan import LayerPlan
    from vllm_plugins.attention_backends.hip.plugin import HipOptions
    from vllm_plugins.engine.worker_host import RunnerView

logger = init_logger("vllm.vllm_plugins.hip")


class SparseLayer(ABC):
    """What the implementations of attention layers have in common on all platforms.

    Attributes:
        plan: What the layer prunes, None where it is dense.
    """

    plan: LayerPlan | None

    @abstractmethod
    def make_sparse(self, plan: LayerPlan, max_num_seqs: int) -> None:
        """Attend sparsely from now on, and take the memory for it.

        Args:
            plan: What the layer prunes.
            max_num_seqs: Most requests of a batch.
        """

    def warm_up(self, kv_cache: torch.Tensor, max_len: int, phases: str) -> None:
        """Compile what is compiled on first use.

        Args:
            kv_cache: The layer's.
            max_len: Longest sequence.
            phases: Which of them are sparse, as of the options.
        """
        return


class SparseBuilder:
    """What the builders of batches have in common on all platforms.

    Attributes:
        is_counting: Whether batches are steps of requests, and not what is run to measure memory,
            to capture graphs or to warm up.
    """

    is_counting: bool


def hip_options(config: VllmConfig) -> HipOptions:
    """Return the options of the plug-in in an engine where it is on."""
    found = next(item for item in enabled_plugins(config) if item.plugin.name == "hip")
    return cast("HipOptions", found.options)


def sparse_layers(config: VllmConfig) -> list[str]:
    """Return the names of a worker's layers that were made sparse, in the model's order."""
    layers = attention_layers(config, SparseLayer)
    return [name for name, layer in layers.items() if layer.impl.plan is not None]


class HipListener(WorkerListener):
    """Gives each layer its plan once the model is loaded.

    Args:
        options: The plug-in's options.
        config: The engine's configuration.
    """

    def __init__(self, options: HipOptions, config: VllmConfig) -> None:
        self._options = options
        self._config = config
        self._builders: list[SparseBuilder] = []

    def on_kv_cache_ready(self, runner: RunnerView) -> None:
        """Compile the layers' kernels, and find the builders, which count batches."""
        longest = self._config.model_config.max_model_len
        for name in sparse_layers(self._config):
            layer = runner.attention_layer(name)
            layer.impl.warm_up(layer.kv_cache, longest, self._options.phases)
        groups = (group for groups in runner.attention_groups for group in groups)
        builders = (builder for group in groups for builder in group.metadata_builders)
        self._builders = [x for x in builders if isinstance(x, SparseBuilder)]

    @contextmanager
    def around_execute_model(self, scheduler_output: SchedulerOutput) -> Iterator[None]:
        """Let a step's batches be counted, if the step is of requests."""
        counting = not is_warm_up(scheduler_output)
        for builder in self._builders:
            builder.is_counting = counting
        try:
            yield
        finally:
            for builder in self._builders:
                builder.is_counting = False

    def on_model_loaded(self, model: torch.nn.Module) -> None:
        """Make layers sparse and take the memory for what they keep.

        Raises:
            PluginError: A layer's attention is of a kind that HiP does not compute.
        """
        config, options = self._config, self._options
        num_layers = config.model_config.get_total_num_hidden_layers()
        rows = config.scheduler_config.max_num_seqs
        sparse, dense = [], []
        layers = attention_layers(config, SparseLayer)
        readers = {layer.impl.kv_sharing_target_layer_name: name for name, layer in layers.items()}
        # A drafter's layers stay dense, whatever numbers they have.
        own = set(model.modules())
        for name, layer in layers.items():
            index = extract_layer_index(name)
            plan = options.plan(index, num_layers) if layer in own else None
            if plan is None or not _is_full(layer, config):
                dense.append(index)
                continue
            _check_layer(name, layer.impl, readers.get(name))
            layer.impl.make_sparse(plan, rows)
            sparse.append(index)
        logger.info(
            "vllm-plugins: hip is on (attention backend): layers %s sparse, %s dense; %s",
            sparse, dense, options.model_dump(),
        )  # fmt: skip
        if not sparse:
            logger.warning("vllm-plugins: hip does nothing here: all layers are dense")
        elif options.dense_threshold >= config.model_config.max_model_len:
            logger.warning(
                "vllm-plugins: hip does nothing: no sequence exceeds dense_threshold=%d",
                options.dense_threshold,
            )


def _is_full(layer: Any, config: VllmConfig) -> bool:
    """Whether a layer attends to the whole sequence; others are left as they are."""
    impl = layer.impl
    if impl.attn_type != "decoder" or impl.sliding_window not in (None, -1, (-1, -1)):
        return False
    # Those that attend within pieces of the sequence, or past keys of their own, have other kinds.
    return type(layer.get_kv_cache_spec(config)) is FullAttentionSpec


def _check_layer(name: str, impl: Any, reader: str | None) -> None:
    """Refuse a layer whose scores have a term that the kernels do not know, or whose KV is shared.

    Args:
        name: The layer's.
        impl: Its implementation.
        reader: A layer that reads its KV, if there is one: by the stock kernel, which wants another
            order of keys than sparse layers keep.

    Raises:
        PluginError: There is such a term, or such a layer.
    """
    terms = {
        "ALiBi": impl.alibi_slopes is not None,
        "a soft cap on logits": bool(impl.logits_soft_cap),
        "attention sinks": impl.sinks is not None,
        "KV of another layer": impl.kv_sharing_target_layer_name is not None,
        f"KV that {reader} reads": reader is not None,
    }
    for term, present in terms.items():
        if present:
            raise PluginError("--plugin hip", f"{name} has {term}", "add the layer to dense_layers")
