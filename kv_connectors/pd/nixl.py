"""DistServe's acceptance rule on top of vLLM's NixlConnector, which then moves the KV by RDMA.

The rule of `admission` decides which queued prompt may be pulled next; everything else, leases and
failures among it, is NixlConnector's own. It is asked first, and only its promise of an
asynchronous load can be held back.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlConnector

from vllm_plugins.kv_connectors.pd import metrics
from vllm_plugins.kv_connectors.pd.admission import Admission, Stage
from vllm_plugins.kv_connectors.pd.connector import options_of, writer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class PdNixlConnector(NixlConnector):
    """NixlConnector that accepts prompts as DistServe's decode instance does."""

    admission: Admission
    _pool: BlockPool

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            self._options = options_of(vllm_config)
            self._writer = writer(vllm_config, self._options)

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """Take the pool whose blocks the rule counts."""
        super().bind_gpu_block_pool(gpu_block_pool)
        self._pool = gpu_block_pool
        threshold = self._options.waiting_block_prop_threshold
        self.admission = Admission(threshold, gpu_block_pool.num_gpu_blocks)

    def on_new_request(self, request: Request) -> None:
        """Queue what is to be taken over."""
        super().on_new_request(request)
        if (request.kv_transfer_params or {}).get("do_remote_prefill"):
            self.admission.arrive(request.request_id)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Return how many tokens will be pulled; None holds a request back."""
        promised, loads = super().get_num_new_matched_tokens(request, num_computed_tokens)
        name = request.request_id
        if self.admission.stage(name) is not Stage.QUEUED:
            return promised, loads
        if not loads:
            self.admission.leave(name)
            return promised, loads
        blocks, free = self._blocks(promised), self._pool.get_num_free_blocks()
        return (promised, True) if self.admission.may_accept(name, blocks, free) else (None, False)

    def startable(self, waiting: Iterable[Request]) -> Iterator[Request]:
        """Yield those of the waiting requests that may start their prompt in the next step."""
        return (one for one in waiting if self.admission.stage(one.request_id) is None)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Count what is being pulled."""
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        name = request.request_id
        if self.admission.stage(name) is not Stage.QUEUED:
            return
        if num_external_tokens:
            self.admission.accept(name, self._blocks(num_external_tokens))
            self._writer.inc(metrics.PULLED.name, num_external_tokens)
        else:
            # vLLM computes it in any case, as for prompt_logprobs.
            self.admission.leave(name)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """See who runs, and return NixlConnector's orders."""
        for name in self.admission.accepted:
            if name in scheduler_output.num_scheduled_tokens:
                self.admission.leave(name)
        self._writer.set(metrics.QUEUED.name, len(self.admission.queued))
        self._writer.set(metrics.ACCEPTED.name, self.admission.accepted_blocks)
        return super().build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Hear what was pulled."""
        super().update_connector_output(connector_output)
        for name in connector_output.finished_recving or ():
            self.admission.loaded(name)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Drop a request."""
        self.admission.leave(request.request_id)
        return super().request_finished(request, block_ids)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Drop a request, where vLLM counts blocks by group."""
        self.admission.leave(request.request_id)
        return super().request_finished_all_groups(request, block_ids)

    def _blocks(self, tokens: int) -> int:
        groups = self._kv_cache_config.kv_cache_groups
        return sum(math.ceil(tokens / group.kv_cache_spec.block_size) for group in groups)
