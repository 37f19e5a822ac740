"""Tokens that layers have forgotten, as far as the scheduler knows.

Which tokens are forgotten is decided on the device, so the scheduler hears of it with a step's
result, and by then may have scheduled the next. What it knows is a lower bound, and blocks that are
allotted by it suffice: a request's tokens less those that are known are never fewer than it holds.

A request that is preempted begins anew and has forgotten nothing, whatever is still told of steps
that it was in before. So a step's report is written into cells that were taken when the step was
scheduled, and a request that gives its blocks back leaves its cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class Cell:
    """What is known of a request for as long as it holds blocks.

    Attributes:
        tokens: Those that it is known to have forgotten.
    """

    tokens: int = 0


class Forgotten:
    """Cells of the requests that hold blocks."""

    def __init__(self) -> None:
        self._cells: dict[str, Cell] = {}

    def __len__(self) -> int:
        return len(self._cells)

    @property
    def total(self) -> int:
        """How many tokens are known to be forgotten, of all requests."""
        return sum(cell.tokens for cell in self._cells.values())

    def of(self, request_id: str) -> int:
        """Return how many tokens a request is known to have forgotten."""
        cell = self._cells.get(request_id)
        return 0 if cell is None else cell.tokens

    def take(self, request_ids: Iterable[str]) -> dict[str, Cell]:
        """Return the cells of a step's requests, new ones where there are none."""
        return {name: self._cells.setdefault(name, Cell()) for name in request_ids}

    def leave(self, request_id: str) -> None:
        """Forget a request that gives its blocks back; what comes of it later changes nothing."""
        self._cells.pop(request_id, None)


def write(cells: Mapping[str, Cell], report: Mapping[str, int]) -> None:
    """Write what a step's report says of its requests.

    Args:
        cells: Taken when the step was scheduled.
        report: Tokens that each request has forgotten after the step.
    """
    for name, tokens in report.items():
        if name in cells:
            cells[name].tokens = tokens
