"""How old what was kept of each request is, and which of it has to be found again.

While a request decodes, its selected blocks change slowly: each stage runs only every so many
tokens (section 3.3 of arXiv 2502.08910), between them what it kept is used again. The published
code counts steps of the whole batch. Here a stage is due by the position of the request's own
query, so that no request sees what another has done.

Requests are told apart by slots: the token before a request's first query was written by the same
request in the step before, to a slot in a block that no other request may write. This needs
nothing that only one of the model runners has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

UNKNOWN = -1


class MaskCache:
    """Rows of kept lists, and the position at which each stage last ran for each of them.

    All work is a handful of tensor operations of fixed shape, without waiting for the device.

    Args:
        rows: Most requests of a batch.
        queries: Most tokens of a request in a decode step: one, and the drafts to verify.
        refresh: Tokens after which each stage is due again, one for each stage.
        device: Where batches are described.
    """

    def __init__(
        self, rows: int, queries: int, refresh: Sequence[int], device: torch.device
    ) -> None:
        self._refresh = torch.tensor(refresh, dtype=torch.int32, device=device)
        # Where the tokens of the last step went, and where each stage last ran.
        self._slots = torch.full((rows, queries), UNKNOWN, dtype=torch.int64, device=device)
        self._ran_at = torch.full((rows, len(refresh)), UNKNOWN, dtype=torch.int32, device=device)

    def step(
        self,
        before: torch.Tensor,
        slots: torch.Tensor,
        position: torch.Tensor,
        sparse: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the rows of a batch's decodes, and the stages that are due.

        Requests that are not in the batch lose what was kept of them.

        Args:
            before: Slot of the token before each request's first query, int64, shape (n,);
                `UNKNOWN` where the request cannot have been decoding.
            slots: Slots of each request's queries, padded with `UNKNOWN`, int64, shape (n,
                queries).
            position: Position of each request's first query, int32, shape (n,).
            sparse: Whether the request attends sparsely now, bool, shape (n,). What was kept of
                others is not kept up.

        Returns:
            The rows, int32, all different, and the first stage to run, int32, shape (n,); the
            number of stages where none is due.
        """
        rows, known = self._assign(before)
        ran_at = torch.where(known[:, None], self._ran_at[rows], UNKNOWN)
        now = position[:, None]
        due = (ran_at < 0) | (now // self._refresh != ran_at // self._refresh)
        # A stage starts from what the one before it keeps, so it runs whenever that one does.
        due = due.to(torch.int8).cummax(dim=1).values.bool()
        self._slots.fill_(UNKNOWN)
        self._slots[rows] = slots
        ran_at = torch.where(due, now, ran_at).masked_fill(~sparse[:, None], UNKNOWN)
        self._ran_at.fill_(UNKNOWN)
        self._ran_at[rows] = ran_at.to(torch.int32)
        return rows.to(torch.int32), (~due).sum(dim=1).to(torch.int32)

    def _assign(self, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each request's row, one that nobody has for a newcomer, and who is none."""
        match = (before[:, None, None] == self._slots) & (before >= 0)[:, None, None]
        match = match.any(dim=2)
        known, row = match.any(dim=1), match.to(torch.int8).argmax(dim=1)
        # Rows that nobody has come first; the i-th newcomer takes the i-th of them.
        free = match.any(dim=0).to(torch.int8).argsort(stable=True)
        newcomer = (~known).cumsum(dim=0) - 1
        return torch.where(known, row, free[newcomer.clamp(min=0)]), known
