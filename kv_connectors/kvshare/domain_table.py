"""Segments of one tenant domain: how they are found, and in what order they go.

A queue for new segments and one for proven ones, after S3-FIFO (Yang et al. 2023). New segments
that nobody reused go first, as long as they hold more than a tenth of the domain's tokens, so a
flood of one-time text passes through that tenth. A reused segment moves to the proven ones, where
every hit (up to three) spares it one eviction. Text that comes back after its eviction is
recognised by its anchors, whatever surrounds it, and is proven at once, so a new working set needs
two rounds to displace an old one.
"""

from __future__ import annotations

from collections import OrderedDict

from vllm_plugins.kv_connectors.kvshare.segments import Segment

NEW_SHARE = 0.1
"""Part of a domain's tokens that segments which nobody reused yet are left with."""

LEAST_GHOSTS = 64
"""Anchors of evicted text that a domain remembers at least."""


class DomainTable:
    """Segments of one domain.

    Args:
        anchor_places: Places remembered per anchor, the newest ones.

    Attributes:
        used: Tokens of all segments.
        evictable: Tokens of those that no plan uses.
        seen: Time of the domain's last request, in seconds.
        contents: Segments by digest of their whole text, oldest first.
        anchors: By anchor hash where it stands: ``(segment, offset)``, oldest first.
    """

    def __init__(self, anchor_places: int) -> None:
        self.used = 0
        self.evictable = 0
        self.seen = 0.0
        self.contents: dict[bytes, list[Segment]] = {}
        self.anchors: dict[int, list[tuple[Segment, int]]] = {}
        self._places = anchor_places
        self._new: OrderedDict[int, Segment] = OrderedDict()
        self._new_tokens = 0
        self._proven: OrderedDict[int, Segment] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()

    def add(self, segment: Segment) -> None:
        """Take a new segment."""
        self.used += len(segment)
        self.contents.setdefault(segment.content, []).append(segment)
        hashes: list[int] = segment.anchors.hashes.tolist()
        known = sum(anchor in self._ghosts for anchor in hashes)
        segment.proven = 2 * known >= len(hashes) > 0
        for anchor, offset in zip(hashes, segment.anchors.offsets.tolist(), strict=True):
            places = self.anchors.setdefault(anchor, [])
            places.append((segment, offset))
            del places[: -self._places]
        self.enqueue(segment)

    def hide(self, segment: Segment) -> None:
        """Let a segment be found no more."""
        same = self.contents[segment.content]
        same.remove(segment)
        if not same:
            del self.contents[segment.content]
        for anchor in set(segment.anchors.hashes.tolist()):
            places = [place for place in self.anchors.get(anchor, ()) if place[0] is not segment]
            if places:
                self.anchors[anchor] = places
            else:
                self.anchors.pop(anchor, None)

    def enqueue(self, segment: Segment) -> None:
        """Let a segment that nobody uses be evicted, after all others of its kind."""
        self.evictable += len(segment)
        if segment.proven:
            self._proven[segment.key] = segment
        else:
            self._new[segment.key] = segment
            self._new_tokens += len(segment)

    def dequeue(self, segment: Segment) -> None:
        """Keep a segment from being evicted."""
        self.evictable -= len(segment)
        if segment.proven:
            del self._proven[segment.key]
        else:
            del self._new[segment.key]
            self._new_tokens -= len(segment)

    def next_victim(self) -> Segment | None:
        """Return the queued segment that should go next; hits spare those before it."""
        while self._new or self._proven:
            crowded = self._new_tokens > NEW_SHARE * self.used
            queue = self._new if self._new and (crowded or not self._proven) else self._proven
            segment = next(iter(queue.values()))
            if not segment.chances:
                return segment
            self._spare(segment)
        return None

    def _spare(self, segment: Segment) -> None:
        self.dequeue(segment)
        # All chances of a new segment buy its proof: its hits may all have been one burst.
        segment.chances = segment.chances - 1 if segment.proven else 0
        segment.proven = True
        self.enqueue(segment)

    def remember(self, segment: Segment) -> None:
        """Remember the anchors of an evicted segment, for as many others as the domain holds."""
        for anchor in segment.anchors.hashes.tolist():
            self._ghosts[anchor] = None
            self._ghosts.move_to_end(anchor)
        while len(self._ghosts) > max(LEAST_GHOSTS, len(self.anchors)):
            self._ghosts.popitem(last=False)
