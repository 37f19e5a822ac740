"""The scheduler's side of one engine: its arena, and its encode and prefill sides around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_plugins.kv_connectors.epd import metrics
from vllm_plugins.kv_connectors.epd.orders import Copy, Orders

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from vllm_plugins.kv_connectors.epd.arena import Arena
    from vllm_plugins.kv_connectors.epd.encode_side import EncodeSide
    from vllm_plugins.kv_connectors.epd.fetcher import Fetcher
    from vllm_plugins.kv_connectors.epd.metrics import Ledger
    from vllm_plugins.kv_connectors.epd.prefill_side import PrefillSide
    from vllm_plugins.kv_connectors.epd.shared_memory import SharedMemory
    from vllm_plugins.wire.server import Server


class SchedulerSide:
    """Answers vLLM's scheduler and gives the workers their orders.

    Args:
        arena: The store.
        memory: Its memory.
        ledger: Metrics.

    Attributes:
        arena: The store.
        memory: Its memory.
        encode: Its encode side; None on a server that only prefills.
        prefill: Its prefill side; None on a server that only encodes.
        server: What `encode` publishes through.
        fetcher: What `prefill` fetches through.
    """

    def __init__(self, arena: Arena, memory: SharedMemory, ledger: Ledger) -> None:
        self.arena = arena
        self.memory = memory
        self.encode: EncodeSide | None = None
        self.prefill: PrefillSide | None = None
        self.server: Server | None = None
        self.fetcher: Fetcher | None = None
        self._ledger = ledger
        self._step = 0
        self._loads: dict[str, Copy] = {}
        # Steps whose loads some worker may not have done yet.
        self._loading: list[int] = []
        self._used_bytes = 0

    def arrived(self, request: Request) -> None:
        """Take note of a request before it waits to be scheduled."""
        if self.prefill is not None and request.mm_features:
            self.prefill.arrived(request)

    def can_go_on(self, request: Request, computed: int) -> bool:
        """Whether a request can be scheduled behind so many computed tokens."""
        encode = self.encode
        if encode is not None and encode.wants(request) and not encode.admit(request):
            return False
        return self.prefill is None or self.prefill.can_go_on(request, computed)

    def is_missing(self, request: Request, index: int) -> bool:
        """Whether an item of a request is not here yet and must not be encoded here."""
        return self.prefill is not None and self.prefill.is_missing(request, index)

    def has(self, media: str) -> bool:
        """Whether an item is in the arena, where it then stays until the step's loads are done."""
        return self.arena.hold(media, _holder(self._step + 1)) is not None

    def found_cached(self, media: str) -> None:
        """Have an item written that is in the encoder cache already, if somebody waits for it."""
        if self.encode is not None and self.encode.must_write(media):
            self.encode.order(media)

    def forget(self) -> None:
        """Drop what is kept; requests that are under way go on with what they hold."""
        self.arena.forget()

    def allocated(self, media: str) -> None:
        """Have an item loaded that gets a place in the encoder cache, or written once encoded."""
        entry = self.arena.hold(media, _holder(self._step + 1))
        if entry is not None:
            self._loads[media] = Copy(media, entry.shape, entry.blocks, entry.sequence)
        else:
            self.found_cached(media)

    def orders(self, output: SchedulerOutput) -> Orders:
        """Return what the workers are to do in a step that has been scheduled."""
        self._step += 1
        loads = list(self._loads.values())
        self._loads.clear()
        saves = self.encode.take_orders(self._step) if self.encode is not None else []
        self._let_go(bool(loads))
        if self.prefill is not None:
            self.prefill.tick()
            for name, tokens in output.num_scheduled_tokens.items():
                if self.prefill.misses_some(name):
                    self._ledger.inc(metrics.EARLY, tokens)
        if self.arena.used_bytes != self._used_bytes:
            self._used_bytes = self.arena.used_bytes
            self._ledger.set(metrics.ARENA, self._used_bytes)
        return Orders(self._step if loads or saves else 0, self.memory.location, saves, loads)

    def ended(self, request: Request) -> dict[str, Any] | None:
        """Let go of what a request held; return its answer's ``ec_transfer_params``."""
        answer = self.encode.ended(request) if self.encode is not None else None
        if self.prefill is not None:
            self.prefill.ended(request.request_id)
        return answer

    def take_failed(self) -> set[str]:
        """Return the requests that cannot be served."""
        failed = self.encode.take_refused() if self.encode is not None else set()
        return failed | (self.prefill.take_failed() if self.prefill is not None else set())

    def close(self) -> None:
        """End the threads and give the memory back."""
        if self.server is not None:
            self.server.stop()
        if self.fetcher is not None:
            self.fetcher.close()
        self.memory.close()

    def _let_go(self, loads: bool) -> None:
        """Release what steps held whose loads are done."""
        if loads:
            self._loading.append(self._step)
        else:
            self.arena.release_all(_holder(self._step))
        done = self.memory.steps_done() if self._loading else 0
        while self._loading and self._loading[0] <= done:
            self.arena.release_all(_holder(self._loading.pop(0)))


def _holder(step: int) -> str:
    """Name under which a step's loads are held."""
    return f"step {step}"
