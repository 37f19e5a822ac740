"""How old what was kept of each request is, and which of it has to be found again.

While a request decodes, its selected blocks change slowly: each stage runs only every so many
tokens (section 3.3 of arXiv 2502.08910), between them what it kept is used again. The published
code counts steps of the whole batch. Here a stage is due by the position of the request's own
query, so that no request sees what another has done.

Requests are told apart by slots: the token before a request's first query was written by the same
request when it was in a batch before, to a slot in a block that no other request may write. This
needs nothing that only one of the model runners has. A request may miss batches, as all do where
pipeline stages take turns: what was kept of it stays, until somebody else writes to its slots or
needs the row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

UNKNOWN = -1
# When a row was last used that is in use now: after all others.
NOW = torch.iinfo(torch.int64).max


class MaskCache:
    """Rows of kept lists, and the position at which each stage last ran for each of them.

    All work is a handful of tensor operations of fixed shape, without waiting for the device.

    Args:
        rows: Most requests that decode at a time.
        queries: Most tokens of a request in a decode step: one, and the drafts to verify.
        refresh: Tokens after which each stage is due again, one for each stage.
        device: Where batches are described.
    """

    def __init__(
        self, rows: int, queries: int, refresh: Sequence[int], device: torch.device
    ) -> None:
        self._refresh = torch.tensor(refresh, dtype=torch.int32, device=device)
        # The last row is nobody's: those who keep nothing write there.
        self._nobody = rows
        shape = (rows + 1, queries)
        # Where a row's tokens went when it was last used, when that was, and where each stage ran.
        self._slots = torch.full(shape, UNKNOWN, dtype=torch.int64, device=device)
        self._used_at = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self._ran_at = torch.full(
            (rows + 1, len(refresh)), UNKNOWN, dtype=torch.int32, device=device
        )
        self._steps = 0

    def step(
        self,
        before: torch.Tensor,
        slots: torch.Tensor,
        position: torch.Tensor,
        sparse: torch.Tensor,
        written: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the rows of a batch's decodes, and the stages that are due.

        Args:
            before: Slot of the token before each request's first query, int64, shape (n,);
                `UNKNOWN` where the request cannot have been decoding.
            slots: Slots of each request's queries, padded with `UNKNOWN`, int64, shape (n,
                queries).
            position: Position of each request's first query, int32, shape (n,).
            sparse: Whether the request attends sparsely now, bool, shape (n,); at most as many as
                there are rows do. Nothing is kept of others.
            written: Slots that the batch writes, of all its requests, int64, shape (tokens,);
                padding is `UNKNOWN`.

        Returns:
            The rows of those that are sparse, int32, all different, shape (n,), and the first
            stage to run, int32, shape (n,); the number of stages where none is due.
        """
        self._steps += 1
        rows, known = self._assign(torch.where(sparse, before, UNKNOWN), sparse, written)
        ran_at = torch.where(known[:, None], self._ran_at[rows], UNKNOWN)
        now = position[:, None]
        due = (ran_at < 0) | (now // self._refresh != ran_at // self._refresh)
        # A stage starts from what the one before it keeps, so it runs whenever that one does.
        due = due.to(torch.int8).cummax(dim=1).values.bool()
        self._slots[rows] = slots
        self._ran_at[rows] = torch.where(due, now, ran_at).to(torch.int32)
        # Not by assignment, which would copy the number to the device.
        self._used_at.index_fill_(0, rows, self._steps)
        rows = torch.where(sparse, rows, 0).to(torch.int32)
        return rows, (~due).sum(dim=1).to(torch.int32)

    def _assign(
        self, before: torch.Tensor, sparse: torch.Tensor, written: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each request's row, and whether it is the one that it had."""
        match = (before[:, None, None] == self._slots[:-1]) & (before >= 0)[:, None, None]
        match = match.any(dim=2)
        # A full block may belong to several requests: a row goes to the first that asks for it.
        match &= match.cumsum(dim=0) == 1
        known, row = match.any(dim=1), match.to(torch.int8).argmax(dim=1)
        claimed = match.any(dim=0)
        gone = self._overwritten(written) & ~claimed
        self._slots[:-1].masked_fill_(gone[:, None], UNKNOWN)
        self._used_at[:-1].masked_fill_(gone, 0)
        # Newcomers take the rows that were not used for longest, those that nobody has first.
        free = self._used_at[:-1].masked_fill(claimed, NOW).argsort(stable=True)
        newcomer = (sparse & ~known).cumsum(dim=0) - 1
        row = torch.where(known, row, free[newcomer.clamp(0, self._nobody - 1)])
        return torch.where(sparse, row, self._nobody), known

    def _overwritten(self, written: torch.Tensor) -> torch.Tensor:
        """Return which rows have a slot that is written now, bool, shape (rows,)."""
        slots = self._slots[:-1]
        if not len(written):
            return torch.zeros_like(slots[:, 0], dtype=torch.bool)
        ordered = written.to(torch.int64).sort().values
        at = torch.searchsorted(ordered, slots).clamp(max=len(ordered) - 1)
        return ((ordered[at] == slots) & (slots >= 0)).any(dim=1)
