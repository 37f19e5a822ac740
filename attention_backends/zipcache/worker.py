"""ZipCache's part in a worker: packs the layers, and follows blocks from step to step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from vllm_plugins.attention_backends.zipcache.away import AwayRows
from vllm_plugins.attention_backends.zipcache.batch import LayerMemory, Seals
from vllm_plugins.attention_backends.zipcache.blocks import BlockLife, LifeOptions
from vllm_plugins.attention_backends.zipcache.key_transform import (
    KeyTransform,
    KeyTransformFile,
)
from vllm_plugins.attention_backends.zipcache.metrics import BlockMeter
from vllm_plugins.attention_backends.zipcache.page import HEAD_MULTIPLE, PageFormat
from vllm_plugins.attention_backends.zipcache.saliency import Probing
from vllm_plugins.engine.attention_host import attention_layers
from vllm_plugins.engine.kv_heads import heads_of_rank
from vllm_plugins.engine.worker_host import WorkerListener, is_warm_up
from vllm_plugins.errors import PluginError

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_plugins.attention_backends.zipcache.block_tables import BlockTables
    from vllm_plugins.attention_backends.zipcache.plugin import ZipCacheOptions
    from vllm_plugins.engine.worker_host import RunnerView

# As vLLM names what is not quantised.
KV_DTYPES = ("auto", "float16", "bfloat16", "float32")

logger = init_logger("vllm.vllm_plugins.zipcache")


class PackedLayer(ABC):
    """What the implementations of attention layers have in common on all platforms."""

    @abstractmethod
    def pack(self, memory: LayerMemory) -> None:
        """Keep packed pages from now on.

        Args:
            memory: The layer's, besides the cache.
        """

    @staticmethod
    @abstractmethod
    def backend(bits: str, salient_ratio: float, key_salient_ratio: float | None) -> type[Any]:
        """Return vLLM's backend class that asks for pages of these options."""

    @staticmethod
    def share(layers: Sequence[Any], config: VllmConfig) -> int:
        """Take what layers use one after the other; return its bytes.

        Args:
            layers: All packed ones.
            config: The engine's configuration.
        """
        return 0

    @staticmethod
    def tables(num_blocks: int, config: VllmConfig, device: torch.device) -> BlockTables | None:
        """Return what kernels on a device read of blocks; those of the host read their life."""
        return None

    def warm_up(self) -> None:
        """Compile what is compiled on first use; the layer has its pages."""
        return

    @abstractmethod
    def use_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the layer's pages once vLLM has allocated them."""

    @abstractmethod
    def seal(self, seals: Seals) -> None:
        """Apply blocks' quotas."""


