"""The scheduler's side of a prefill server: fetches what requests need, as soon as they arrive.

Of a request whose KV is pulled from another server nothing is fetched until tokens of an item have
to be computed here after all, as when the pull has failed.

A request's items are held from its arrival until it ends, so a preempted request finds them again.
Room in the arena is given in order of arrival and for all items of a request at once, so that no
two requests wait for each other; while one waits, its leases are renewed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from vllm.logger import init_logger

from vllm_plugins.kv_connectors.epd import metrics
from vllm_plugins.kv_connectors.epd.early_prefill import can_go_on
from vllm_plugins.kv_connectors.epd.media import MalformedError, Shape, Source, sources_of

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.request import Request

    from vllm_plugins.kv_connectors.epd.arena import Arena, Entry
    from vllm_plugins.kv_connectors.epd.metrics import Ledger

logger = init_logger("vllm.vllm_plugins.epd")


class Fetches(Protocol):
    """What fetches; see `fetcher.Fetcher`."""

    def fetch(
        self, entry: Entry, source: Source, deadline: float, done: Callable[[str, str], None]
    ) -> None:
        """Fetch an item into its room and say why it is missing, or what its digest is."""

    def release(self, source: Source, media: str) -> None:
        """End the lease on an item."""

    def renew(self, source: Source) -> None:
        """Renew a lease."""


@dataclass(frozen=True)
class PrefillRules:
    """How a prefill server treats items.

    Args:
        fetch_timeout_s: Longest time that fetching one item may take.
        lease_s: Time for which encode servers keep an item.
        encode_locally: Whether an item that cannot be had is encoded here, if its medium is here.
        early: Whether the text before a missing item is computed.
        lookahead: Tokens that a drafter reads ahead.
        allow_remote: Whether embeddings may come from another host.
    """

    fetch_timeout_s: float
    lease_s: float
    encode_locally: bool
    early: bool
    lookahead: int
    allow_remote: bool


@dataclass(eq=False)
class Item:
    """An item that is wanted and not here yet.

    Attributes:
        media: Its id.
        shape: What it must look like.
        sources: Where it can be fetched, by each request that wants it; the first is used.
        wanted_at: When the first request wanted it, on the monotonic clock.
        requests: Who wants it.
        missing: Why it cannot be had; empty as long as it may.
    """

    media: str
    shape: Shape
    sources: list[Source]
    wanted_at: float
    requests: set[str] = field(default_factory=set)
    missing: str = ""


@dataclass(eq=False)
class _Wanting:
    """A request, and which of its items are not here yet.

    Attributes:
        request: The request.
        pulled: Whether none of its items is wanted, as its KV comes from elsewhere.
        seen: How many of its items have been taken note of.
        items: Those that are wanted and not here yet.
    """

    request: Request
    pulled: bool
    seen: int = 0
    items: dict[str, Item] = field(default_factory=dict)


class PrefillSide:
    """Decides what is fetched, and who has to wait for it.

    Args:
        arena: Where embeddings go.
        fetcher: What fetches them.
        rules: How items are treated.
        shape_of: Shape of so many embeddings of a modality, as this engine's model wants them.
        has_medium: Whether an item could be encoded here, having come with its pixels or samples.
        ledger: Metrics.

    Attributes:
        fetcher: As above; may be replaced while nothing is fetched.
        rules: As above; may be replaced at any time.
    """

    def __init__(
        self,
        arena: Arena,
        fetcher: Fetches,
        rules: PrefillRules,
        shape_of: Callable[[int, str], Shape],
        has_medium: Callable[[MultiModalFeatureSpec], bool],
        ledger: Ledger,
    ) -> None:
        self._arena = arena
        self.fetcher = fetcher
        self.rules = rules
        self._shape_of = shape_of
        self._has_medium = has_medium
        self._ledger = ledger
        # Fetching threads call `_fetched`.
        self._lock = threading.RLock()
        self._requests: dict[str, _Wanting] = {}
        self._fetching: dict[str, Item] = {}
        self._no_room: deque[_Wanting] = deque()
        self._failed: set[str] = set()
        self._renewed_at = 0.0

    def arrived(self, request: Request) -> None:
        """Take note of a request's items and start fetching those that are not here."""
        with self._lock:
            wanting = self._requests.get(request.request_id)
            if wanting is None:
                wanting = _Wanting(request, _is_pulled(request))
                self._requests[request.request_id] = wanting
            if not wanting.pulled:
                self._want_new(wanting)

    def can_go_on(self, request: Request, computed: int) -> bool:
        """Whether a request can be scheduled behind so many computed tokens."""
        self.arrived(request)
        with self._lock:
            wanting = self._requests[request.request_id]
            if wanting.pulled and _has_item_behind(request, computed):
                wanting.pulled = False
                self._want_new(wanting)
            if request.request_id in self._failed:
                return False
            items = wanting.items
            if not items:
                return True
            return can_go_on(
                request.mm_features,
                lambda index: request.mm_features[index].identifier in items,
                computed,
                self.rules.lookahead,
                self.rules.early,
            )

    def is_missing(self, request: Request, index: int) -> bool:
        """Whether an item of a request is still to come."""
        feature = request.mm_features[index]
        with self._lock:
            name = request.request_id
            wanting = self._requests.get(name)
            if wanting is None or name in self._failed:
                return wanting is not None
            if feature.identifier in wanting.items:
                return True
            # Another request may have brought something else under the same id meanwhile.
            entry = self._arena.find(feature.identifier)
            tokens = feature.mm_position.get_num_embeds()
            if entry is None or entry.shape == self._shape_of(tokens, feature.modality):
                return False
            self._fail(wanting, feature.identifier, "mismatch")
            return True

    def misses_some(self, name: str) -> bool:
        """Whether any item of a request is still to come."""
        with self._lock:
            wanting = self._requests.get(name)
            return wanting is not None and bool(wanting.items)

    def take_failed(self) -> set[str]:
        """Return the requests that cannot be served."""
        with self._lock:
            return {name for name in self._failed if name in self._requests}

    def tick(self) -> None:
        """Give room that has become free, and renew leases of those that have none yet."""
        with self._lock:
            waiting, self._no_room = self._no_room, deque()
            while waiting:
                wanting = waiting.popleft()
                if wanting.request.request_id in self._requests and not self._try_room(wanting):
                    self._no_room.append(wanting)
                    # Nobody overtakes, or a large request would wait for ever.
                    self._no_room.extend(waiting)
                    break
            self._renew()

    def ended(self, name: str) -> None:
        """Forget a request; fetches for it alone go on and what they bring is kept as a cache."""
        with self._lock:
            wanting = self._requests.pop(name, None)
            self._failed.discard(name)
            for item in wanting.items.values() if wanting else ():
                item.requests.discard(name)
                if self._fetching.get(item.media) is not item:
                    # Its room was never given, so nobody will end its lease.
                    self.fetcher.release(item.sources[0], item.media)
            self._arena.release_all(name)
            if self._no_room:
                self.tick()

    def _want_new(self, wanting: _Wanting) -> None:
        """Start to fetch the items of a request that have not been taken note of."""
        new = wanting.request.mm_features[wanting.seen :]
        if not new:
            return
        wanting.seen += len(new)
        try:
            sources = sources_of(wanting.request.ec_transfer_params, self.rules.allow_remote)
        except MalformedError as error:
            self._refuse(wanting.request, str(error))
            return
        for feature in new:
            self._want(wanting, feature, sources.get(feature.identifier))
        self._give_room(wanting)

    def _want(
        self, wanting: _Wanting, feature: MultiModalFeatureSpec, source: Source | None
    ) -> None:
        name, media = wanting.request.request_id, feature.identifier
        shape = self._shape_of(feature.mm_position.get_num_embeds(), feature.modality)
        entry = self._arena.hold(media, name)
        if entry is not None and entry.shape != shape:
            # Encoding it here would not help: what is here would be loaded in its place.
            self._ledger.inc(metrics.MISSING, 1, "mismatch")
            self._fail(wanting, media, "mismatch")
        elif entry is not None:
            self._ledger.inc(metrics.REUSED)
            if source is not None:
                self.fetcher.release(source, media)
        elif source is None:
            if not self._has_medium(feature):
                self._refuse(wanting.request, f"item {media} has neither a medium nor a source")
        elif source.shape not in (None, shape):
            self._ledger.inc(metrics.MISSING, 1, "mismatch")
            self._cannot_have(wanting, media, "mismatch")
        elif media in self._fetching:
            self._ledger.inc(metrics.REUSED)
            self._join(wanting, self._fetching[media], source)
        elif media not in wanting.items:
            wanting.items[media] = Item(media, shape, [source], time.monotonic(), {name})

    def _join(self, wanting: _Wanting, item: Item, source: Source) -> None:
        item.sources.append(source)
        item.requests.add(wanting.request.request_id)
        wanting.items[item.media] = item

    def _give_room(self, wanting: _Wanting) -> None:
        needed = sum(self._arena.blocks_for(item.shape) for item in
                     wanting.items.values())  # fmt: skip
        if needed > self._arena.num_blocks:
            self._refuse(wanting.request, "its embeddings exceed the arena: raise arena_bytes")
        elif self._no_room or not self._try_room(wanting):
            self._no_room.append(wanting)

    def _try_room(self, wanting: _Wanting) -> bool:
        """Make room for all items of a request and start to fetch them; False where there is none.

        Meanwhile another request may have brought some of them.
        """
        name = wanting.request.request_id
        for media, item in list(wanting.items.items()):
            if self._arena.hold(media, name) is not None:
                del wanting.items[media]
                self._ledger.inc(metrics.REUSED)
                self.fetcher.release(item.sources[0], media)
            elif self._fetching.get(media, item) is not item:
                self._ledger.inc(metrics.REUSED)
                self._join(wanting, self._fetching[media], item.sources[0])
        new = [item for media, item in wanting.items.items() if media not in self._fetching]
        if any(self._arena.is_writing(item.media) for item in new):
            return False
        if not self._arena.fits(item.shape for item in new):
            return False
        for item in new:
            self._fetch(item)
        return True

    def _fetch(self, item: Item) -> None:
        source = item.sources[0]
        entry = self._arena.reserve(item.media, item.shape, _holder(item.media))
        assert entry is not None, "room was found for it"
        self._fetching[item.media] = item
        deadline = time.monotonic() + self.rules.fetch_timeout_s
        self.fetcher.fetch(
            entry,
            source,
            deadline,
            lambda missing, digest: self._fetched(item, entry, missing, digest),
        )

    def _fetched(self, item: Item, entry: Entry, missing: str, digest: str) -> None:
        """Hear from a fetching thread."""
        with self._lock:
            del self._fetching[item.media]
            wanting = [self._requests[name] for name in item.requests if name in self._requests]
            if missing:
                self._arena.discard(entry)
                self._ledger.inc(metrics.MISSING, 1, missing)
                for one in wanting:
                    self._cannot_have(one, item.media, missing)
                return
            self._arena.complete(entry, digest)
            for one in wanting:
                self._arena.hold(item.media, one.request.request_id)
                # One that shows the id in another size as well has failed, and wants it no more.
                one.items.pop(item.media, None)
            self._arena.release(item.media, _holder(item.media))
            for source in item.sources:
                self.fetcher.release(source, item.media)
        self._ledger.inc(metrics.FETCHED)
        self._ledger.inc(metrics.FETCHED_BYTES, entry.shape.nbytes)
        self._ledger.observe(metrics.FETCH_SECONDS, time.monotonic() - item.wanted_at)

    def _cannot_have(self, wanting: _Wanting, media: str, reason: str) -> None:
        """Encode an item here after all, or fail its request."""
        wanting.items.pop(media, None)
        features = [f for f in wanting.request.mm_features if f.identifier == media]
        if self.rules.encode_locally and all(map(self._has_medium, features)):
            return
        self._fail(wanting, media, reason)

    def _fail(self, wanting: _Wanting, media: str, reason: str) -> None:
        name = wanting.request.request_id
        logger.error(
            "vllm-plugins: epd: request %s fails: item %s cannot be had (%s); sending it again "
            "encodes it again",
            name,
            media,
            reason,
        )
        self._failed.add(name)

    def _refuse(self, request: Request, reason: str) -> None:
        if request.request_id in self._failed:
            return
        logger.error("vllm-plugins: epd: request %s refused: %s", request.request_id, reason)
        self._ledger.inc(metrics.REFUSED)
        self._failed.add(request.request_id)

    def _renew(self) -> None:
        now = time.monotonic()
        if not self._no_room or now - self._renewed_at < self.rules.lease_s / 3:
            return
        self._renewed_at = now
        waiting = {item.sources[0] for one in self._no_room for item in one.items.values()}
        for source in {source.lease: source for source in waiting}.values():
            self.fetcher.renew(source)


def _is_pulled(request: Request) -> bool:
    """Whether a prompt's KV comes from another server, in the protocol of vLLM's connectors."""
    return bool((request.kv_transfer_params or {}).get("do_remote_prefill"))


def _has_item_behind(request: Request, computed: int) -> bool:
    """Whether tokens of an item are still to be computed behind so many."""
    places = (feature.mm_position for feature in request.mm_features)
    return any(place.offset + place.length > computed for place in places)


def _holder(media: str) -> str:
    """Name under which an item is held while it is fetched."""
    return f"fetch {media}"
