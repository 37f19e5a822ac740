"""Which text is stored: look-up by content and by anchor, and what goes when room is needed.

Everything is kept per tenant domain; no look-up sees another domain's text. In what order a
domain's own segments go says ``domain_table.py``; segments in use by a plan do not.

**Whose.** A domain that holds no more than its quota loses nothing to others for as long as it is
active, so that nobody learns by filling the store that others have done so, or were there before.
The quota is an eighth of the store or, with more active holders than eight, an equal share; so how
many are active is all that shows. What it holds beyond its quota is borrowed; a domain that stays
within its own quota may take it back, in whole segments. A domain beyond its quota lives off
itself. A domain without a request for ``idle_seconds`` has no claim; without that, domains that
never return would fill the store. Domains of one *holder*, the first half of their digests, have
one quota between them, so that a tenant does not get more by dividing its domain.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import TYPE_CHECKING

from vllm_plugins.kv_connectors.kvshare.domain_table import DomainTable
from vllm_plugins.kv_connectors.kvshare.segments import DIGEST_BYTES, Draft, Segment

if TYPE_CHECKING:
    from vllm_plugins.kv_connectors.kvshare.transfer import Label

MAX_CHANCES = 3
"""Most evictions that a segment is spared because of its hits."""


@dataclass(frozen=True)
class Stored:
    """What became of drafts.

    Args:
        segments: One for each draft; None where there was no room for it.
        evicted: Keys of the segments that went to make room.
    """

    segments: list[Segment | None]
    evicted: list[int]


class SegmentIndex:
    """The stored segments of all domains; iterates over their keys, oldest first.

    ``version`` changes whenever a plan that was made before may name a segment that is gone, or
    miss one that is there.

    Args:
        capacity: Tokens that the store holds.
        least_shares: Equal shares that the store has at least; a domain's quota is one of them.
        anchor_places: Places remembered per anchor, the newest ones.
        idle_seconds: Time without a request after which a domain's quota lapses.
        clock: Time in seconds.
    """

    def __init__(
        self,
        capacity: int,
        *,
        least_shares: int = 8,
        anchor_places: int = 4,
        idle_seconds: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.capacity = capacity
        self.used = 0
        self.version = 0
        self._least_shares = least_shares
        self._anchor_places = anchor_places
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._ticks = 0
        self._next_key = 0
        self._segments: dict[int, Segment] = {}
        # By last use, the longest idle first.
        self._domains: OrderedDict[bytes, DomainTable] = OrderedDict()
        self._doomed: set[int] = set()

    def __len__(self) -> int:
        return len(self._segments)

    def __iter__(self) -> Iterator[int]:
        return iter(self._segments)

    def __contains__(self, key: int) -> bool:
        return key in self._segments

    def get(self, key: int) -> Segment | None:
        """Return a stored segment."""
        return self._segments.get(key)

    def domain_used(self, domain: bytes) -> int:
        """Return the tokens that a domain holds."""
        table = self._domains.get(domain)
        return table.used if table else 0

    @property
    def quota(self) -> int:
        """Tokens that an active holder never loses to others."""
        lapsed = sum(1 for _ in self._lapsed())
        active = {holder(name) for name in islice(self._domains, lapsed, None)}
        return self.capacity // max(self._least_shares, len(active))

    def by_content(self, domain: bytes, content: bytes) -> Sequence[Segment]:
        """Return a domain's segments whose whole text has a digest, oldest first."""
        table = self._domains.get(domain)
        return table.contents.get(content, ()) if table else ()

    def by_anchors(
        self, domain: bytes, anchors: Sequence[int]
    ) -> Iterator[Sequence[tuple[Segment, int]]]:
        """Yield for each anchor hash where it stands: ``(segment, offset)``, oldest first."""
        table = self._domains.get(domain)
        places = table.anchors if table else {}
        return (places.get(anchor, ()) for anchor in anchors)

    def store(self, domain: bytes, drafts: Sequence[Draft]) -> Stored:
        """Add drafts in order, each with the room that can be made for it."""
        stored = Stored([], [])
        if domain in self._domains:
            # A request keeps its domain active, whether or not anything in it is new.
            self._table(domain)
        previous: Segment | None = None
        for draft in drafts:
            stored.evicted.extend(self.make_room(domain, len(draft.tokens)))
            previous = self.add(domain, draft, previous if draft.continues else None)
            stored.segments.append(previous)
            if previous:
                # So that no draft makes room for itself at its neighbours' expense.
                self._hold(previous)
        for segment in stored.segments:
            if segment:
                self._release(segment)
        return stored

    def add(self, domain: bytes, draft: Draft, previous: Segment | None = None) -> Segment | None:
        """Add a draft.

        Args:
            domain: Digest of its domain.
            draft: What to add.
            previous: The segment made of the draft that this one continues, if still stored.

        Returns:
            None where there is no room; see `make_room`.
        """
        if self.used + len(draft.tokens) > self.capacity:
            return None
        key = self._next_key
        self._next_key += 1
        return self._insert(key, domain, draft, previous.source if previous else key, previous)

    def _insert(
        self,
        key: int,
        domain: bytes,
        text: Draft | Label,
        source: int,
        previous: Segment | None,
    ) -> Segment:
        segment = Segment(
            key=key,
            domain=domain,
            tokens=text.tokens,
            position=text.position,
            context=text.context,
            generation=text.generation,
            content=text.content,
            anchors=text.anchors,
            source=source,
            previous=previous,
            last_used=self._ticks,
        )
        if previous:
            previous.following = segment
        self._segments[key] = segment
        self.used += len(segment)
        self.version += 1
        self._table(domain).add(segment)
        return segment

    def restore(self, labels: Mapping[int, Label], first_key: int) -> None:
        """Take back the segments of an earlier life, with their keys and links.

        Args:
            labels: By key. Where not all of them fit, the newest are taken.
            first_key: Least key that a new segment may get; no key is used twice.
        """
        room, fitting = self.capacity - self.used, []
        for key in sorted(labels, reverse=True):
            if len(labels[key].tokens) <= room:
                room -= len(labels[key].tokens)
                fitting.append(key)
        for key in reversed(fitting):
            label = labels[key]
            self._insert(key, label.domain, label, label.source, self._left_neighbour(label))
        self._next_key = max(self._next_key, first_key, max(labels, default=-1) + 1)

    def _left_neighbour(self, label: Label) -> Segment | None:
        """Return the segment that a restored one continues, if that is stored too."""
        previous = self._segments.get(label.previous) if label.previous is not None else None
        if (
            previous is None
            or previous.following is not None
            or (previous.domain, previous.source) != (label.domain, label.source)
            or previous.position + len(previous) != label.position
        ):
            return None
        return previous

    def pin(self, segments: Iterable[Segment]) -> None:
        """Keep the segments of a plan from being evicted, and count that they were hit."""
        self._ticks += 1
        for segment in segments:
            if segment.key not in self._segments:
                raise ValueError(f"segment {segment.key} is not stored any more: plan again")
            self._table(segment.domain)
            self._hold(segment)
            segment.hits += 1
            segment.chances = min(segment.chances + 1, MAX_CHANCES)
            segment.last_used = self._ticks

    def unpin(self, segments: Iterable[Segment]) -> list[int]:
        """Let go of a plan's segments; return the keys of those that had to go meanwhile."""
        return [segment.key for segment in segments if self._release(segment)]

    def remove(self, key: int) -> bool:
        """Forget a segment, such as one whose KV was lost.

        Returns:
            False where plans in flight still use it: it is found no more, and gone once they let
            go.
        """
        segment = self._segments[key]
        if segment.references:
            if key not in self._doomed:
                self._doomed.add(key)
                self._hide(segment)
            return False
        self._drop(segment)
        return True

    def make_room(self, domain: bytes, tokens: int) -> list[int]:
        """Evict until ``tokens`` more fit for a domain; nothing where that is out of reach.

        Returns:
            The keys of what was evicted.
        """
        evicted: list[int] = []
        for table, floor in self._givers(domain, tokens):
            while self.used + tokens > self.capacity:
                segment = table.next_victim()
                if segment is None or table.used <= floor:
                    break
                table.remember(segment)
                self._drop(segment)
                evicted.append(segment.key)
        return evicted

    def _givers(self, domain: bytes, tokens: int) -> list[tuple[DomainTable, int]]:
        """Return the domains that together give room, in order, and how much each keeps."""
        missing = self.used + tokens - self.capacity
        givers: list[tuple[DomainTable, int]] = []
        if missing <= 0:
            return givers
        for table, floor in self._possible_givers(domain, tokens):
            givers.append((table, floor))
            missing -= min(table.evictable, table.used - floor)
            if missing <= 0:
                return givers
        return []

    def _possible_givers(self, domain: bytes, tokens: int) -> Iterator[tuple[DomainTable, int]]:
        asking, mine = self._domains.get(domain), holder(domain)
        lapsed = list(self._lapsed())
        yield from ((table, 0) for table in lapsed if table is not asking)
        held: dict[bytes, list[DomainTable]] = {mine: []}
        for place, (name, table) in enumerate(self._domains.items()):
            if place >= len(lapsed) or name == domain:
                held.setdefault(holder(name), []).append(table)
        used = {name: sum(table.used for table in tables) for name, tables in held.items()}
        quota = self.capacity // max(self._least_shares, len(held))
        if used[mine] + tokens <= quota:
            for name in sorted(held, key=lambda name: -used[name]):
                if name != mine and used[name] > quota:
                    yield from _beyond(held[name], used[name] - quota)
        if asking:
            yield asking, 0
        yield from ((table, 0) for table in held[mine] if table is not asking)

    def _lapsed(self) -> Iterator[DomainTable]:
        """Yield the domains that have no claim any more, the longest idle first."""
        since = self._clock() - self._idle_seconds
        return takewhile(lambda table: table.seen < since, self._domains.values())

    def _table(self, domain: bytes) -> DomainTable:
        """Return the table of a domain that has a request now."""
        table = self._domains.get(domain)
        if table is None:
            table = self._domains[domain] = DomainTable(self._anchor_places)
        table.seen = self._clock()
        self._domains.move_to_end(domain)
        return table

    def _hold(self, segment: Segment) -> None:
        if not segment.references:
            self._domains[segment.domain].dequeue(segment)
        segment.references += 1

    def _release(self, segment: Segment) -> bool:
        """Drop a reference; whether the segment is gone with it."""
        segment.references -= 1
        if segment.references:
            return False
        self._domains[segment.domain].enqueue(segment)
        if segment.key not in self._doomed:
            return False
        self._drop(segment)
        return True

    def _hide(self, segment: Segment) -> None:
        self.version += 1
        self._domains[segment.domain].hide(segment)
        if segment.previous:
            segment.previous.following = None
        if segment.following:
            segment.following.previous = None
        segment.previous = segment.following = None

    def _drop(self, segment: Segment) -> None:
        if segment.key in self._doomed:
            self._doomed.remove(segment.key)
        else:
            self._hide(segment)
        table = self._domains[segment.domain]
        table.dequeue(segment)
        table.used -= len(segment)
        self.used -= len(segment)
        del self._segments[segment.key]
        if not table.used:
            del self._domains[segment.domain]


def holder(domain: bytes) -> bytes:
    """Return whose a domain is: the half of its digest that its tenant's other domains share."""
    return domain[: DIGEST_BYTES // 2]


def _beyond(tables: Sequence[DomainTable], borrowed: int) -> Iterator[tuple[DomainTable, int]]:
    """Yield a holder's domains, the longest idle first, with what each keeps of what it holds."""
    for table in tables:
        given = min(table.used, borrowed)
        borrowed -= given
        if given:
            yield table, table.used - given
