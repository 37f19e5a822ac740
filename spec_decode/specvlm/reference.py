"""What the served drafter must compute, row by row and without any cache: its oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vllm_plugins.spec_decode.specvlm.compact import CompactRows, Span, compact, draft_span
from vllm_plugins.spec_decode.specvlm.drafter import EagleDrafter
from vllm_plugins.spec_decode.specvlm.settings import Choice
from vllm_plugins.spec_decode.specvlm.target import FrozenTarget, TargetRows


def image_spans(image_mask: torch.Tensor, images: int = 0) -> list[Span]:
    """Return where each image of a prompt is.

    Args:
        image_mask: Which tokens are an image's, bool, shape (n,).
        images: How many images these are, all of as many tokens, as they may lie side by side;
            without it each run is one.
    """
    if images:
        places = image_mask.nonzero().view(images, -1)
        return [(int(one[0]), int(one[-1]) + 1) for one in places]
    padded = torch.nn.functional.pad(image_mask.int(), (1, 1)).diff()
    starts, ends = (padded == 1).nonzero()[:, 0], (padded == -1).nonzero()[:, 0]
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def prompt_rows(
    drafter: EagleDrafter,
    target: FrozenTarget,
    rows: TargetRows,
    next_token: int,
    spans: Sequence[Span],
    choice: Choice | None,
    weights: torch.Tensor | None,
    contents: Sequence[str | int],
) -> CompactRows:
    """Return the compact draft rows of one prompt, the target's first answer token included.

    Args:
        drafter: With its compressor.
        target: Whose embeddings are used.
        rows: The target's, of the prompt alone, shape (1, n, hidden).
        next_token: The target's first token of the answer.
        spans: Target positions of each image.
        choice: What is done to the images.
        weights: Of ``weighted``.
        contents: What identifies each image.
    """
    first = target.embed(torch.tensor([[next_token]], device=rows.features.device))
    embeddings = torch.cat([rows.embeddings[:, 1:], first.to(rows.embeddings.dtype)], 1)
    fused = drafter.fuse(embeddings, rows.features)[0]
    drafted = [draft_span(*span) for span in spans]
    return compact(fused, drafted, choice, drafter.compressor, contents, weights)


@torch.no_grad()
def reference_draft(
    drafter: EagleDrafter,
    target: FrozenTarget,
    input_ids: torch.Tensor,
    pixels: Mapping[str, torch.Tensor],
    steps: int,
    choice: Choice | None = None,
    contents: Sequence[str | int] = (),
) -> torch.Tensor:
    """Draft greedily after one prompt, recomputing everything at every step.

    Drafter and target must be of one floating-point type; float64 gives an oracle.

    Args:
        drafter: Its settings hold mode, ratios and block size.
        target: The verifier.
        input_ids: The prompt with its image tokens, int64, shape (n,).
        pixels: What the target's processor made of its images.
        steps: Draft tokens.
        choice: Overrides what the drafter's mode and gate decide.
        contents: What identifies each image, for the seed of pruning; the image's number without.

    Returns:
        Logits of each draft, shape (steps, vocabulary); the first is of the token after the
        target's own next one.
    """
    rows = target(input_ids[None], None, pixels)
    images = len(pixels["pixel_values"]) if pixels else 0
    spans = image_spans(input_ids == target.image_token, images)
    weights = None
    if choice is None and spans:
        choice, weights = drafter.decide(rows.features[0], len(input_ids), spans[-1][1])
    elif choice == "weighted":
        _, weights = drafter.decide(rows.features[0], len(input_ids), spans[-1][1])
    token = int(target.head(rows.features[0, -1]).argmax())
    contents = contents or list(range(len(spans)))
    made = prompt_rows(drafter, target, rows, token, spans, choice, weights, contents)
    state, positions, logits = made.rows[None], made.positions[None], []
    for step in range(steps):
        predicted = drafter(state, positions)[0][:, -1:]
        logits.append(target.head(predicted)[0, 0])
        drafted = target.embed(logits[-1].argmax()[None, None])
        state = torch.cat([state, drafter.fuse(drafted, predicted)], 1)
        following = torch.full_like(positions[:, :1], len(input_ids) + step)
        positions = torch.cat([positions, following], 1)
    return torch.stack(logits)
