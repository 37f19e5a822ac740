"""The decode side in the scheduler: which prompts are pulled, when, and into which blocks."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_plugins.kv_connectors.pd.admission import Admission, Stage
from vllm_plugins.kv_connectors.pd.orders import Load
from vllm_plugins.kv_connectors.pd.prefill_scheduler import extra_of
from vllm_plugins.kv_connectors.pd.reference import BadReferenceError, Reference, prompt_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from vllm_plugins.kv_connectors.pd.groups import Groups
    from vllm_plugins.kv_connectors.pd.orders import Orders
    from vllm_plugins.kv_connectors.pd.peers import PeerConnections

logger = init_logger("vllm.vllm_plugins.pd")


class DecodeScheduler:
    """Takes prompts over.

    Args:
        groups: The KV cache groups.
        pool: The block pool.
        threshold: ``waiting_block_prop_threshold`` (see `admission`).
        min_pull_tokens: Fewer tokens than these are computed here rather than pulled.
        keeper: Keeps the leases of prompts until they are here.
        usable: Returns the tokens of a request behind which it could go on without a pull.
    """

    def __init__(
        self,
        groups: Groups,
        pool: BlockPool,
        threshold: float,
        min_pull_tokens: int,
        keeper: LeaseKeeper,
        usable: Callable[[Request], int],
    ) -> None:
        self._groups, self._pool, self._usable = groups, pool, usable
        self._min_pull_tokens, self._keeper = min_pull_tokens, keeper
        self.admission = Admission(threshold, pool.num_gpu_blocks)
        self._references: dict[str, Reference] = {}
        self._covered: dict[str, int] = {}
        self._loads: list[Load] = []
        self._pulled_tokens = 0
        self._recomputed: Counter[str] = Counter()

    def arrive(self, reference: Reference, request: Request) -> None:
        """Queue a request whose prompt was computed elsewhere.

        Raises:
            BadReferenceError: The reference is to another prompt; the request is computed here.
        """
        if request.abort_immediately:
            # The front end refused the request, or lost its client; its prompt is a stand-in.
            self._keeper.watch(request.request_id, reference)
            self._keeper.release(request.request_id)
            return
        tokens = request.prompt_token_ids
        if tokens is None:
            raise BadReferenceError("a prompt of embeddings has no tokens to check")
        covered = reference.check(tokens, extra_of(request))
        if reference.streams and self._groups.stop_early:
            covered -= 1
        self._references[request.request_id] = reference
        self._covered[request.request_id] = covered
        self.admission.arrive(request.request_id)
        self._keeper.watch(request.request_id, reference)

    def promise(self, request: Request, num_local: int) -> int | None:
        """Return how many tokens will be pulled; None to ask again later.

        Args:
            request: A waiting request.
            num_local: Tokens of which this instance has the attention's KV itself, whole blocks.
        """
        name = request.request_id
        if self.admission.stage(name) is not Stage.QUEUED:
            return 0
        if self._keeper.lost(name):
            return self._compute_here(name, "gone")
        covered = self._covered[name]
        if self._groups.stop_early and covered >= request.num_tokens:
            # What forgets stands behind the token that is computed here, and cannot go back.
            return self._compute_here(name, "position")
        remaining = covered - num_local
        if remaining < 1 or self._missing(request, num_local) < self._min_pull_tokens:
            return self._compute_here(name, "local")
        blocks = sum(len(group.wanted(num_local, covered)) for group in self._groups.all)
        if self.admission.may_accept(name, blocks, self._pool.get_num_free_blocks()):
            return remaining
        return None

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external: int) -> None:
        """Order a pull into the blocks that vLLM has set aside.

        vLLM may take nothing of what was promised, as for ``prompt_logprobs``, for which it
        computes the prompt in any case: the request must not hold those behind it up.
        """
        name = request.request_id
        if self.admission.stage(name) is not Stage.QUEUED:
            return
        if not num_external:
            self._compute_here(name, "unwanted")
            return
        covered, ids = self._covered[name], blocks.get_block_ids()
        parts = [
            group.targets(table, covered - num_external, covered)
            for group, table in zip(self._groups.all, ids, strict=True)
        ]
        spans, targets = tuple(span for span, _ in parts), tuple(own for _, own in parts)
        reference, tokens = self._references[name], request.prompt_token_ids
        assert tokens is not None
        digest = reference.digest or prompt_digest(tokens[:covered], extra_of(request))
        self._loads.append(Load(name, reference, digest, spans, targets))
        self.admission.accept(name, sum(map(len, spans)))
        self._pulled_tokens += num_external

    def step(self, output: SchedulerOutput, orders: Orders) -> None:
        """Add to a step's orders, and see who runs."""
        orders.loads, self._loads = self._loads, []
        for name in self.admission.accepted:
            if name in output.num_scheduled_tokens:
                self._forget(name)

    def loaded(self, names: Iterable[str]) -> None:
        """Note whose KV is here, or was given up."""
        for name in names:
            self.admission.loaded(name)
            self._keeper.unwatch(name)

    def finished(self, request: Request) -> None:
        """Drop a request; what it did not pull is released."""
        name = request.request_id
        if self.admission.stage(name) is Stage.QUEUED:
            self._keeper.release(name)
        self._forget(name)

    def take_counts(self) -> tuple[int, Counter[str]]:
        """Return tokens pulled, and prompts computed here by reason, since the last call."""
        counts = self._pulled_tokens, self._recomputed
        self._pulled_tokens, self._recomputed = 0, Counter()
        return counts

    def close(self) -> None:
        """End what runs in the background."""
        self._keeper.close()

    @property
    def has_orders(self) -> bool:
        """Whether the workers have yet to hear something."""
        return bool(self._loads)

    def _compute_here(self, name: str, reason: str) -> int:
        self._recomputed[reason] += 1
        self._keeper.release(name)
        self._forget(name)
        return 0

    def _forget(self, name: str) -> None:
        self.admission.leave(name)
        self._keeper.unwatch(name)
        self._references.pop(name, None)
        self._covered.pop(name, None)

    def _missing(self, request: Request, num_local: int) -> int:
        """Return the tokens that would be computed here without a pull."""
        # Attention's KV is of no use where no state stands at its end.
        own = self._usable(request) if self._groups.have_states else num_local
        return self._covered[request.request_id] - own


