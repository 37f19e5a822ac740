"""Which blocks a span of tokens may leave empty, and which rows of a step go on.

Only whole blocks can be hidden, so that every token after a span keeps its own slot and blocks that
other requests share are never written. Of a span the first ``selected`` slots are filled with the
tokens that a technique chooses, the last ``tail`` tokens stay where they are, and the blocks
between are the hole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

Span = tuple[int, int]
"""Positions [start, end) of a request's tokens, such as those of an image."""


@dataclass(frozen=True)
class Hole:
    """A run of blocks to leave out of one span.

    Attributes:
        start: Position of the span's first token.
        end: Position behind its last token.
        first_block: Block, counted from the sequence's first, at which the hole begins.
        blocks: Length of the hole in blocks; 0 keeps the whole span.
        block_size: Tokens of a block.
    """

    start: int
    end: int
    first_block: int
    blocks: int
    block_size: int

    @property
    def begin(self) -> int:
        """Position of the first slot inside the hole."""
        return self.first_block * self.block_size

    @property
    def behind(self) -> int:
        """Position of the first token behind the hole, where the tail begins."""
        return self.begin + self.blocks * self.block_size

    @property
    def selected(self) -> int:
        """How many tokens are chosen from [start, behind), to lie on [start, begin)."""
        return self.begin - self.start if self.blocks else self.end - self.start

    @property
    def tail(self) -> int:
        """How many tokens at the span's end stay in their slots."""
        return self.end - self.behind if self.blocks else 0

    @property
    def kept(self) -> int:
        """Tokens of the span that the layers above see."""
        return self.selected + self.tail

    def in_blocks_of(self, size: int) -> Hole:
        """Return the same hole in smaller blocks, such as an attention kernel's.

        Args:
            size: Tokens of a block, which divides this hole's.
        """
        split = self.block_size // size
        return Hole(self.start, self.end, self.first_block * split, self.blocks * split, size)


def plan_hole(start: int, end: int, wanted: int, block_size: int, keep_last: bool = False) -> Hole:
    """Plan the largest hole that leaves at least the wanted number of tokens.

    At most ``block_size - 1`` tokens more than wanted are left, and as many again to keep the last.

    Args:
        start: Position of the span's first token.
        end: Position behind its last token.
        wanted: Tokens of the span to keep.
        block_size: Tokens of a block.
        keep_last: Whether the last token stays, which a prompt may end with: from its row the
            answer's first token is drawn. Where the prompt ends is not asked, for cached blocks
            serve prompts that go on.
    """
    tail = end % block_size
    if keep_last and not tail:
        tail = block_size
    first_block = -(-(start + max(0, wanted - tail)) // block_size)
    blocks = max(0, (end - tail) // block_size - first_block)
    return Hole(start, end, first_block, blocks, block_size)


@dataclass(frozen=True)
class Choice:
    """Rows of one span in one step, of which some are chosen.

    Attributes:
        first_row: Step's row of the first candidate.
        candidates: Number of rows to choose from.
        present: Rows of the span in the step, from the first candidate on; its tail is among them.
        selected: Number of rows to choose.
        at: Index in ``StepPlan.rows`` of the first chosen row.
        request: Row of the batch, that is, of the block table.
        hole: The span's hole.
        request_row: Step's row at which the request begins.
        after: Step's rows [first, last) behind the request's last span, perhaps none.
    """

    first_row: int
    candidates: int
    present: int
    selected: int
    at: int
    request: int
    hole: Hole
    request_row: int
    after: tuple[int, int]


@dataclass(frozen=True)
class StepPlan:
    """What the layers above compute in one step.

    Attributes:
        rows: Rows whose slots are written, ascending, int64, shape (m,). Where rows are chosen,
            the first slots of a span stand for whichever they will be.
        starts: Index in ``rows`` at which each request begins, and m; int32, shape (requests + 1,).
        choices: One for each span of which some rows are chosen.
        hidden: Batch row and column of each block-table entry that becomes a hole, int64, (2, h).
        block_size: Tokens of these blocks.
    """

    rows: np.ndarray
    starts: np.ndarray
    choices: tuple[Choice, ...]
    hidden: np.ndarray
    block_size: int = 0

    @property
    def longest(self) -> int:
        """Most rows of one request."""
        return int(np.diff(self.starts).max())


def plan_step(
    holes: Sequence[Sequence[Hole]], starts: np.ndarray, ends: np.ndarray
) -> StepPlan | None:
    """Plan the rows of a step, or return None where every row goes on.

    A span that begins in the step and ends behind it keeps all its rows. One that begins before the
    step, after a prefix-cache hit, has its first slots in the cache: what the step holds of the
    hole is dropped, and slots of the head that are not cached are chosen anew, among the tokens of
    the step.

    Args:
        holes: Of each request of the batch, in the order of positions.
        starts: Row at which each request begins, and their number; int, shape (requests + 1,).
        ends: Length of each request's sequence after the step; int, shape (requests,).
    """
    keep = np.ones(int(starts[-1]), bool)
    heads: list[Choice] = []
    hidden: list[np.ndarray] = []
    size = 0
    for request, of_request in enumerate(holes):
        # Adding it to a position gives the row.
        shift = int(starts[request + 1]) - int(ends[request])
        computed, end = int(starts[request]) - shift, int(ends[request])
        for hole in of_request:
            if not _drops(hole, computed, end):
                continue
            behind, size = min(hole.behind, end), hole.block_size
            keep[max(hole.begin, computed) + shift : behind + shift] = False
            columns = np.arange(max(hole.begin, computed) // size, -(-behind // size))
            hidden.append(np.stack((np.full_like(columns, request), columns)))
            head = max(hole.start, computed)
            if head < hole.begin:
                heads.append(
                    Choice(
                        first_row=head + shift,
                        candidates=behind - head,
                        present=min(hole.end, end) - head,
                        selected=hole.begin - head,
                        at=0,
                        request=request,
                        hole=hole,
                        request_row=computed + shift,
                        after=(min(of_request[-1].end, end) + shift, end + shift),
                    )
                )
    if not hidden:
        return None
    rows = np.flatnonzero(keep)
    index = np.cumsum(keep) - 1
    return StepPlan(
        rows,
        np.searchsorted(rows, starts).astype(np.int32),
        tuple(replace(choice, at=int(index[choice.first_row])) for choice in heads),
        np.concatenate(hidden, axis=1),
        size,
    )


def _drops(hole: Hole, computed: int, end: int) -> bool:
    """Say whether a step over positions [computed, end) leaves something of a hole out."""
    if not hole.blocks or computed >= hole.behind or end <= hole.begin:
        return False
    return hole.start < computed or hole.end <= end


def without_rows(plan: StepPlan | None, starts: np.ndarray, dropped: np.ndarray) -> StepPlan:
    """Return a plan that leaves further rows out, such as tokens that are no longer seen.

    Args:
        plan: Of the same step, or None where all of its rows went on.
        starts: Row at which each request begins, and their number; int, shape (requests + 1,).
        dropped: Rows to leave out, none of which is among those to choose from; int, shape (d,).
    """
    rows = np.arange(int(starts[-1])) if plan is None else plan.rows
    left = np.setdiff1d(rows, dropped, assume_unique=True)
    choices = () if plan is None else plan.choices
    hidden = np.empty((2, 0), np.int64) if plan is None else plan.hidden
    return StepPlan(
        left,
        np.searchsorted(left, starts).astype(np.int32),
        tuple(replace(c, at=int(np.searchsorted(left, c.first_row))) for c in choices),
        hidden,
        0 if plan is None else plan.block_size,
    )
