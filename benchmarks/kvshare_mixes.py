"""Accuracy of KVShare by what a later prompt shares with earlier ones.

    python benchmarks/kvshare_mixes.py [--prompts 40] [--seed 13] [--out FILE.json]

`kvshare_accuracy.py` asks one kind of later prompt: every document was stored, and every document
that others refer to has changed. Here the order, the share that has changed, and where the
documents were stored differ. What a rule spends is beside what it answers: DHD's is conditional and
stays below its limit where less deviates. CacheBlend's spends all of its budget, so it is here with
that limit, and with about what DHD spends over all mixes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from in_process import write
from kvshare_accuracy import BASE, QUESTIONS, Case, measure
from reader_data import Document, Prompt, in_order, make_prompt

BUDGET = 0.10
# What `dhd` was seen to spend on average over the mixes of another seed.
AVERAGE = 0.03
RULES = {
    "nothing recomputed": BASE.format(links=0, selector="dhd") + ",recompute_min=0,recompute_max=0",
    **{
        rule: BASE.format(links=16, selector=rule) + f",recompute_min=0,recompute_max={BUDGET}"
        for rule in ("dhd", "cacheblend", "random")
    },
    "cacheblend 3%": BASE.format(links=0, selector="cacheblend")
    + f",recompute_min=0,recompute_max={AVERAGE}",
    "epic": BASE.format(links=4, selector="epic") + ",recompute_min=0,recompute_max=0.3",
}

Change = Callable[[Random, Sequence[Document]], list[Document]]


def all_changed(rng: Random, documents: Sequence[Document]) -> list[Document]:
    """Return the documents, those that others refer to with other words."""
    return [document.redrawn(rng) for document in documents]


def half_changed(rng: Random, documents: Sequence[Document]) -> list[Document]:
    """Return the documents, every other one of those that others refer to with other words."""
    sources = [document for document in documents if document.notes]
    changed = sources[::2]
    return [d.redrawn(rng) if d in changed else d for d in documents]


def unchanged(rng: Random, documents: Sequence[Document]) -> list[Document]:
    """Return the documents."""
    return list(documents)


def shuffled(rng: Random, prompt: Prompt, change: Change) -> tuple[list[Prompt], Prompt]:
    """Return one earlier prompt, and the later one: its documents in another order."""
    return [prompt], Prompt(tuple(in_order(rng, change(rng, prompt.documents))))


def same_order(rng: Random, prompt: Prompt, change: Change) -> tuple[list[Prompt], Prompt]:
    """Return one earlier prompt, and the later one: its documents in the same order."""
    return [prompt], Prompt(tuple(change(rng, prompt.documents)))


def half_stored(rng: Random, prompt: Prompt, change: Change) -> tuple[list[Prompt], Prompt]:
    """Return an earlier prompt of every other document, and a later one of all."""
    _, later = shuffled(rng, prompt, change)
    return [Prompt(prompt.documents[::2])], later


def two_prompts(rng: Random, prompt: Prompt, change: Change) -> tuple[list[Prompt], Prompt]:
    """Return two earlier prompts of half the documents each, and a later one of all."""
    _, later = shuffled(rng, prompt, change)
    return [Prompt(prompt.documents[::2]), Prompt(prompt.documents[1::2])], later


MIXES = {
    "another order, all changed": (shuffled, all_changed),
    "another order, half changed": (shuffled, half_changed),
    "another order, nothing changed": (shuffled, unchanged),
    "same order, all changed": (same_order, all_changed),
    "half of them stored, all changed": (half_stored, all_changed),
    "stored in two prompts, all changed": (two_prompts, all_changed),
    "stored in two prompts, nothing changed": (two_prompts, unchanged),
}


def make_cases(mix: str, count: int, seed: int) -> list[Case]:
    """Draw earlier and later prompts with questions; the same prompts for every mix."""
    arrange, change = MIXES[mix]
    rng, cases = Random(seed), []
    for _ in range(count):
        earlier, later = arrange(Random(rng.random()), make_prompt(rng), change)
        asked = rng.sample(later.questions, min(QUESTIONS, len(later.questions)))
        cases.append(
            Case(
                [prompt.ids for prompt in earlier],
                [[*later.ids, *question.tokens] for question in asked],
                [question.answer for question in asked],
                [question.hops for question in asked],
            )
        )
    return cases


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"budget": BUDGET, "average": AVERAGE, "mixes": {}}
    for mix in MIXES:
        cases = make_cases(mix, args.prompts, args.seed)
        rows = result["mixes"][mix] = {"full prefill": measure(cases)}
        rows |= {rule: measure(cases, text) for rule, text in RULES.items()}
        print(mix)
        for rule, row in rows.items():
            print(
                f"  {rule:20} one {row['one_document']:.3f} two {row['two_documents']:.3f} "
                f"cached {row['cached_share']:.2f} recomputed {row['recomputed_share']:.3f}",
                flush=True,
            )
        write(args.out, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