class ZipCacheListener(WorkerListener):
    """Packs layers once the model is loaded, and seals blocks before each step.

    Args:
        options: The plug-in's options.
        config: The engine's configuration.
    """

    def __init__(self, options: ZipCacheOptions, config: VllmConfig) -> None:
        self._options = options
        self._config = config
        self._packed: dict[str, Any] = {}
        self._life: BlockLife | None = None
        self._tables: BlockTables | None = None
        self._meter: BlockMeter | None = None
        self._away = AwayRows()

    def on_model_loaded(self, model: torch.nn.Module) -> None:
        """Pack layers and take their memory besides the cache.

        Raises:
            PluginError: A layer's attention is of a kind that ZipCache does not compute.
        """
        skipped, total = self._options.skipped(self._num_layers), 0
        path = self._options.key_transform
        transforms = KeyTransformFile(path) if path is not None else None
        for name, layer in attention_layers(self._config, PackedLayer).items():
            _check_layer(name, layer)
            if extract_layer_index(name) in skipped:
                continue
            memory = self._take_memory(layer)
            if transforms is not None:
                memory.transform = self._transform(transforms, name, layer)
            layer.impl.pack(memory)
            layer.attn_backend = layer.impl.backend(*self._options.shares)
            self._packed[name] = layer.impl
            total += memory.bytes
        impls = list(self._packed.values())
        total += impls[0].share(impls, self._config) if impls else 0
        logger.info(
            "vllm-plugins: zipcache is on (attention backend): %d layers packed, %d not; %.0f MiB "
            "besides the cache; %s",
            len(self._packed), len(skipped), total / 2**20, self._options.model_dump(),
        )  # fmt: skip
        if not self._packed:
            logger.warning("vllm-plugins: zipcache does nothing: all layers are in skip_layers")

    @property
    def _num_layers(self) -> int:
        return int(self._config.model_config.get_total_num_hidden_layers())

    def _page(self, head_size: int) -> PageFormat:
        size = self._config.cache_config.block_size
        return PageFormat.of(size, head_size, *self._options.shares)

    def _take_memory(self, layer: Any) -> LayerMemory:
        page = self._page(layer.head_size)
        return LayerMemory.take(
            page,
            layer.num_kv_heads,
            self._config.scheduler_config.max_num_seqs,
            self._options.staged_blocks(self._config, page.block_size) if page.chooses else 0,
            self._config.model_config.dtype,
            self._options.v_scale == "block",
            next(layer.parameters(), layer.kv_cache).device,
        )

    def _transform(self, file: KeyTransformFile, name: str, layer: Any) -> KeyTransform:
        """Read what a layer's keys are multiplied by, those of this rank's heads."""
        ranks, model = get_tp_group(), self._config.model_config
        total = model.get_total_num_kv_heads()
        heads = heads_of_rank(total, ranks.rank_in_group, ranks.world_size)
        if layer.num_kv_heads != heads.stop - heads.start:
            raise PluginError(
                "--plugin zipcache: key_transform",
                f"{name} has another number of KV heads than the model's other layers",
                "drop it",
            )
        device = next(layer.parameters(), layer.kv_cache).device
        return file.layer(name, total, heads, layer.head_size, model.dtype, device)

    def on_kv_cache_ready(self, runner: RunnerView) -> None:
        """Give the layers their pages and the builders the blocks' life.

        Raises:
            PluginError: Layers do not share one block table.
        """
        if not self._packed:
            return
        if len(runner.kv_cache_config.kv_cache_groups) != 1:
            raise PluginError(
                "--plugin zipcache",
                "this model's layers keep different parts of a sequence",
                "drop the plug-in for this model",
            )
        for name, impl in self._packed.items():
            impl.use_cache(runner.attention_layer(name).kv_cache)
            impl.warm_up()
        num_blocks = runner.kv_cache_config.num_blocks
        life = BlockLife(self._life_options(), num_blocks)
        tables = impl.tables(num_blocks, self._config, runner.device)
        for group in (g for groups in runner.attention_groups for g in groups):
            if set(group.layer_names) <= self._packed.keys():
                for builder in group.metadata_builders:
                    builder.life, builder.tables = life, tables
        self._life, self._meter, self._tables = life, BlockMeter(self._config), tables
        [group] = runner.kv_cache_config.kv_cache_groups
        spec = group.kv_cache_spec
        self._meter.set_token_bytes(_layer_bytes(spec, len(group.layer_names)) // spec.block_size)

    def _life_options(self) -> LifeOptions:
        options, size = self._options, self._config.cache_config.block_size
        page = self._page(HEAD_MULTIPLE)
        return LifeOptions(
            block_size=size,
            chooses=page.chooses,
            probing=Probing(options.probe_recent, options.probe_random, options.seed),
            normalizer=options.normalizer,
            decode_score=options.decode_score,
            always_salient_first=options.always_salient_first,
            rows=self._config.scheduler_config.max_num_seqs,
            staged=options.staged_blocks(self._config, size) if page.chooses else 0,
        )

    def around_execute_model(
        self, scheduler_output: SchedulerOutput
    ) -> AbstractContextManager[Any]:
        """Seal what is due before a step writes anything."""
        if self._life is not None and self._meter is not None:
            seals = self._life.begin_step(scheduler_output)
            if self._tables is not None:
                self._tables.step(self._life)
                seals = self._tables.send(seals) if seals is not None else None
            if seals is not None:
                for impl in self._packed.values():
                    impl.seal(seals)
            self._away.step(self._life, [impl.memory for impl in self._packed.values()])
            self._meter.step(self._life, not is_warm_up(scheduler_output))
        return nullcontext()


def _layer_bytes(spec: Any, layers: int) -> int:
    """Return the bytes of a block in all layers."""
    each = getattr(spec, "kv_cache_specs", None)
    if each is None:
        return int(spec.page_size_bytes) * layers
    return sum(int(x.page_size_bytes) for x in each.values())


def _check_layer(name: str, layer: Any) -> None:
    """Refuse a layer whose scores have a term that the kernels do not know.

    Raises:
        PluginError: There is such a term.
    """
    from vllm.model_executor.layers.attention import Attention

    impl = layer.impl
    terms = {
        # A kind of its own has a backend or blocks of its own, which packed pages would replace.
        f"attention of its own ({type(layer).__name__})": type(layer) is not Attention,
        "a sliding window": impl.sliding_window not in (None, -1, (-1, -1)),
        "attention that is not a decoder's": impl.attn_type != "decoder",
        "ALiBi": impl.alibi_slopes is not None,
        "a soft cap on logits": bool(impl.logits_soft_cap),
        "attention sinks": impl.sinks is not None,
        "KV of another layer": impl.kv_sharing_target_layer_name is not None,
        f"heads of {layer.head_size} channels": bool(layer.head_size % HEAD_MULTIPLE),
        "a KV cache of another dtype": layer.kv_cache_dtype not in KV_DTYPES,
        "values of another size than keys": layer.head_size_v != layer.head_size,
    }
    for term, present in terms.items():
        if present:
            raise PluginError(
                "--plugin zipcache", f"{name} has {term}", "drop the plug-in for this model"
            )
