"""Chains of draft steps from every row of a sequence at once.

Step 0 runs all rows with the target's features. In step j row u takes the predicted feature of row
u - 1 from step j - 1, as the j-th link of the chain that began at row u - j: it sees the rows up to
there with the target's features, and the chain's own links. So n chains of k steps are k + 1 passes
over n rows, not n times k of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vllm_plugins.spec_decode.specvlm.drafter import EagleDrafter, KeysValues


def link_mask(count: int, step: int, device: torch.device) -> torch.Tensor:
    """Return which keys of the passes so far the links of a step see.

    Args:
        count: Rows, n.
        step: j, at least 1.
        device: Of the result.

    Returns:
        bool, shape (n, (step + 1) * n): keys of step 0 first, the step's own last.
    """
    row = torch.arange(count, device=device)[:, None]
    key = torch.arange(count, device=device)[None]
    links = [key == row - step + i for i in range(1, step + 1)]
    return torch.cat([key <= row - step, *links], 1)


def unroll(
    drafter: EagleDrafter,
    rows: torch.Tensor,
    positions: torch.Tensor,
    steps: int,
    embeddings_of: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[torch.Tensor]:
    """Yield the predicted features of each step.

    Args:
        drafter: Whose layer runs.
        rows: Fused rows of step 0, shape (batch, n, hidden).
        positions: int64, shape (batch, n).
        steps: How many to yield.
        embeddings_of: Given the step before's predicted features moved on by one row, returns the
            embeddings that go with them; both of shape (batch, n, hidden).
    """
    past: list[KeysValues] = []
    mask, predicted = None, rows
    for step in range(steps):
        if step:
            before = torch.cat([predicted[:, :1], predicted[:, :-1]], 1)
            rows = drafter.fuse(embeddings_of(before), before)
            mask = link_mask(rows.shape[1], step, rows.device)
        predicted, own = drafter(rows, positions, past, mask)
        past.append(own)
        yield predicted
