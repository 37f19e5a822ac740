"""How far KVShare's answers are from a full prefill's, as a distribution, and while decoding.

    python benchmarks/kvshare_divergence.py [--prompts 30] [--out FILE.json] [--plot FILE.png]

The reader fixture, and stored prompts as in ``kvshare_accuracy.py``. Here every request is asked
eight questions one after another: the right answers and the next questions are forced, so that all
variants continue the same text, and at each answer the distribution over the whole vocabulary is
compared with that of a full prefill (Kullback-Leibler divergence, in nats). The first answer is
what prefill leaves; before the later ones DHD's second stage may look at what is decoded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from in_process import counted, engine, write
from kvshare_accuracy import QUESTIONS, READER, lay_out_shares
from kvshare_perplexity import forced_processor
from reader_data import VOCABULARY, later_prompt, make_prompt

RATIOS = (0.0, 0.02, 0.05, 0.10, 0.15, 0.30, 1.0)
PREFILL = (
    "kvshare:min_run=16,min_reuse=32,selector={rule},recompute_min={least},recompute_max={most},"
)
# Every token looks; an interval of 16 would skip most of these questions of three tokens.
STAGES = {"": "decode_interval=0", ", stage 2": "decode_interval=1,decode_k=8,decode_budget=0.05"}
COUNTERS = ("recomputed", "refreshed", "reused")


@dataclass(frozen=True)
class Case:
    """What is stored, what is asked, and what is forced after the first question.

    Attributes:
        stored: Token ids of the earlier request.
        prompt: Token ids of the later one, with the first question.
        forced: The first answer, and all later questions and answers.
        places: Index in `forced` of each answer.
        hops: Documents that each answer needs.
    """

    stored: list[int]
    prompt: list[int]
    forced: list[int]
    places: list[int]
    hops: list[int]


def make_cases(count: int, seed: int) -> list[Case]:
    """Draw pairs of an earlier and a later prompt, with questions in a row."""
    rng, cases = Random(seed), []
    for _ in range(count):
        earlier = make_prompt(rng)
        later = later_prompt(rng, earlier)
        asked = rng.sample(later.questions, min(QUESTIONS, len(later.questions)))
        words = [token for question in asked for token in (*question.tokens, question.answer)]
        first = len(asked[0].tokens)
        places = [(first + 1) * i for i in range(len(asked))]
        hops = [question.hops for question in asked]
        prompt = [*later.ids, *words[:first]]
        cases.append(Case(earlier.ids, prompt, words[first:], places, hops))
    return cases


def answers(llm: Any, cases: Sequence[Case], store: bool) -> np.ndarray:
    """Return the log-probabilities at each answer, float64, shape (answers, vocabulary)."""
    from vllm import SamplingParams

    rows = []
    for case in cases:
        if store:
            one = SamplingParams(temperature=0, max_tokens=1)
            llm.generate([{"prompt_token_ids": case.stored}], one, use_tqdm=False)
        params = SamplingParams(
            temperature=0,
            max_tokens=len(case.forced),
            ignore_eos=True,
            logprobs=len(VOCABULARY),
            extra_args={
                "forced": case.forced,
                "kv_transfer_params": {"kvshare": {"store": False}},
            },
        )
        [output] = llm.generate([{"prompt_token_ids": case.prompt}], params, use_tqdm=False)
        for place in case.places:
            found = output.outputs[0].logprobs[place]
            rows.append([found[token].logprob for token in range(len(VOCABULARY))])
        llm.reset_prefix_cache(reset_connector=store)
    return np.array(rows)


def measure(cases: Sequence[Case], *plugins: str) -> tuple[np.ndarray, dict[str, float]]:
    """Return `answers` on an engine of its own, and the shares of the reused tokens."""
    before = [counted(f"kvshare_{name}_tokens_total") for name in COUNTERS]
    with engine(
        READER,
        *plugins,
        block_size=32,
        max_model_len=2048,
        max_logprobs=len(VOCABULARY),
        logprobs_mode="raw_logprobs",
        logits_processors=[forced_processor()],
    ) as llm:
        found = answers(llm, cases, store=bool(plugins))
    after = [counted(f"kvshare_{name}_tokens_total") for name in COUNTERS]
    again, decoding, reused = (new - old for new, old in zip(after, before, strict=True))
    return found, {
        "recomputed_share": again / max(1.0, reused),
        "refreshed_share": decoding / max(1.0, reused),
    }


def divergence(full: np.ndarray, blended: np.ndarray) -> np.ndarray:
    """Return KL(full || blended) of each row of log-probabilities, in nats."""
    return (np.exp(full) * (full - blended)).sum(1)


def settings() -> dict[str, tuple[str, float, str]]:
    """Return what is compared: by label the rule, its share and the plug-in's text."""
    found = {}
    for rule in ("dhd", "cacheblend", "random"):
        for stage, decoding in STAGES.items():
            if stage and rule != "dhd":
                continue
            for most in RATIOS:
                least = most if most == 1.0 else 0
                text = PREFILL.format(rule=rule, least=least, most=most) + decoding
                found[f"{rule}{stage} {most:.0%}"] = (rule + stage, most, text)
    return found


def draw(rows: dict[str, Any], path: Path) -> None:
    """Draw the divergence of later answers against what was recomputed in both stages."""
    from vllm_plugins.cli.pictures import pyplot

    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for rule in dict.fromkeys(row["rule"] for row in rows.values()):
        of_rule = [row for row in rows.values() if row["rule"] == rule]
        shares = [100 * (row["recomputed_share"] + row["refreshed_share"]) for row in of_rule]
        axis.plot(shares, [row["later_kl"] for row in of_rule], marker="o", label=rule)
    lay_out_shares(axis)
    axis.set_yscale("log")
    axis.set_xlabel("reused tokens that were recomputed, in both stages")
    axis.set_ylabel("KL from a full prefill at later answers, nats")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    cases = make_cases(args.prompts, args.seed)
    wanted = np.array([case.forced[place] for case in cases for place in case.places])
    first = np.array([not place for case in cases for place in case.places])
    both = np.array([hops == 2 for case in cases for hops in case.hops])
    full, _ = measure(cases)
    right = float((full.argmax(1) == wanted)[both].mean())
    result: dict[str, Any] = {"full_prefill": {"two_documents": right}, "settings": {}}
    print(result, f"{first.sum()} first and {(~first).sum()} later answers", flush=True)
    for label, (rule, ratio, text) in settings().items():
        found, shares = measure(cases, text)
        kl, correct = divergence(full, found), found.argmax(1) == wanted
        result["settings"][label] = {
            "rule": rule,
            "ratio": ratio,
            "plugin": text,
            "first_kl": float(kl[first].mean()),
            "later_kl": float(kl[~first].mean()),
            "first_two_documents": float(correct[first & both].mean()),
            "later_two_documents": float(correct[~first & both].mean()),
            **shares,
        }
        row = {k: v for k, v in result["settings"][label].items() if isinstance(v, float)}
        print(f"{label:20}", {name: round(value, 4) for name, value in row.items()}, flush=True)
    write(args.out, result)
    if args.plot:
        draw(result["settings"], args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
