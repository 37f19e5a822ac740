"""The token budget of Sarathi-Serve: the largest step that still meets the TBT target.

Sarathi-Serve (arXiv 2403.02310, section 4.3 as recalled by the implementation note) sizes the
budget tau once, offline. Here it is sized for each step, in the manner of the same group's public
Niyama code: the cost model sees the context lengths that this very step would read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_plugins.engine.cost_model import StepWork, chunk_work


@dataclass(frozen=True)
class Budgets:
    """The budgets that a step may have, in rows.

    Args:
        floor: Least budget of a step that has prefill to do.
        ceiling: What the workers' buffers hold.
        tile: A budget is a multiple of this, so that the *total* rows of a step fill whole tiles.
    """

    floor: int
    ceiling: int
    tile: int

    def align(self, rows: int) -> int:
        """Round up to the tile, within the ceiling."""
        return min(-(-rows // self.tile) * self.tile, self.ceiling)

    def least(self, decode_rows: int) -> int:
        """Return the least budget beside ``decode_rows`` decodes.

        Decodes are never dropped to meet a target, and a prefill always moves on: without room of
        its own it would wait for as long as decodes fill the budget.
        """
        return self.align(max(self.floor, decode_rows + max(1, self.floor // 8)))

    def largest(self, seconds: Callable[[int], float], limit: float, decode_rows: int) -> int:
        """Return the largest budget whose step takes at most ``limit`` seconds.

        Args:
            seconds: Predicted time of a step of so many rows; must not fall as rows grow.
            limit: Seconds that the step may take.
            decode_rows: Rows that decodes take of it.

        Returns:
            The least budget where even that one is predicted to take longer.
        """
        least = self.least(decode_rows)
        choices = range(least, self.ceiling + 1, self.tile)
        fitting = bisect_right(choices, limit, key=seconds)
        return choices[fitting - 1] if fitting else least


@dataclass(frozen=True)
class PendingPrefill:
    """Prefill work in the order in which a step would take it.

    Args:
        chunks: ``(remaining tokens, context so far)`` of prompts already under way; beyond them
            a step starts new prompts, whose context is zero.
    """

    chunks: Sequence[tuple[int, int]]

    def work(self, tokens: int) -> float:
        """Return ``A_pre`` of a step that takes ``tokens`` prefill tokens.

        New prompts count as one, and as new: an upper bound, since a split only lowers the
        quadratic term, unless the prefix cache holds their beginning, which is not known yet.
        """
        total = 0.0
        for remaining, context in self.chunks:
            if tokens <= 0:
                return total
            taken = min(tokens, remaining)
            total += chunk_work(taken, context)
            tokens -= taken
        return total + chunk_work(max(tokens, 0), 0)


def step_work(
    rows: int, decode_rows: int, decodes: int, decode_context: int, pending: PendingPrefill
) -> StepWork:
    """Return what a step of ``rows`` rows would contain beside the given decodes."""
    prefill = max(rows - decode_rows, 0)
    requests = decodes + (1 if prefill else 0)
    return StepWork(rows, requests, decode_context, pending.work(prefill))
