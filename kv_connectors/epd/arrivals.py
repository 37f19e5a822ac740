"""The scheduling policy that tells EPD of a request when it arrives; it decides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_plugins.engine.policy import SchedulerPolicy
from vllm_plugins.kv_connectors.epd.early_prefill import gate_of

if TYPE_CHECKING:
    from vllm.v1.request import Request


class ArrivalPolicy(SchedulerPolicy):
    """Passes arrivals on.

    Args:
        engine: Names the engine whose scheduler's side is told.
    """

    def __init__(self, engine: str) -> None:
        self._gate = gate_of(engine)

    def added(self, request: Request, arrived: float) -> None:
        """Start to fetch what a request needs."""
        self._gate.arrived(request)
