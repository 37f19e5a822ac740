"""The scheduler's side of an encode server: room before encoding, a lease after it.

A request waits until the arena has room for all of its items, so an embedding is never lost for
want of room. A worker writes an item as soon as it is encoded and stamps it; when the request
ends, its items are leased and its answer says where they are.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from vllm_plugins.kv_connectors.epd import metrics
from vllm_plugins.kv_connectors.epd.media import KEY, Shape, Source
from vllm_plugins.kv_connectors.epd.orders import Copy

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_plugins.kv_connectors.epd.arena import Arena, Entry
    from vllm_plugins.kv_connectors.epd.metrics import Ledger
    from vllm_plugins.kv_connectors.epd.shared_memory import SharedMemory
    from vllm_plugins.wire.address import Address

logger = init_logger("vllm.vllm_plugins.epd")

PUBLISH = "publish"
"""Under `KEY` in a request's ``ec_transfer_params``: publish, on a server that also prefills."""

_ENDED_WELL = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


class EncodeSide:
    """Decides what is written to the arena, and hands out leases.

    Args:
        arena: The store.
        memory: Where workers stamp what they have written.
        shape_of: Shape of so many embeddings of a modality.
        address: Where prefill servers fetch.
        generation: Name of this server's life, in hexadecimal.
        lease_s: Seconds for which the items of an ended request are kept.
        describe: Gives the placeholder metadata of a request's items, by media id.
        always: Whether every request publishes, or only those that ask for it.
        ledger: Metrics.
    """

    def __init__(
        self,
        arena: Arena,
        memory: SharedMemory,
        shape_of: Callable[[int, str], Shape],
        address: Address,
        generation: str,
        lease_s: float,
        describe: Callable[[Request], dict[str, dict[str, Any]]],
        always: bool,
        ledger: Ledger,
    ) -> None:
        self._arena = arena
        self._memory = memory
        self._shape_of = shape_of
        self._address = address
        self._generation = generation
        self._lease_s = lease_s
        self._describe = describe
        self._always = always
        self._ledger = ledger
        self._requests: dict[str, list[Entry]] = {}
        self._deferred: set[str] = set()
        self._refused: set[str] = set()
        self._unwritten: dict[str, Entry] = {}
        self._orders: dict[str, Copy] = {}
        # Step in which each order went out that no worker has answered yet.
        self._ordered: dict[str, int] = {}

    def wants(self, request: Request) -> bool:
        """Whether a request's items are to be published."""
        if self._always:
            return True
        ours = (request.ec_transfer_params or {}).get(KEY)
        return isinstance(ours, dict) and ours.get(PUBLISH) is True

    def admit(self, request: Request) -> bool:
        """Whether there is room for all items of a request, which is then its own."""
        name = request.request_id
        if name in self._requests:
            return True
        if name in self._refused:
            return False
        self.settle()
        wanted = self._wanted(request)
        if sum(map(self._arena.blocks_for, wanted.values())) > self._arena.num_blocks:
            self._refuse(request, "its embeddings exceed the arena: raise arena_bytes")
            return False
        taken = self._take(name, wanted)
        if taken is None:
            if name not in self._deferred:
                self._deferred.add(name)
                self._ledger.inc(metrics.DEFERRED)
            return False
        if any(entry.shape != wanted[entry.media] for entry in taken):
            self._arena.release_all(name)
            self._refuse(request, "two items of one id differ in size")
            return False
        self._requests[name] = taken
        return True

    def must_write(self, media: str) -> bool:
        """Whether somebody waits for an item to be written that no worker has been told of."""
        return media in self._unwritten and media not in self._ordered

    def order(self, media: str) -> None:
        """Have an item written in this step: it is encoded in it, or was already."""
        entry = self._unwritten[media]
        self._orders[media] = Copy(media, entry.shape, entry.blocks, entry.sequence)

    def take_orders(self, step: int) -> list[Copy]:
        """Return what to write in a step."""
        self.settle()
        orders = list(self._orders.values())
        self._orders.clear()
        self._ordered.update((copy.media, step) for copy in orders)
        return orders

    def take_refused(self) -> set[str]:
        """Return the requests that can never be served and have not been reported yet."""
        refused, self._refused = self._refused, set()
        return refused

    def ended(self, request: Request) -> dict[str, Any] | None:
        """Lease what a request has encoded.

        Returns:
            The answer's ``ec_transfer_params``; None where nothing was published.
        """
        self._deferred.discard(request.request_id)
        self._refused.discard(request.request_id)
        entries = self._requests.pop(request.request_id, [])
        self.settle()
        answer = None
        if request.status in _ENDED_WELL:
            answer = self._lease(request, [entry for entry in entries if entry.is_complete])
            for entry in entries:
                if not entry.is_complete:
                    logger.error("vllm-plugins: epd: no worker wrote item %s", entry.media)
        self._arena.release_all(request.request_id)
        for entry in entries:
            # A worker may still be about to write what was ordered.
            if not entry.holders and self.must_write(entry.media):
                self._drop(entry)
        return answer

    def settle(self) -> None:
        """Take note of what workers have written."""
        if not self._unwritten:
            return
        done = self._memory.steps_done()
        for media, entry in list(self._unwritten.items()):
            sequence, digest = self._memory.stamped(entry.blocks[0])
            if sequence == entry.sequence:
                self._arena.complete(entry, digest)
                del self._unwritten[media]
                self._ordered.pop(media, None)
                self._ledger.inc(metrics.PUBLISHED)
            elif self._ordered.get(media, done + 1) <= done:
                # No worker had it. Another request may bring it again.
                del self._ordered[media]
                if not entry.holders:
                    self._drop(entry)

    def _wanted(self, request: Request) -> dict[str, Shape]:
        return {
            feature.identifier: self._shape_of(
                request.get_num_encoder_embeds(index), feature.modality
            )
            for index, feature in enumerate(request.mm_features)
            if request.get_num_encoder_embeds(index)
        }

    def _take(self, name: str, wanted: dict[str, Shape]) -> list[Entry] | None:
        """Hold all items, making room for new ones; all or none, so that no two requests wait."""
        taken = [entry for media in wanted if (entry := self._arena.share(media, name))]
        here = {entry.media for entry in taken}
        new = {media: shape for media, shape in wanted.items() if media not in here}
        if self._arena.fits(new.values()):
            for media, shape in new.items():
                entry = self._arena.reserve(media, shape, name)
                if entry is None:
                    break
                self._unwritten[media] = entry
                taken.append(entry)
        if len(taken) == len(wanted):
            return taken
        self._arena.release_all(name)
        for entry in taken:
            if entry.media in new:
                self._drop(entry)
        return None

    def _drop(self, entry: Entry) -> None:
        self._unwritten.pop(entry.media, None)
        self._arena.discard(entry)

    def _refuse(self, request: Request, reason: str) -> None:
        logger.error("vllm-plugins: epd: request %s refused: %s", request.request_id, reason)
        self._ledger.inc(metrics.REFUSED)
        self._refused.add(request.request_id)

    def _lease(self, request: Request, entries: list[Entry]) -> dict[str, Any] | None:
        if not entries:
            return None
        lease = secrets.token_hex(16)
        self._arena.lease([entry.media for entry in entries], lease, self._lease_s)
        ends = time.time() + self._lease_s
        answer = self._describe(request)
        for entry in entries:
            where = Source(self._address, self._generation, entry.shape, entry.digest, lease, ends)
            answer[entry.media][KEY] = where.to_json()
        return answer
