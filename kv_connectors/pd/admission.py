"""DistServe's acceptance rule of a decode instance (section 4 of the paper; its code's defaults).

After every step the decode instance accepts from the head of its queue while both hold::

    sum(blocks(prompt) of those accepted and not yet running) < threshold * all blocks
    blocks(prompt of the head) <= free blocks

so it pulls only what it can run soon, and the rest waits on the prefill instances, whose memory is
the queue. The order is first come, first served, and the head blocks all others: vLLM *skips* a
request that a connector holds back, so the order has to be kept here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Stage(Enum):
    """Where a request that is handed over stands on the decode instance."""

    QUEUED = "queued"
    LOADING = "loading"
    READY = "ready"


@dataclass
class Admission:
    """Decides which queued request may be pulled next.

    Args:
        threshold: ``waiting_block_prop_threshold``, share of the pool in (0, 1].
        total_blocks: KV blocks of the instance.
    """

    threshold: float
    total_blocks: int
    _queued: dict[str, None] = field(default_factory=dict)
    _accepted: dict[str, tuple[Stage, int]] = field(default_factory=dict)
    _accepted_blocks: int = 0

    def arrive(self, request_id: str) -> None:
        """Put a request at the end of the queue."""
        self._queued[request_id] = None

    def may_accept(self, request_id: str, blocks: int, free_blocks: int) -> bool:
        """Whether the rule accepts a request now; changes nothing, since vLLM may ask again.

        Args:
            request_id: A queued request.
            blocks: Blocks that its prompt still needs here.
            free_blocks: Blocks that are free here.
        """
        return (
            next(iter(self._queued), None) == request_id
            and self._accepted_blocks < self.threshold * self.total_blocks
            and blocks <= free_blocks
        )

    def accept(self, request_id: str, blocks: int) -> None:
        """Take a queued request out of the queue; its blocks are allocated, its KV is pulled."""
        del self._queued[request_id]
        self._accepted[request_id] = (Stage.LOADING, blocks)
        self._accepted_blocks += blocks

    def loaded(self, request_id: str) -> None:
        """Note that a request's KV is here; it counts until it runs."""
        if request_id in self._accepted:
            self._accepted[request_id] = (Stage.READY, self._accepted[request_id][1])

    def leave(self, request_id: str) -> None:
        """Forget a request that runs, or has ended at whatever stage."""
        self._queued.pop(request_id, None)
        if request_id in self._accepted:
            self._accepted_blocks -= self._accepted.pop(request_id)[1]

    def stage(self, request_id: str) -> Stage | None:
        """Return a request's stage; None once it runs or where it was never queued."""
        if request_id in self._queued:
            return Stage.QUEUED
        return self._accepted.get(request_id, (None, 0))[0]

    @property
    def queued(self) -> list[str]:
        """The queued requests, in order of arrival."""
        return list(self._queued)

    @property
    def accepted_blocks(self) -> int:
        """Blocks of requests that are accepted and do not run yet."""
        return self._accepted_blocks

    @property
    def ready(self) -> int:
        """How many requests have their KV here and do not run yet."""
        return sum(stage is Stage.READY for stage, _ in self._accepted.values())

    @property
    def accepted(self) -> list[str]:
        """The accepted requests that do not run yet."""
        return list(self._accepted)