class LeaseKeeper:
    """Renews leases from a thread of its own, which waits for no peer.

    Also while a prompt is being pulled: from one worker of several, the others' leases go on.

    Args:
        connections: Connections to prefill workers.
        heartbeat_s: Time between renewals, in s.
    """

    def __init__(self, connections: PeerConnections, heartbeat_s: float) -> None:
        self._connections, self._heartbeat_s = connections, heartbeat_s
        self._watched: dict[str, Reference] = {}
        self._lost: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, request_id: str, reference: Reference) -> None:
        """Keep a lease from now on."""
        with self._lock:
            self._watched[request_id] = reference
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="pd-leases", daemon=True)
                # Where no thread can be started, the next lease tries again.
                with suppress(RuntimeError):
                    thread.start()
                    self._thread = thread

    def unwatch(self, request_id: str) -> None:
        """Keep a lease no more."""
        with self._lock:
            self._watched.pop(request_id, None)
            self._lost.discard(request_id)

    def release(self, request_id: str) -> None:
        """End a lease that is kept."""
        with self._lock:
            reference = self._watched.pop(request_id, None)
        if reference is not None:
            self._connections.release_later(reference)

    def lost(self, request_id: str) -> bool:
        """Whether a kept lease has ended nevertheless."""
        with self._lock:
            return request_id in self._lost

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._connections.close()

    def _run(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            with self._lock:
                kept = [one for one in self._watched.values() if not one.streams]
            self._connections.renew_later(kept, self._note_lost)

    def _note_lost(self, transfers: set[str]) -> None:
        with self._lock:
            self._lost |= {
                name
                for name, reference in self._watched.items()
                if reference.transfer_id in transfers
            }
