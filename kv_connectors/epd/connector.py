"""The encoder cache connector through which vLLM and EPD talk; a shell around the two sides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
)

from vllm_plugins.kv_connectors.epd.assembly import make_scheduler_side, options_of
from vllm_plugins.kv_connectors.epd.early_prefill import close_gate, open_gate
from vllm_plugins.kv_connectors.epd.orders import Orders
from vllm_plugins.kv_connectors.epd.worker_side import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class EpdConnector(ECConnectorBase):
    """Moves embeddings from the server that encoded an item to the one that prefills.

    vLLM makes one for the scheduler and one in each worker; each has one of the two sides.
    """

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        self._engine = vllm_config.ec_transfer_config.engine_id
        if role == ECConnectorRole.SCHEDULER:
            self.scheduler = make_scheduler_side(vllm_config, options_of(vllm_config))
            open_gate(self._engine, self.scheduler)
        else:
            self.worker = WorkerSide()

    def has_cache_item(self, identifier: str) -> bool:
        """Whether an item is loaded rather than encoded."""
        return self.scheduler.has(identifier)

    def ensure_cache_available(self, request: Request, num_computed_tokens: int) -> bool:
        """Whether a request can be scheduled: there is room to encode, or what it needs is here."""
        return self.scheduler.can_go_on(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """Order an item that has got a place in the encoder cache to be loaded or saved."""
        self.scheduler.allocated(request.mm_features[index].identifier)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> ECConnectorMetadata:
        """Return this step's orders to the workers."""
        return self.scheduler.orders(scheduler_output)

    def take_unavailable_requests(self) -> set[str]:
        """Return the requests that vLLM has to fail."""
        return self.scheduler.take_failed()

    def request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """Let go of a request; what it encoded is in the arena already, so nothing is delayed."""
        return False, self.scheduler.ended(request)

    def shutdown(self) -> None:
        """End the threads and give the memory back."""
        if self.role == ECConnectorRole.SCHEDULER:
            close_gate(self._engine)
            self.scheduler.close()
        else:
            self.worker.close()

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        """Carry out what can be done before the encoder runs, on a server that prefills."""
        self.worker.begin(cast(Orders, self._get_connector_metadata()), encoder_cache)

    def start_save_caches(self, **kwargs: Any) -> None:
        """Carry out the same on a server that only encodes, where vLLM does not call the other."""
        if not self.is_consumer:
            self.start_load_caches(kwargs["encoder_cache"])

    def save_caches(
        self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any
    ) -> None:
        """Save an item that has just been encoded, if that was ordered."""
        if self.is_producer:
            self.worker.save(mm_hash, encoder_cache[mm_hash])

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Report a step's copies as done, at the step's end; no request waits for them."""
        self.worker.end(cast(Orders, self._get_connector_metadata()))
        return None, None
