"""Tokens a round of SpecVLM's drafters over operators, ratios and gates, without an engine.

    python benchmarks/specvlm_acceptance.py TARGET DRAFTER... --data FILE.json --images DIR
        [--samples 100] [--out FILE.json] [--plot FILE.png]

The target answers each sample greedily; every way to compress then drafts for these answers, in
plain torch, and draft tokens count as accepted up to the first that differs. That is the estimate
of ``vllm-plugins train specvlm``. The interval is where the figure would lie in 95 of 100 other
draws of the samples (bootstrap).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from in_process import write
from transformers import AutoProcessor

from vllm_plugins.spec_decode.specvlm.acceptance import (
    Answered,
    accepted_lengths,
    answer,
    draft_tokens,
    rounds,
)
from vllm_plugins.spec_decode.specvlm.checkpoint import load_drafter
from vllm_plugins.spec_decode.specvlm.compact import compact, draft_span
from vllm_plugins.spec_decode.specvlm.drafter import EagleDrafter
from vllm_plugins.spec_decode.specvlm.reference import image_spans
from vllm_plugins.spec_decode.specvlm.settings import OPERATORS, SpecVLMSettings
from vllm_plugins.spec_decode.specvlm.target import FrozenTarget, load_target
from vllm_plugins.training.batches import Collator
from vllm_plugins.training.data import read_samples

STEPS = 5
STATIC = {
    **{
        f"pool {ratio}x": {"default_operator": "pool", "pool_ratio": ratio} for ratio in (3, 10, 20)
    },
    **{
        f"prune {ratio}x": {"default_operator": "prune", "prune_ratio": ratio}
        for ratio in (3, 10, 20)
    },
    **{name: {"default_operator": name} for name in ("conv", "resample", "text_only")},
}
WAYS: dict[str, dict[str, Any]] = {
    "off": {"mode": "off"},
    **{name: {"mode": "static", **settings} for name, settings in STATIC.items()},
    "select as trained": {"mode": "select"},
    "select of all": {"mode": "select", "select_from": OPERATORS},
    "select of pool, text_only": {"mode": "select", "select_from": ("pool", "text_only")},
    "weighted": {"mode": "weighted"},
    "concat": {"mode": "concat"},
}


def with_settings(drafter: EagleDrafter, **changed: Any) -> EagleDrafter:
    """Return a drafter of the same weights that compresses in another way."""
    settings = SpecVLMSettings(**{**drafter.settings.model_dump(), **changed})
    other = EagleDrafter(drafter.shape, settings)
    other.load_state_dict(drafter.state_dict())
    return other


@torch.no_grad()
def rows_share(drafter: EagleDrafter, target: FrozenTarget, answered: Answered) -> float:
    """Return the draft rows of a prompt and its answer that are kept."""
    spans = image_spans(answered.tokens == target.image_token)
    features = answered.rows.features
    choice, weights = drafter.decide(features[0], answered.prompt_length, spans[-1][1])
    rows = drafter.fuse(answered.rows.embeddings[:, 1:], features[:, :-1])[0]
    drafted = [draft_span(*span) for span in spans]
    made = compact(rows, drafted, choice, drafter.compressor, [0] * len(spans), weights)
    return len(made.rows) / len(rows)


def measure(
    drafter: EagleDrafter, target: FrozenTarget, answers: Sequence[Answered]
) -> dict[str, Any]:
    """Return tokens a round, their interval, the draft rows' share and what the gate picks."""
    played, picks = [], Counter[str]()
    for answered in answers:
        drafts, choice = draft_tokens(drafter, target, answered, STEPS)
        accepted = accepted_lengths(answered.tokens, drafts).tolist()
        played.append(rounds(accepted, answered.prompt_length))
        picks[choice or "none"] += 1
    tokens, count = np.array(played).T
    drawn = np.random.default_rng(0).integers(0, len(played), (5_000, len(played)))
    low, high = np.quantile(tokens[drawn].sum(1) / count[drawn].sum(1), (0.025, 0.975))
    return {
        "tokens_per_round": float(tokens.sum() / count.sum()),
        "interval_95": [float(low), float(high)],
        "draft_rows_share": rows_share(drafter, target, answers[0]),
        "picks": {name: number / len(played) for name, number in sorted(picks.items())},
    }


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw tokens a round with intervals, a panel for each drafter."""
    from vllm_plugins.cli.pictures import pyplot

    plt = pyplot()
    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 5), squeeze=False)
    for axis, (name, rows) in zip(axes[0], results.items(), strict=True):
        middle = [row["tokens_per_round"] for row in rows.values()]
        ends = np.array([row["interval_95"] for row in rows.values()]).T
        axis.barh(list(rows), middle, xerr=np.abs(ends - middle), capsize=3)
        axis.invert_yaxis()
        axis.set_xlim(1, STEPS + 1)
        axis.set_title(name)
        axis.set_xlabel("tokens a round")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("target")
    parser.add_argument("drafters", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--longest", type=int, default=80, help="answer, in tokens")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    target = load_target(args.target, "cpu", torch.float32)
    collator = Collator(AutoProcessor.from_pretrained(args.target), target.image_token, 2048)
    samples = read_samples(args.data, args.images)[: args.samples]
    answers = answer(target, collator, samples, "cpu", torch.float32, args.longest)
    results: dict[str, dict[str, Any]] = {}
    for folder in args.drafters:
        drafter, rows = load_drafter(folder), results.setdefault(folder.name, {})
        for name, changed in WAYS.items():
            rows[name] = measure(with_settings(drafter, **changed), target, answers)
            print(f"{folder.name:24} {name:26}", rows[name], flush=True)
    write(args.out, {"answers": len(answers), "drafts": STEPS, "drafters": results})
    if args.plot:
        draw(results, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
