"""Putting one request's KV together from stored runs: load, check, select, recompute.

The layers up to the check layer run over the whole span, so that their KV is fresh for every token.
At the check layer the values just computed are compared with the stored ones, which says how far
each reused token deviates; a selector (``deviation.py``) chooses from them, and the remaining
layers run over what was chosen and over the gaps, each row attending to everything up to its own
position.

The work is done in slices, so that other requests' decodes run between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from vllm_plugins.engine.kv_pages import KVPages
from vllm_plugins.engine.partial_forward import PartialForward, Rows, slot_mapping
from vllm_plugins.kv_connectors.kvshare.deviation import (
    SELECTORS,
    Budget,
    Reused,
    SelectorName,
    value_deviation,
)
from vllm_plugins.kv_connectors.kvshare.payloads import Payloads, Piece
from vllm_plugins.kv_connectors.kvshare.refresh import Stale
from vllm_plugins.kv_connectors.kvshare.rope import PositionShift
from vllm_plugins.kv_connectors.kvshare.transfer import Reuse


@dataclass(frozen=True)
class Recipe:
    """How requests are blended; the same for all of them.

    Attributes:
        check_layer: c, the last layer that runs over every token of the span.
        selector: Rule that chooses among the reused tokens.
        budget: How much it may choose.
        link_tokens: m, tokens at the start of a run whose left context changed.
    """

    check_layer: int
    selector: SelectorName
    budget: Budget
    link_tokens: int


@dataclass(frozen=True)
class Kitchen:
    """What blending works with in one worker."""

    pages: KVPages
    forward: PartialForward
    payloads: Payloads
    shift: PositionShift
    recipe: Recipe


class Blend:
    """One request's KV in the making.

    Args:
        reuse: What to make.
        kitchen: What to make it with.
        seed: For the random selector; the same on every rank.

    Raises:
        LostSegmentError: A source is not stored as it should be.
    """

    def __init__(self, reuse: Reuse, kitchen: Kitchen, seed: int = 0) -> None:
        self.reuse = reuse
        self._kitchen = kitchen
        self._seed = seed
        self._pieces = [Piece(s.key, s.offset, s.length) for s in reuse.sources]
        kitchen.payloads.check(self._pieces)
        positions = [np.arange(s.start, s.start + s.length) for s in reuse.sources]
        self._reused = np.concatenate(positions)
        self.deviation = np.zeros(len(self._reused), np.float32)
        self.chosen = np.zeros(len(self._reused), bool)
        self._steps = self._load_exact() if reuse.exact else self._blend()

    def advance(self, budget: float) -> tuple[bool, float]:
        """Go on with the work.

        Args:
            budget: Tokens through all layers that this slice may cost; it ends with the first piece
                of work that reaches it.

        Returns:
            Whether the KV is complete, and what the slice cost.

        Raises:
            LostSegmentError: A source went missing meanwhile.
        """
        spent = 0.0
        for cost in self._steps:
            spent += cost
            if spent >= budget:
                return False, spent
        return True, spent

    @property
    def recomputed(self) -> int:
        """Reused tokens that were chosen to be computed again."""
        return int(self.chosen.sum())

    def stale(self, share: float) -> Stale:
        """Return the reused tokens that were not recomputed.

        Args:
            share: Part of the reused tokens that may be recomputed while the request decodes.
        """
        kept = ~self.chosen
        allowance = int(share * len(self._reused))
        return Stale(self._reused[kept], self.deviation[kept], allowance)

    def _load_exact(self) -> Iterator[float]:
        self._load(range(self._kitchen.pages.num_layers))
        yield 0.0

    def _blend(self) -> Iterator[float]:
        check, layers = self._kitchen.recipe.check_layer, self._kitchen.pages.num_layers
        upper = range(check + 1, layers)
        self._load(upper)
        span = self._rows(np.arange(self.reuse.start, self.reuse.end))
        yield from self._run(span, range(check + 1))
        self._select(check)
        yield from self._run(span.take(self._to_recompute()), upper)

    def _rows(self, positions: np.ndarray) -> Rows:
        return Rows(positions, self.reuse.block_ids, self.reuse.token_ids[positions])

    def _run(self, rows: Rows, layers: range) -> Iterator[float]:
        """Run rows through layers, a pass at a time; the rows keep their hidden states."""
        forward, share = self._kitchen.forward, len(layers) / self._kitchen.pages.num_layers
        done: list[Rows] = []
        for piece in forward.split(rows):
            forward.run([piece], layers)
            done.append(piece)
            yield len(piece.positions) * share
        rows.join(done)

    def _slots(self, positions: np.ndarray) -> torch.Tensor:
        pages = self._kitchen.pages
        slots = slot_mapping(self.reuse.block_ids, positions, pages.block_size)
        return torch.from_numpy(slots).to(pages.device, non_blocking=True)

    def _load(self, layers: range) -> None:
        """Write the stored KV of some layers to its new positions."""
        kitchen, device = self._kitchen, self._kitchen.pages.device
        origin = [np.arange(s.position, s.position + s.length) for s in self.reuse.sources]
        source = torch.from_numpy(np.concatenate(origin)).to(device)
        target = torch.from_numpy(self._reused).to(device)
        slots = self._slots(self._reused)
        for layer in layers:
            keys = kitchen.payloads.load(layer, 0, self._pieces)
            values = kitchen.payloads.load(layer, 1, self._pieces)
            kitchen.pages.write(layer, kitchen.shift(keys, source, target), values, slots)

    def _select(self, check: int) -> None:
        kitchen, recipe = self._kitchen, self._kitchen.recipe
        # Segments may have been lost while the check layers ran.
        kitchen.payloads.check(self._pieces)
        new = kitchen.pages.read_values(check, self._slots(self._reused))
        old = kitchen.payloads.load(check, 1, self._pieces)
        deviation, norm = kitchen.forward.sum_over_ranks(*value_deviation(new, old))
        self.deviation = deviation.cpu().numpy()
        reused = Reused(self.deviation, norm.cpu().numpy(), self._links(), self._seed)
        self.chosen = SELECTORS[recipe.selector](reused, recipe.budget)

    def _links(self) -> np.ndarray:
        """Mark the first tokens of each run that begins at a seam."""
        lengths = [source.length for source in self.reuse.sources]
        links = np.zeros(len(self._reused), bool)
        starts = np.cumsum([0, *lengths[:-1]])
        for start, source in zip(starts, self.reuse.sources, strict=True):
            if not source.continues:
                links[start : start + min(source.length, self._kitchen.recipe.link_tokens)] = True
        return links

    def _to_recompute(self) -> np.ndarray:
        """Return the chosen rows and all gaps, as indices into the span."""
        wanted = np.ones(self.reuse.end - self.reuse.start, bool)
        wanted[self._reused[~self.chosen] - self.reuse.start] = False
        return np.flatnonzero(without_single_holes(wanted))


def without_single_holes(wanted: np.ndarray) -> np.ndarray:
    """Return a mask with holes of one element filled: a row more, but one virtual request less."""
    filled = wanted.copy()
    filled[1:-1] |= wanted[:-2] & wanted[2:]
    return filled
