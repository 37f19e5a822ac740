"""How many draft tokens the target would accept: an estimate on held-out samples, without serving.

Greedy decoding verifies by equality, so it is enough to know the target's own answer: a draft is
accepted up to the first token that differs from it. The figure is the paper's sigma, tokens for
each round of drafting and verification, in chains; vLLM reports it as mean acceptance length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_plugins.spec_decode.specvlm.chain import unroll
from vllm_plugins.spec_decode.specvlm.compact import compact, draft_span
from vllm_plugins.spec_decode.specvlm.drafter import EagleDrafter
from vllm_plugins.spec_decode.specvlm.reference import image_spans
from vllm_plugins.spec_decode.specvlm.settings import Choice
from vllm_plugins.spec_decode.specvlm.target import FrozenTarget, TargetRows
from vllm_plugins.training.batches import Batch, Collator
from vllm_plugins.training.data import Sample

# An answer of fewer tokens leaves nothing to draft.
SHORTEST = 3


@dataclass(frozen=True)
class Answered:
    """A prompt with the target's own greedy answer.

    Attributes:
        tokens: Of both, int64, shape (n,).
        prompt_length: Tokens of the prompt.
        rows: What the target makes of both, shape (1, n, hidden).
        image_seed: What identifies its image.
    """

    tokens: torch.Tensor
    prompt_length: int
    rows: TargetRows
    image_seed: int


@torch.no_grad()
def answer(
    target: FrozenTarget,
    collator: Collator,
    samples: Sequence[Sample],
    device: str,
    dtype: torch.dtype,
    longest: int,
) -> list[Answered]:
    """Have the target answer the first question of each sample, up to ``longest`` tokens.

    Samples whose answer is too short to draft are left out.
    """
    answered = []
    for sample in samples:
        batch = collator([sample]).to(device, dtype)
        length = int(batch.prompt_lengths[0])
        tokens = _generate(target, batch, length, longest)
        if len(tokens) >= length + SHORTEST:
            rows = target(tokens[None], None, batch.pixels)
            answered.append(Answered(tokens, length, rows, int(batch.image_seeds[0])))
    return answered


def _generate(target: FrozenTarget, batch: Batch, length: int, longest: int) -> torch.Tensor:
    prompt = batch.input_ids[:, :length]
    out = target.model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=longest,
        **batch.pixels,
    )
    return out[0]


@torch.no_grad()
def draft_tokens(
    drafter: EagleDrafter, target: FrozenTarget, answered: Answered, steps: int
) -> tuple[torch.Tensor, Choice | None]:
    """Draft a chain after every token of an answer at once.

    Returns:
        Greedy draft tokens, int64, shape (steps, n): entry [j, t] is the draft of token t + j + 2
        by the chain whose first row is t, meaningful from t = prompt_length - 1 on; and what was
        done to the image.
    """
    spans = image_spans(answered.tokens == target.image_token)
    choice, weights = None, None
    features = answered.rows.features
    if spans:
        choice, weights = drafter.decide(features[0], answered.prompt_length, spans[-1][1])
    fused = drafter.fuse(answered.rows.embeddings[:, 1:], features[:, :-1])[0]
    drafted = [draft_span(*span) for span in spans]
    contents = [answered.image_seed] * len(spans)
    made = compact(fused, drafted, choice, drafter.compressor, contents, weights)
    passes = unroll(
        drafter,
        made.rows[None],
        made.positions[None],
        steps,
        lambda predicted: target.embed(target.head(predicted).argmax(-1)).to(predicted.dtype),
    )
    drafts = torch.zeros(steps, len(answered.tokens), dtype=torch.int64, device=fused.device)
    text = made.sources >= answered.prompt_length - 1
    rows = made.sources[text]
    for step, predicted in enumerate(passes):
        # Output at row u of step j ends the chain that began at row u - j.
        ended = target.head(predicted[0, text][step:]).argmax(-1)
        drafts[step, rows[: len(ended)]] = ended
    return drafts, choice


def accepted_lengths(tokens: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
    """Return how many drafts of the chain at each row hold.

    Args:
        tokens: int64, shape (n,).
        drafts: int64, shape (steps, n), as :func:`draft_tokens` returns them.

    Returns:
        int64, shape (n,).
    """
    steps, count = drafts.shape
    at = torch.arange(count, device=tokens.device)[None] + torch.arange(
        2, steps + 2, device=tokens.device
    )[:, None]  # fmt: skip
    right = (tokens[at.clamp(max=count - 1)] == drafts) & (at < count)
    return right.long().cumprod(0).sum(0)


def rounds(accepted: Sequence[int], prompt_length: int) -> tuple[int, int]:
    """Play decoding with these accepted lengths; return tokens made by rounds, and rounds.

    Args:
        accepted: For the chain at each row, n entries for n tokens.
        prompt_length: Tokens of the prompt; the first answer token comes without a round.
    """
    last, count = prompt_length, 0
    while last < len(accepted) - 1:
        last += accepted[last - 1] + 1
        count += 1
    return min(last, len(accepted) - 1) - prompt_length, count


class AcceptanceEstimate:
    """Tokens for each round on held-out samples, and what the gate picks there.

    Args:
        target: Verifier.
        answered: Its own answers.
        steps: Draft tokens of a round.
    """

    def __init__(self, target: FrozenTarget, answered: Sequence[Answered], steps: int) -> None:
        self._target, self._answered, self._steps = target, answered, steps

    def figures(self, drafter: EagleDrafter) -> dict[str, float]:
        """Return ``tokens_per_round``, 1 to steps + 1, and shares of the picks as they occur."""
        made, played, picks = 0, 0, Counter[str]()
        for answered in self._answered:
            drafts, choice = draft_tokens(drafter, self._target, answered, self._steps)
            accepted = accepted_lengths(answered.tokens, drafts).tolist()
            tokens, count = rounds(accepted, answered.prompt_length)
            made, played = made + tokens, played + count
            picks[choice or "none"] += 1
        figures = {"tokens_per_round": made / max(1, played)}
        shares = {f"used_{name}": count / picks.total() for name, count in sorted(picks.items())}
        return figures | shares
