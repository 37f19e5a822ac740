"""The KV connector through which vLLM and KVShare talk; a shell around the two sides."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.kvshare import metrics
from vllm_plugins.kv_connectors.kvshare.disk import Catalogue
from vllm_plugins.kv_connectors.kvshare.fingerprint import fingerprint
from vllm_plugins.kv_connectors.kvshare.offers import EngineShape
from vllm_plugins.kv_connectors.kvshare.plugin import resolved
from vllm_plugins.kv_connectors.kvshare.scheduler_side import SchedulerSide
from vllm_plugins.kv_connectors.kvshare.transfer import Orders
from vllm_plugins.kv_connectors.kvshare.worker_side import WorkerSide
from vllm_plugins.metrics import ACTIVE, Metrics, engine_labels
from vllm_plugins.plugin import SCHEDULER_HOST
from vllm_plugins.settings import enabled_plugins
from vllm_plugins.versions import cache_hit_source

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from vllm_plugins.kv_connectors.kvshare.plugin import KVShareOptions

logger = init_logger("vllm.vllm_plugins.kvshare")

GIB = 1 << 30


class KVShareConnector(KVConnectorBase_V1, SupportsHMA):
    """Promises the scheduler KV of equal text, and puts it together in the workers.

    vLLM makes one for the scheduler and one in each worker; each has one of the two sides.
    """

    _cache_hit_source = cache_hit_source("HOST")

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        options = _options(vllm_config)
        if role == KVConnectorRole.WORKER:
            self.worker = WorkerSide(options, _disk_folder(options, vllm_config))
        else:
            self.scheduler = _scheduler_side(options, vllm_config, kv_cache_config)

    @property
    def requires_kv_delivery(self) -> bool:
        """Never: what is not stored is a later request's miss, and costs this one nothing."""
        return False

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Take the scheduler's cache manager."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self.scheduler.bind(kv_cache_manager)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Return how many tokens reuse can provide, and that they come between steps."""
        promised = self.scheduler.promise(request, num_computed_tokens)
        return promised, bool(promised)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Order what was promised."""
        self.scheduler.admitted(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Return this step's orders to the workers."""
        return self.scheduler.orders(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take the workers' report."""
        self.scheduler.heard(connector_output)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Drop a request; vLLM itself keeps the blocks of one that is still being loaded."""
        return False, self.scheduler.ended(request)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Drop a request, where vLLM counts blocks by group."""
        return self.request_finished(request, block_ids[0])

    def has_pending_push_work(self) -> bool:
        """Whether the workers have yet to hear what is gone: an idle engine then steps once."""
        return self.scheduler.has_news

    def shutdown(self) -> None:
        """Leave the disk tier to another server."""
        if self.role == KVConnectorRole.SCHEDULER:
            self.scheduler.close()

    def reset_cache(self) -> bool | None:
        """Forget all stored KV, as when the weights change."""
        return self.scheduler.reset() if self.role == KVConnectorRole.SCHEDULER else None

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Put KV together; vLLM calls it after the step's forward, since no load is synchronous."""
        self.worker.between_steps(cast(Orders, self._get_connector_metadata()))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: no layer of a step waits for a load."""

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: KV is stored once all layers are computed."""

    def wait_for_save(self) -> None:
        """Store the KV that this step completed."""
        self.worker.save(cast(Orders, self._get_connector_metadata()).saves)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Return the requests whose KV is complete, or given up."""
        return KVConnectorTransferResults(finished_recving=self.worker.take_ready(finished_req_ids))

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks of requests given up, which vLLM then computes."""
        return self.worker.take_failed_blocks()

    def build_connector_worker_meta(self) -> Any:
        """Return what the scheduler's side has to know."""
        return self.worker.take_results()


def _options(config: VllmConfig) -> KVShareOptions:
    for item in enabled_plugins(config):
        if item.plugin.name == "kvshare":
            return resolved(cast("KVShareOptions", item.options), config)
    raise PluginError(
        "--kv-transfer-config", "KVShareConnector works only as a plug-in", "use --plugin kvshare"
    )


def _disk_folder(options: KVShareOptions, config: VllmConfig) -> Path | None:
    """Return the engine's own folder in the disk tier; None without one."""
    return options.disk_path and options.disk_path / fingerprint(config, options)


def _scheduler_side(
    options: KVShareOptions, config: VllmConfig, kv_cache_config: KVCacheConfig
) -> SchedulerSide:
    groups = kv_cache_config.kv_cache_groups
    spec = groups[0].kv_cache_spec
    if len(groups) != 1 or not isinstance(spec, FullAttentionSpec) or spec.sliding_window:
        raise PluginError(
            "--plugin kvshare", "needs full attention in every layer", "use such a model"
        )
    layers = len(groups[0].layer_names)
    bytes_per_token = layers * spec.page_size_bytes / spec.block_size
    folder = _disk_folder(options, config)
    catalogue = None if folder is None else Catalogue(folder.parent, folder.name)
    # A disk tier holds all that is stored, and host memory is a cache of it.
    capacity = int((options.disk_gib if catalogue else options.host_gib) * GIB / bytes_per_token)
    writer = Metrics([ACTIVE, *metrics.ALL], engine_labels(config))
    writer.set(ACTIVE.name, 1, "kvshare")
    if config.scheduler_config.scheduler_cls != SCHEDULER_HOST:
        # The scheduler host, where there is one, says this of all plug-ins.
        logger.info("vllm-plugins: kvshare is on (KV connector): %s", options.model_dump())
    shape = EngineShape(spec.block_size, layers, config.scheduler_config.max_num_seqs)
    return SchedulerSide(options, shape, capacity, writer, catalogue)
