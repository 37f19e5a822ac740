"""The KV connector through which vLLM and the two sides talk; a shell around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.logger import init_logger

from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.pd import metrics
from vllm_plugins.kv_connectors.pd.decode_scheduler import DecodeScheduler, LeaseKeeper
from vllm_plugins.kv_connectors.pd.groups import Groups
from vllm_plugins.kv_connectors.pd.orders import Introduction, Orders, Report
from vllm_plugins.kv_connectors.pd.peers import PeerConnections
from vllm_plugins.kv_connectors.pd.prefill_scheduler import PrefillScheduler
from vllm_plugins.kv_connectors.pd.reference import BadReferenceError, Reference
from vllm_plugins.kv_connectors.pd.worker import Worker
from vllm_plugins.metrics import ACTIVE, Metrics, engine_labels
from vllm_plugins.plugin import SCHEDULER_HOST
from vllm_plugins.settings import enabled_plugins
from vllm_plugins.versions import cache_hit_source
from vllm_plugins.wire.secret import load_secret

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from vllm_plugins.kv_connectors.pd.admission import Admission
    from vllm_plugins.kv_connectors.pd.geometry import Shard
    from vllm_plugins.kv_connectors.pd.plugin import PdOptions

logger = init_logger("vllm.vllm_plugins.pd")


class PdConnector(KVConnectorBase_V1, SupportsHMA):
    """Hands finished prompts over on a prefill instance, takes them over on a decode instance.

    vLLM makes one for the scheduler and one in each worker. An instance may have both roles.
    """

    _cache_hit_source = cache_hit_source("P2P")
    _prefill: PrefillScheduler
    _decode: DecodeScheduler
    _readers: list[Shard]

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._options = options_of(vllm_config)
        if role == KVConnectorRole.WORKER:
            self._worker = Worker(self._options, vllm_config, kv_cache_config)
        else:
            self._metrics = writer(vllm_config, self._options)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Heads outside of slots, so that a few heads of a block lie together; MLA has none."""
        return None if vllm_config.model_config.use_mla else "LBHNC"

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Only where layers are sent one by one: Python does not run inside a replayed graph."""
        return bool(extra_config.get("stream_layers"))

    # Scheduler side.

    @property
    def supports_divergent_local_hybrid_hits(self) -> bool:
        """Yes: a pull brings the state, wherever the attention's own KV ends."""
        return True

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Make the two sides, which need the block pool."""
        super().bind_kv_cache_manager(kv_cache_manager)
        options, pool = self._options, kv_cache_manager.block_pool
        groups = Groups.of(self._kv_cache_config)
        connections = PeerConnections(
            load_secret(options.secret_file), options.connect_timeout_s, options.read_timeout_s
        )
        self._prefill = PrefillScheduler(
            groups,
            pool.num_gpu_blocks,
            options.max_held_fraction,
            stream_layers=options.stream_layers,
        )
        self._decode = DecodeScheduler(
            groups,
            pool,
            options.waiting_block_prop_threshold,
            options.min_pull_tokens,
            LeaseKeeper(connections, options.heartbeat),
            lambda request: kv_cache_manager.get_computed_blocks(request)[1],
        )
        self._readers = []

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """Learn what the workers hold and where they serve it."""
        workers = [cast(Introduction, metadata[rank]) for rank in sorted(metadata)]
        self._prefill.introduce([w.peer for w in workers if w.peer is not None])
        self._readers = [worker.shard for worker in workers]

    def on_new_request(self, request: Request) -> None:
        """Queue what is to be taken over, and note what is to be handed over."""
        try:
            reference = Reference.from_params(request.kv_transfer_params)
            if reference is not None and self._options.role != "prefill":
                self._options.check_peers(reference)
                self._decode.arrive(reference, request)
            elif reference is None and self._options.role != "decode":
                self._prefill.arrive(request)
        except BadReferenceError as error:
            # Whoever sent it gets a right answer all the same, computed here.
            self._metrics.inc(metrics.RECOMPUTED.name, 1, "malformed")
            logger.warning("vllm-plugins: pd: %s: %s", request.request_id, error)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Return how many tokens will be pulled; None holds a request back."""
        if self._prefill.must_wait(request):
            return None, False
        promised = self._decode.promise(request, num_computed_tokens)
        return promised, bool(promised)

    @property
    def admission(self) -> Admission:
        """Where the requests stand whose prompt is taken over."""
        return self._decode.admission

    def startable(self, waiting: Iterable[Request]) -> Iterator[Request]:
        """Yield those of the waiting requests that may start their prompt in the next step."""
        stage = self.admission.stage
        return self._prefill.startable(one for one in waiting if stage(one.request_id) is None)

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        """All: a request's own blocks are transferred."""
        return tuple(range(len(self._kv_cache_config.kv_cache_groups)))

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Order what was promised, and note what is started."""
        self._prefill.start(request)
        self._decode.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Return this step's orders to the workers."""
        manager = self._kv_cache_manager
        assert manager is not None
        idle = not scheduler_output.total_num_scheduled_tokens
        orders = Orders(readers=tuple(self._readers), idle=idle)
        self._readers = []
        self._prefill.step(scheduler_output, manager.get_block_ids, orders)
        self._decode.step(scheduler_output, orders)
        pulled, recomputed = self._decode.take_counts()
        self._metrics.inc(metrics.PULLED.name, pulled)
        for reason, count in recomputed.items():
            self._metrics.inc(metrics.RECOMPUTED.name, count, reason)
        self._show()
        return orders

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Hear what was pulled, and what was pulled from here."""
        for request_id in connector_output.finished_sending or ():
            self._prefill.freed(request_id)
        self._decode.loaded(connector_output.finished_recving or ())
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, Report):
            self._count(report)
        # An idle engine builds no further orders.
        self._show()

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Keep the blocks of a prompt that is to be handed over."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Keep the blocks of a prompt that is to be handed over."""
        self._decode.finished(request)
        keep, params = self._prefill.finished(request, block_ids)
        if keep:
            self._metrics.inc(metrics.HANDED_OVER.name)
        return keep, params

    def has_pending_push_work(self) -> bool:
        """Whether the workers have yet to hear something: an idle engine then steps once."""
        return self._prefill.has_orders or self._decode.has_orders

    def _show(self) -> None:
        self._metrics.set(metrics.HELD.name, self._prefill.held_blocks)
        self._metrics.set(metrics.QUEUED.name, len(self._decode.admission.queued))
        self._metrics.set(metrics.ACCEPTED.name, self._decode.admission.accepted_blocks)

    def _count(self, report: Report) -> None:
        write = self._metrics
        for way, size in report.received.items():
            write.inc(metrics.RECEIVED.name, size, way)
        for reason, count in report.failures.items():
            write.inc(metrics.RECOMPUTED.name, count, reason)
        for seconds in report.pull_seconds:
            write.observe(metrics.PULL_SECONDS.name, seconds)
        write.inc(metrics.EXPIRED.name, report.expired)
        write.inc(metrics.SENT.name, report.early, "early")
        write.inc(metrics.SENT.name, report.sent - report.early, "late")

    # Worker side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the worker's KV cache, and serve it."""
        self._worker.register(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Return what this worker holds and where it serves it."""
        return self._worker.introduction

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Take the step's orders before its forward overwrites any block."""
        self._worker.begin_step(cast(Orders, kv_connector_metadata))

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Start this step's pulls, in the background, and leave them the core if that is all."""
        orders = cast(Orders, self._get_connector_metadata())
        self._worker.start_loads(orders)
        # The context does not tell: model runner V2 asks for loads when the forward's is gone.
        if orders.idle:
            self._worker.rest()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: no layer of a step waits for a pull."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Let those who wait for this layer have it."""
        self._worker.layer_computed(layer_name)

    def wait_for_save(self) -> None:
        """Wait for nothing, what is being sent keeps its blocks; but see which prompts ended."""
        self._worker.end_step()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Return what was pulled, from here and to here."""
        sent, received, failed = self._worker.take_results(finished_req_ids)
        return KVConnectorTransferResults(sent, received, failed)

    def build_connector_worker_meta(self) -> Report | None:
        """Return what the scheduler's side counts."""
        return self._worker.take_report() or None

    def shutdown(self) -> None:
        """Stop serving and pulling."""
        if self.role == KVConnectorRole.WORKER:
            self._worker.close()
        else:
            self._decode.close()


def options_of(config: VllmConfig) -> PdOptions:
    """Return the plug-in's options in an engine.

    Raises:
        PluginError: The plug-in is off.
    """
    for item in enabled_plugins(config):
        if item.plugin.name == "pd":
            return cast("PdOptions", item.options)
    raise PluginError(
        "--kv-transfer-config", "PdConnector works only as a plug-in", "use --plugin pd:role=..."
    )


def writer(config: VllmConfig, options: PdOptions) -> Metrics:
    """Make an engine's metrics, and say in the log that the plug-in is on."""
    made = Metrics([ACTIVE, *metrics.ALL], engine_labels(config))
    made.set(ACTIVE.name, 1, "pd")
    for name, labels in metrics.LABELS.items():
        for label in labels:
            made.inc(name, 0, label)
    if config.scheduler_config.scheduler_cls != SCHEDULER_HOST:
        # The scheduler host, where there is one, says this of all plug-ins.
        logger.info("vllm-plugins: pd is on (KV connector): %s", options.model_dump(mode="json"))
    return made
