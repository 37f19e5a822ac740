"""Where the retriever attends to while it answers: what a sparse attention has to find.

A method that looks for key blocks by single representative keys needs more than one key with a high
score: the neighbours of the token wanted have to have raised scores too, as in natural text. The
numbers here say how far that holds. Blocks are of `BLOCK` tokens, as in HiP's last stage. The block
of `<s>` and the question, which such methods always keep, take part in no rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from retriever_data import TASKS, Prompt, make_prompt
from retriever_forward import Seen, forward
from retriever_start import RETRIEVING_HEADS
from transformers import LlamaForCausalLM

BLOCK = 8
PERCENTILE = 0.99
# Training wants the tokens of a statement above the filler by so much; tokens behind the statement
# that may still be about it count neither way.
MARGIN, BEHIND = 2.0, 32


@dataclass(frozen=True)
class Sources:
    """Where the answers to the questions of a text are stated.

    Attributes:
        rows: [rows], the tokens that predict a token of an answer.
        stated: [rows, context], whether a token is of the statement, from its key on.
        filler: [rows, context], whether it is filler and stands elsewhere.
    """

    rows: torch.Tensor
    stated: torch.Tensor
    filler: torch.Tensor


def sources_of(prompt: Prompt) -> Sources:
    """Return the sources of a prompt's questions, asked one after the other."""
    size = len(prompt.context)
    rows, stated, filler = [], [], []
    end = size
    for index, fact in enumerate(prompt.asked):
        end += len(prompt.question(index))
        answer = len(prompt.answer(index))
        of_it, elsewhere = torch.zeros(size, dtype=torch.bool), _filler(prompt)
        of_it[prompt.context.index(fact.key) : fact.stop] = True
        elsewhere[fact.stop : fact.stop + BEHIND] = False
        rows += range(end - 1, end - 1 + answer)
        stated += [of_it] * answer
        filler += [elsewhere] * answer
        end += answer
    return Sources(torch.tensor(rows), torch.stack(stated), torch.stack(filler))


def _filler(prompt: Prompt) -> torch.Tensor:
    """Return which tokens of the text are filler, [context]."""
    filler = torch.ones(len(prompt.context), dtype=torch.bool)
    filler[0] = False
    for fact in prompt.facts:
        filler[fact.start : fact.stop] = False
    return filler


def locality_loss(seen: Seen, sources: Sequence[Sources]) -> torch.Tensor:
    """Return by how much tokens of statements miss the scores that the margin wants, in the mean.

    It keeps the neighbours of the token wanted above the filler, which answers alone do not ask
    for: in a training without it few of them were.

    Args:
        seen: queries and keys of each layer.
        sources: of each text of the batch.
    """
    missing = []
    for layer, head in RETRIEVING_HEADS:
        queries, keys = seen[layer]
        shared = head * keys.shape[1] // queries.shape[1]
        for text, source in enumerate(sources):
            past = keys[text, shared, : source.stated.shape[1]]
            scores = queries[text, head, source.rows] @ past.T * past.shape[1] ** -0.5
            count = max(1, int((1 - PERCENTILE) * source.filler.sum(1).min()))
            others = scores.masked_fill(~source.filler, -torch.inf).topk(count).values.mean(1)
            missing.append((others[:, None] + MARGIN - scores)[source.stated].relu().mean())
    return torch.stack(missing).mean()


def attention_facts(
    model: LlamaForCausalLM, lengths: Sequence[int], prompts: int, seed: int
) -> dict[str, dict[int, dict[str, dict[str, float]]]]:
    """Return where heads attend to in the rows that predict the tokens of an answer.

    Args:
        model: the model.
        lengths: tokens of a prompt with its question.
        prompts: drawn for each task and length, with depths spread evenly from 0.1 to 0.9.
        seed: of the first prompt; the others count on.

    Returns:
        By task, length and head (`layer 1 head 0`; `layer 1 together` with the largest score that
        any of its heads has, and no `mass`), means over prompts and rows of

        - `mass`: the attention on the statement that has the answer, from 0 to 1.
        - `raised`: its tokens whose scores exceed those of 99 % of the filler.
        - `tokens`: its tokens.
        - `token_rank`: the rank of its best key among all keys, from 1.
        - `block_rank`: the rank of its best block, scored by its best key, among all blocks.
        - `centre_rank`: the same, if blocks are scored by their centre key alone.
        - `blocks`: all blocks that are ranked.
    """
    found: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
    for task in TASKS:
        for length in lengths:
            rows = defaultdict(lambda: defaultdict(list))
            for i in range(prompts):
                depth = 0.1 + 0.8 * i / max(1, prompts - 1)
                for head, facts in _facts(model, make_prompt(task, length, depth, seed + i)):
                    for name, value in facts.items():
                        rows[head][name].append(value)
            means = {h: {n: round(fmean(v), 3) for n, v in f.items()} for h, f in rows.items()}
            found.setdefault(task, {})[length] = means
    return found


@torch.no_grad()
def _facts(model: LlamaForCausalLM, prompt: Prompt) -> list[tuple[str, dict[str, float]]]:
    """Return the facts of each head, and of each row that predicts a token of the value."""
    fact, length = prompt.asked[0], len(prompt.ids())
    seen: Seen = []
    ids = torch.tensor([[*prompt.ids(), *fact.value]])
    forward(model, ids, torch.arange(ids.shape[1])[None], seen)
    found = []
    for layer, (queries, keys) in enumerate(seen):
        keys = keys[0].repeat_interleave(queries.shape[1] // keys.shape[1], dim=0)
        for row in range(length - 1, length - 1 + len(fact.value)):
            query = queries[0, :, row, :, None]
            scores = (keys[:, : row + 1] @ query)[..., 0] * query.shape[1] ** -0.5
            for head, own in enumerate(scores):
                found.append((f"layer {layer} head {head}", _row_facts(own, prompt)))
            # HiP selects blocks for all heads of a layer, by the largest score of any.
            together = _row_facts(scores.amax(0), prompt)
            del together["mass"]
            found.append((f"layer {layer} together", together))
    return found


def _row_facts(scores: torch.Tensor, prompt: Prompt) -> dict[str, float]:
    """Return the facts of one row; scores are [keys], before the softmax."""
    fact = prompt.asked[0]
    statement = slice(fact.start, fact.stop)
    filler = _filler(prompt)
    usual = scores[: len(filler)][filler].quantile(PERCENTILE)
    stop = len(prompt.context) // BLOCK * BLOCK
    blocks = scores[BLOCK:stop].unflatten(0, (-1, BLOCK))
    own = slice(fact.start // BLOCK - 1, (fact.stop - 1) // BLOCK)
    return {
        "mass": scores.softmax(0)[statement].sum().item(),
        "raised": (scores[statement] > usual).sum().item(),
        "tokens": fact.stop - fact.start,
        "token_rank": _rank(scores[BLOCK:stop], scores[statement]),
        "block_rank": _rank(blocks.amax(1), blocks[own].amax(1)),
        "centre_rank": _rank(blocks[:, BLOCK // 2], blocks[own, BLOCK // 2]),
        "blocks": len(blocks),
    }


def _rank(scores: torch.Tensor, own: torch.Tensor) -> int:
    """Return the rank of the best of one's own scores among all, from 1."""
    return int((scores > own.max()).sum()) + 1
