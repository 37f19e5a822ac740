"""Which rows of a step the upper half computes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.distributed import get_tp_group

from vllm_plugins.visual_tokens.dynamic_llava.scorers import Images

if TYPE_CHECKING:
    from vllm_plugins.engine.block_holes.plan import Choice, StepPlan
    from vllm_plugins.visual_tokens.dynamic_llava.scorers import Scorer


def source_rows(
    plan: StepPlan,
    scorer: Scorer,
    positions: torch.Tensor,
    hidden: torch.Tensor,
    entered: torch.Tensor | None,
) -> torch.Tensor:
    """Return the rows whose tokens go on, in the order of the slots that they will have.

    Args:
        plan: Of the step.
        scorer: Orders the tokens of an image.
        positions: Of the step's rows, int64, shape (tokens,).
        hidden: Input of layer l, shape (tokens, h).
        entered: Input of layer l - 1, shape (tokens, h), if the scorer reads it.

    Returns:
        int64, shape (len(plan.rows),). It differs from ``plan.rows`` where tokens are chosen.
    """
    # On CPU the plan's own rows would be written to otherwise.
    source = torch.from_numpy(plan.rows).to(hidden.device, non_blocking=True, copy=True)
    sizes: dict[int, list[Choice]] = defaultdict(list)
    for choice in plan.choices:
        sizes[choice.present].append(choice)
    for width, choices in sizes.items():
        first = np.array([c.first_row for c in choices])
        rows = first[:, None] + np.arange(width)
        images = Images(choices, _upload(rows, hidden), hidden, entered, positions)
        _choose(images, scorer(images), source)
    group = get_tp_group()
    if group.world_size > 1 and sizes:
        # Scores may differ by rounding between ranks, and ties would then be broken apart.
        source = group.broadcast(source, src=0)
    return source


def _choose(images: Images, scores: torch.Tensor, source: torch.Tensor) -> None:
    """Write the rows with the highest scores into their places, in their original order.

    Of equal scores the earlier token wins, as in `predictors.choose`.
    """
    width = scores.shape[1]
    columns = torch.arange(width, device=scores.device)
    candidates = _column([c.candidates for c in images.choices], scores)
    scores = scores.float().masked_fill(columns >= candidates, float("-inf"))
    counts = np.array([c.selected for c in images.choices])
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, : int(counts.max())]
    # Behind all others, so that each row begins with its own choice.
    beyond = columns[: order.shape[1]] >= _column(counts, scores)
    order = order.masked_fill(beyond, width).sort(dim=-1).values
    # How many are chosen is known, so picking them waits for nothing on the device.
    image = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    at = np.repeat([c.at for c in images.choices], counts) + place
    where = _upload(np.stack((image, place, at)), scores)
    source[where[2]] = images.rows[where[0], order[where[0], where[1]]]


def _column(values: Sequence[int] | np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return _upload(np.asarray(values, np.int64)[:, None], like)


def _upload(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(like.device, non_blocking=True)
