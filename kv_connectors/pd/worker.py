"""A worker's part: its KV cache, what it serves of it, and what it pulls into it."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.logger import init_logger

from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.pd.decode_worker import DecodeWorker
from vllm_plugins.kv_connectors.pd.direct import UnavailableError, export_caches
from vllm_plugins.kv_connectors.pd.direct_cuda import CudaCaches
from vllm_plugins.kv_connectors.pd.direct_peers import DirectPeers
from vllm_plugins.kv_connectors.pd.fingerprint import fingerprint
from vllm_plugins.kv_connectors.pd.geometry import Heads
from vllm_plugins.kv_connectors.pd.groups import Groups
from vllm_plugins.kv_connectors.pd.orders import Introduction, Orders, Report
from vllm_plugins.kv_connectors.pd.pages import Pages
from vllm_plugins.kv_connectors.pd.peers import PeerConnections
from vllm_plugins.kv_connectors.pd.prefill_worker import PrefillWorker
from vllm_plugins.kv_connectors.pd.reference import Peer
from vllm_plugins.wire.secret import load_secret
from vllm_plugins.wire.server import Server

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_plugins.kv_connectors.pd.direct import CacheHandles, DirectCaches
    from vllm_plugins.kv_connectors.pd.plugin import PdOptions

logger = init_logger("vllm.vllm_plugins.pd")

GENERATION_BYTES = 8
# Longest pause of steps that compute nothing, for which a new request may have to wait.
IDLE_STEP_S = 0.002
MAX_CONNECTIONS = 256


class Worker:
    """Both sides of one worker.

    Args:
        options: The plug-in's options.
        config: The engine's configuration.
        kv_cache_config: Groups and pool of the KV cache.
    """

    def __init__(
        self, options: PdOptions, config: VllmConfig, kv_cache_config: KVCacheConfig
    ) -> None:
        self._options, self._config, self._kv_cache_config = options, config, kv_cache_config
        self._server: Server | None = None
        self._serving: PrefillWorker | None = None
        self._pulling: DecodeWorker | None = None
        self.introduction: Introduction | None = None

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """Take the KV cache, and serve it if this is a prefill instance.

        Raises:
            PluginError: The cache has a form that is not known, or cannot be mapped where it must
                be, or the port is taken.
        """
        options = self._options
        groups = {
            name: index
            for index, group in enumerate(self._kv_cache_config.kv_cache_groups)
            for name in group.layer_names
        }
        tp, pp = get_tp_group(), get_pp_group()
        total = self._config.model_config.get_total_num_kv_heads()
        states = Groups.state_forms(self._kv_cache_config)
        attention = (cache for name, cache in caches.items() if name not in states)
        pages = Pages(
            {name: cache for name, cache in caches.items() if name in groups},
            self._kv_cache_config.num_blocks,
            Groups.of(self._kv_cache_config).block_size,
            Heads.of_rank(total, tp.rank_in_group, tp.world_size),
            fingerprint(self._config, next(attention, None)),
            states,
            (tp.rank_in_group, tp.world_size),
        )
        direct = _direct_caches(options, pages)
        rank = pp.rank_in_group * tp.world_size + tp.rank_in_group
        peer = self._serve(pages, groups, rank, direct) if options.role != "decode" else None
        if options.role != "prefill":
            self._pulling = self._reader(pages, groups, rank, direct)
        self.introduction = Introduction(pages.shard, peer)

    def _serve(
        self, pages: Pages, groups: dict[str, int], rank: int, direct: DirectCaches | None
    ) -> Peer:
        """Serve the cache, and return where."""
        options, generation = self._options, secrets.token_hex(GENERATION_BYTES)
        handles = _exported(options, pages, direct)
        self._serving = PrefillWorker(pages, groups, generation, options.lease_s, handles)
        self._server = Server(
            self._serving.serve,
            load_secret(options.secret_file),
            host=options.bind_host,
            # Each worker of an instance needs a port of its own.
            port=options.port + rank if options.port else 0,
            unix=options.transport != "tcp",
            timeout_s=options.read_timeout_s,
            max_connections=MAX_CONNECTIONS,
            name="pd",
        )
        self._server.start()
        return Peer(options.announced(self._server.address), generation)

    def _reader(
        self, pages: Pages, groups: dict[str, int], rank: int, direct: DirectCaches | None
    ) -> DecodeWorker:
        options = self._options
        connections = PeerConnections(
            load_secret(options.secret_file), options.connect_timeout_s, options.read_timeout_s
        )
        peers = None
        if direct is not None:
            required = options.transport == "cuda_ipc"
            peers = DirectPeers(direct, pages, connections, required=required)
        share_memory = options.transport != "tcp"
        return DecodeWorker(
            pages, groups, rank, connections, share_memory=share_memory, direct=peers
        )

    def begin_step(self, orders: Orders) -> None:
        """Take the orders that must be carried out before the step's forward."""
        if self._serving is not None:
            self._serving.begin_step(orders)
        if self._pulling is not None and orders.readers:
            self._pulling.introduce(orders.readers)

    def start_loads(self, orders: Orders) -> None:
        """Start pulls in the background."""
        for load in orders.loads:
            assert self._pulling is not None
            self._pulling.start(load)

    def rest(self) -> None:
        """Wait in a step that computes nothing, if prompts are being pulled, or kept for others.

        vLLM steps without a pause while a request waits for its KV or keeps it. On few cores that
        would take them from the threads that move it and from the API server, which hears of each
        step.
        """
        if self._pulling is not None and self._pulling.is_busy:
            self._pulling.await_one(IDLE_STEP_S)
        elif self._serving is not None and len(self._serving.outbox):
            time.sleep(IDLE_STEP_S)

    def layer_computed(self, layer: str) -> None:
        """Let others have the step's KV of a layer."""
        if self._serving is not None:
            self._serving.layer_computed(layer)

    def end_step(self) -> None:
        """Note that the step's forward is over."""
        if self._serving is not None:
            self._serving.end_step()

    def take_results(self, ended: set[str]) -> tuple[set[str], set[str], set[str]]:
        """Return requests whose blocks were pulled, are here, and of the latter those that failed.

        Args:
            ended: Requests that vLLM has ended.
        """
        sent = self._serving.outbox.take_freed() if self._serving is not None else set()
        received: set[str] = set()
        failed: set[str] = set()
        if self._pulling is not None:
            received, failed = self._pulling.take_finished(ended)
        return sent, received, failed

    def take_report(self) -> Report:
        """Return what happened since the last call."""
        report = Report()
        if self._serving is not None:
            report.sent, report.early = self._serving.take_counts()
            report.expired = self._serving.outbox.take_expired()
        if self._pulling is not None:
            counts = self._pulling.take_counts()
            report.received, report.failures, report.pull_seconds = counts
        return report

    def close(self) -> None:
        """Stop serving and pulling."""
        if self._server is not None:
            self._server.stop()
        if self._pulling is not None:
            self._pulling.close()


def _direct_caches(options: PdOptions, pages: Pages) -> DirectCaches | None:
    """Return how this worker's caches and others' are mapped; None where they are not to be."""
    devices = {cache.device for cache in pages.caches.values()}
    if options.transport not in ("auto", "cuda_ipc") or {one.type for one in devices} != {"cuda"}:
        return None
    return CudaCaches(devices.pop())


def _exported(options: PdOptions, pages: Pages, direct: DirectCaches | None) -> CacheHandles | None:
    """Return with which handles readers map the caches; None where they cannot.

    Raises:
        PluginError: They cannot, and KV may leave in no other way.
    """
    if direct is None:
        return None
    try:
        return export_caches(pages, direct)
    except UnavailableError as error:
        if options.transport == "cuda_ipc":
            raise PluginError(
                "--plugin pd: transport=cuda_ipc",
                f"the KV cache cannot be mapped by other processes: {error}",
                "use transport=auto",
            ) from None
        logger.warning(
            "vllm-plugins: pd: KV leaves through host memory, since other processes cannot map "
            "the cache: %s",
            error,
        )
        return None
