"""HiP's part in a worker: gives each attention layer its plan, before memory is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, cast

from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from vllm_plugins.engine.attention_host import attention_layers
from vllm_plugins.engine.worker_host import WorkerListener
from vllm_plugins.errors import PluginError
from vllm_plugins.settings import enabled_plugins

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

    from vllm_plugins.attention_backends.hip.plan import LayerPlan
    from vllm_plugins.attention_backends.hip.plugin import HipOptions

logger = init_logger("vllm.vllm_plugins.hip")


class SparseLayer(ABC):
    """What the implementations of attention layers have in common on all platforms."""

    @abstractmethod
    def make_sparse(self, plan: LayerPlan, max_num_seqs: int) -> None:
        """Attend sparsely from now on, and take the memory for it.

        Args:
            plan: What the layer prunes.
            max_num_seqs: Most requests of a batch.
        """


def hip_options(config: VllmConfig) -> HipOptions:
    """Return the options of the plug-in in an engine where it is on."""
    found = next(item for item in enabled_plugins(config) if item.plugin.name == "hip")
    return cast("HipOptions", found.options)


class HipListener(WorkerListener):
    """Gives each layer its plan once the model is loaded.

    Args:
        options: The plug-in's options.
        config: The engine's configuration.
    """

    def __init__(self, options: HipOptions, config: VllmConfig) -> None:
        self._options = options
        self._config = config

    def on_model_loaded(self, model: torch.nn.Module) -> None:
        """Make layers sparse and take the memory for what they keep.

        Raises:
            PluginError: A layer's attention is of a kind that HiP does not compute.
        """
        config, options = self._config, self._options
        num_layers = config.model_config.get_total_num_hidden_layers()
        rows = config.scheduler_config.max_num_seqs
        sparse, dense = [], []
        for name, layer in attention_layers(config, SparseLayer).items():
            index = extract_layer_index(name)
            plan = options.plan(index, num_layers)
            # A drafter's layers are counted on behind the model's; it is checked by dense ones.
            if plan is None or index >= num_layers or not _is_full(layer.impl):
                dense.append(index)
                continue
            _check_layer(name, layer.impl)
            layer.impl.make_sparse(plan, rows)
            sparse.append(index)
        logger.info(
            "vllm-plugins: hip is on (attention backend): layers %s sparse, %s dense; %s",
            sparse, dense, options.model_dump(),
        )  # fmt: skip
        if not sparse:
            logger.warning("vllm-plugins: hip does nothing: all layers are dense")
        elif options.dense_threshold >= config.model_config.max_model_len:
            logger.warning(
                "vllm-plugins: hip does nothing: no sequence exceeds dense_threshold=%d",
                options.dense_threshold,
            )


def _is_full(impl: Any) -> bool:
    """Whether a layer attends to the whole sequence; others are left as they are."""
    return impl.sliding_window in (None, -1, (-1, -1)) and impl.attn_type == "decoder"


def _check_layer(name: str, impl: Any) -> None:
    """Refuse a layer whose scores have a term that the kernels do not know.

    Raises:
        PluginError: There is such a term.
    """
    terms = {
        "ALiBi": impl.alibi_slopes is not None,
        "a soft cap on logits": bool(impl.logits_soft_cap),
        "attention sinks": impl.sinks is not None,
        "KV of another layer": impl.kv_sharing_target_layer_name is not None,
    }
    for term, present in terms.items():
        if present:
            raise PluginError("--plugin hip", f"{name} has {term}", "add the layer to dense_layers")
