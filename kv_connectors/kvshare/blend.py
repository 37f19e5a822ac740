"""Putting one request's KV together from stored runs: load, check, select, recompute.

The layers before the check layer run over the whole span, and of the check layer what its keys and
values take (``check_pass.py``), so that KV up to there is fresh for every token. The values just
computed are compared with the stored ones, which says how far each reused token deviates; a
selector (``deviation.py``) chooses from them, and the layers from the check layer on run over what
was chosen and over the gaps, each row attending to everything up to its own position.

The work is done in slices, so that other requests' decodes run between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from vllm_plugins.engine.host_copy import HostCopy
from vllm_plugins.engine.kv_pages import KVPages
from vllm_plugins.engine.partial_forward import Rows, slot_mapping
from vllm_plugins.kv_connectors.kvshare.check_pass import CheckForward
from vllm_plugins.kv_connectors.kvshare.deviation import (
    SELECTORS,
    Budget,
    Reused,
    SelectorName,
    value_deviation,
)
from vllm_plugins.kv_connectors.kvshare.payloads import Payloads, Piece, State
from vllm_plugins.kv_connectors.kvshare.refresh import Stale
from vllm_plugins.kv_connectors.kvshare.rope import PositionShift
from vllm_plugins.kv_connectors.kvshare.transfer import Reuse
from vllm_plugins.kv_connectors.kvshare.work import LOAD_COST, PASS_COST, PROJECTION, bridged


@dataclass(frozen=True)
class Recipe:
    """How requests are blended; the same for all of them.

    Attributes:
        check_layer: c, the last layer whose KV is computed for every token of the span.
        selector: Rule that chooses among the reused tokens.
        budget: How much it may choose.
        link_tokens: m, tokens at the start of a run whose left context changed.
        max_runs: Runs of rows that a pass holds.
    """

    check_layer: int
    selector: SelectorName
    budget: Budget
    link_tokens: int
    max_runs: int


@dataclass(frozen=True)
class Kitchen:
    """What blending works with in one worker."""

    pages: KVPages
    forward: CheckForward
    payloads: Payloads
    shift: PositionShift
    recipe: Recipe


class Blend:
    """One request's KV in the making; `close` it at the end, whatever the end is.

    Args:
        reuse: What to make.
        kitchen: What to make it with.
        seed: For the random selector; the same on every rank.
    """

    def __init__(self, reuse: Reuse, kitchen: Kitchen, seed: int = 0) -> None:
        self.reuse = reuse
        self._kitchen = kitchen
        self._seed = seed
        self._pieces = [Piece(s.key, s.offset, s.length) for s in reuse.sources]
        self._lease = kitchen.payloads.lease(self._pieces)
        positions = [np.arange(s.start, s.start + s.length) for s in reuse.sources]
        self._reused = np.concatenate(positions)
        self._measured: HostCopy | None = None
        self.deviation = np.zeros(len(self._reused), np.float32)
        self._mean_norm = 1.0
        self.chosen = np.zeros(len(self._reused), bool)
        self._steps = self._load_exact() if reuse.exact else self._blend()

    def state(self) -> State:
        """Return whether a slice may be worked on now.

        The sources may still be on their way from the disk, or be lost, also between two slices;
        and the deviation may be on its way from the device.
        """
        state = self._kitchen.payloads.state(self._lease)
        arriving = self._measured is not None and not self._measured.is_here()
        return State.WAITING if arriving and state == State.READY else state

    def close(self) -> None:
        """Let go of the sources."""
        self._kitchen.payloads.release(self._lease)

    def advance(self, budget: float) -> tuple[bool, float]:
        """Go on with the work; the state is ready, on all ranks.

        Args:
            budget: Tokens through all layers that this slice may cost; it ends with the first piece
                of work that reaches it.

        Returns:
            Whether the KV is complete, and what the slice cost.
        """
        spent = 0.0
        for cost in self._steps:
            spent += cost
            later = self._measured is not None and self._measured.comes_later
            if later or spent >= budget:
                return False, spent
        return True, spent

    @property
    def recomputed(self) -> int:
        """Reused tokens that were chosen to be computed again."""
        return int(self.chosen.sum())

    def relative_deviation(self) -> np.ndarray:
        """Return the reused tokens' deviations over the mean norm of their stored values."""
        return self.deviation / max(self._mean_norm, float(np.finfo(np.float32).tiny))

    def stale(self, share: float) -> Stale:
        """Return the reused tokens that deviate and were not recomputed.

        Args:
            share: Part of the reused tokens that may be recomputed while the request decodes.
        """
        limit = self._kitchen.recipe.budget.skip_eps
        kept = ~self.chosen & (self.relative_deviation() >= limit)
        allowance = int(share * len(self._reused))
        return Stale(self._reused[kept], self.deviation[kept], allowance, self.reuse.token_ids)

    def _load_exact(self) -> Iterator[float]:
        self._kitchen.payloads.start(self._lease)
        yield from self._load(range(self._kitchen.pages.num_layers))

    def _blend(self) -> Iterator[float]:
        check, layers = self._kitchen.recipe.check_layer, self._kitchen.pages.num_layers
        self._kitchen.payloads.start(self._lease)
        yield from self._load(range(check + 1, layers))
        span = self._rows(np.arange(self.reuse.start, self.reuse.end))
        yield from self._run(span, range(check), project=True)
        self._measured = self._measure(check)
        yield 0.0
        again = self._select(self._measured)
        self._measured = None
        yield from self._run(span.take(again), range(check, layers))

    def _rows(self, positions: np.ndarray) -> Rows:
        return Rows(positions, self.reuse.block_ids, self.reuse.token_ids[positions])

    def _run(self, rows: Rows, layers: range, *, project: bool = False) -> Iterator[float]:
        """Run rows through layers, a pass at a time; the rows keep their hidden states.

        Args:
            rows: The rows.
            layers: The layers; there may be none.
            project: Whether the next layer's keys and values are wanted as well.
        """
        forward, pages = self._kitchen.forward, self._kitchen.pages
        work = len(layers) + PROJECTION * project
        done: list[Rows] = []
        for piece in forward.split(rows):
            if layers:
                forward.run([piece], layers)
            if project:
                forward.write_keys_values(piece, layers.stop, pages)
            done.append(piece)
            yield (len(piece.positions) + PASS_COST) * work / pages.num_layers
        rows.join(done)

    def _slots(self, positions: np.ndarray) -> torch.Tensor:
        pages = self._kitchen.pages
        slots = slot_mapping(self.reuse.block_ids, positions, pages.block_size)
        return torch.from_numpy(slots).to(pages.device, non_blocking=True)

    def _load(self, layers: range) -> Iterator[float]:
        """Write the stored KV of some layers to its new positions, a layer at a time."""
        kitchen, device = self._kitchen, self._kitchen.pages.device
        origin = [np.arange(s.position, s.position + s.length) for s in self.reuse.sources]
        source = torch.from_numpy(np.concatenate(origin)).to(device, non_blocking=True)
        target = torch.from_numpy(self._reused).to(device, non_blocking=True)
        slots = self._slots(self._reused)
        for layer in layers:
            keys = kitchen.payloads.load(layer, 0, self._pieces)
            values = kitchen.payloads.load(layer, 1, self._pieces)
            kitchen.pages.write(layer, kitchen.shift(keys, source, target), values, slots)
            yield LOAD_COST * len(self._reused) / kitchen.pages.num_layers

    def _measure(self, check: int) -> HostCopy:
        """Compare the values just computed at the check layer with the stored ones."""
        kitchen = self._kitchen
        new = kitchen.pages.read_values(check, self._slots(self._reused))
        old = kitchen.payloads.load(check, 1, self._pieces)
        return HostCopy(*kitchen.forward.sum_over_ranks(*value_deviation(new, old)))

    def _select(self, measured: HostCopy) -> np.ndarray:
        """Choose, and return what is computed: the chosen rows and all gaps, as the span's indices.

        What lies between two of them and costs less than another pass is chosen with them.
        """
        self.deviation, norm = measured.arrays()
        reused = Reused(self.deviation, norm, self._links(), self._seed)
        self._mean_norm = float(norm.mean())
        recipe = self._kitchen.recipe
        kept = ~SELECTORS[recipe.selector](reused, recipe.budget)
        rows = self._reused - self.reuse.start
        wanted = np.ones(self.reuse.end - self.reuse.start, bool)
        wanted[rows[kept]] = False
        wanted = bridged(wanted, recipe.max_runs)
        self.chosen = wanted[rows]
        return np.flatnonzero(wanted)

    def _links(self) -> np.ndarray:
        """Mark the first tokens of each run that begins at a seam."""
        lengths = [source.length for source in self.reuse.sources]
        links = np.zeros(len(self._reused), bool)
        starts = np.cumsum([0, *lengths[:-1]])
        for start, source in zip(starts, self.reuse.sources, strict=True):
            if not source.continues:
                links[start : start + min(source.length, self._kitchen.recipe.link_tokens)] = True
        return links
