"""Accuracy of KVShare against the share of reused tokens that it recomputes.

    python benchmarks/kvshare_accuracy.py [--pairs 60] [--out FILE.json] [--plot FILE.png]

Uses the reader fixture (``tests/fixtures/reader``), a trained model whose questions often need two
documents. A first request stores the documents in one order, with one set of facts; a later one
asks about the same documents in another order, in which every document that others refer to says
something else. KV of a document that was read under the old facts is wrong where it refers to them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples" / "models")]

from in_process import counted, engine, generate, write  # noqa: E402

READER = ROOT / "tests" / "fixtures" / "reader"
RATIOS = (0.0, 0.02, 0.05, 0.10, 0.15, 0.30, 1.0)
BASE = "kvshare:min_run=16,min_reuse=32,decode_interval=0,link_tokens={links},selector={selector}"
QUESTIONS = 8


@dataclass(frozen=True)
class Case:
    """Stored prompts, and what is asked about a later one.

    Attributes:
        stored: Token ids of each of the first requests.
        asked: Token ids of the later requests, each with a question at its end.
        answers: The right answers.
        hops: Documents that each answer needs.
    """

    stored: list[list[int]]
    asked: list[list[int]]
    answers: list[int]
    hops: list[int]


def make_cases(count: int, seed: int) -> list[Case]:
    """Draw pairs of an earlier and a later prompt with questions."""
    from reader_data import later_prompt, make_prompt

    rng = Random(seed)
    cases = []
    for _ in range(count):
        prompt = make_prompt(rng)
        later = later_prompt(rng, prompt)
        asked = rng.sample(later.questions, min(QUESTIONS, len(later.questions)))
        cases.append(
            Case(
                [prompt.ids],
                [[*later.ids, *question.tokens] for question in asked],
                [question.answer for question in asked],
                [question.hops for question in asked],
            )
        )
    return cases


def measure(cases: Sequence[Case], *plugins: str) -> dict[str, Any]:
    """Answer all questions on one engine."""
    right: dict[int, list[bool]] = {1: [], 2: []}
    cached, total = 0, 0
    counters = ("kvshare_recomputed_tokens_total", "kvshare_reused_tokens_total")
    before = [counted(name) for name in counters]
    quiet = {"kv_transfer_params": {"kvshare": {"store": False}}}
    with engine(READER, *plugins, block_size=32, max_model_len=2048) as llm:
        for case in cases:
            if plugins:
                generate(llm, case.stored, 1)
            outputs = generate(llm, case.asked, 1, extra_args=quiet)
            for output, answer, hops in zip(outputs, case.answers, case.hops, strict=True):
                right[hops].append(output.outputs[0].token_ids[0] == answer)
                cached += output.num_cached_tokens or 0
                total += len(output.prompt_token_ids)
            llm.reset_prefix_cache(reset_connector=bool(plugins))
    recomputed, reused = (counted(n) - b for n, b in zip(counters, before, strict=True))
    both = right[1] + right[2]
    return {
        "accuracy": sum(both) / len(both),
        "one_document": sum(right[1]) / len(right[1]),
        "two_documents": sum(right[2]) / len(right[2]),
        "questions": len(both),
        "cached_share": cached / total,
        "recomputed_share": recomputed / reused if reused else 0.0,
    }


def settings() -> dict[str, tuple[str, float | None, str]]:
    """Return what is compared: by label the rule, its share and the plug-in's text."""
    found: dict[str, tuple[str, float | None, str]] = {}
    for selector in ("dhd", "cacheblend", "random"):
        for ratio in RATIOS:
            text = BASE.format(links=16, selector=selector)
            share = f",recompute_min={ratio if ratio == 1.0 else 0},recompute_max={ratio}"
            found[f"{selector} {ratio:.0%}"] = (selector, ratio, text + share)
    for links in (2, 4, 8):
        text = BASE.format(links=links, selector="epic")
        found[f"epic {links}"] = ("epic", None, text + ",recompute_min=0,recompute_max=0.3")
    return found


def lay_out_shares(axis: Any) -> None:
    """Have a horizontal axis show shares of the reused tokens, in percent."""
    axis.set_xscale("symlog", linthresh=2)
    ticks = [0, 2, 5, 10, 30, 100]
    axis.set_xticks(ticks, [f"{tick} %" for tick in ticks])
    axis.set_xlim(left=-0.2)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw accuracy on two documents against the share that was recomputed."""
    from vllm_plugins.cli.pictures import pyplot

    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for selector in ("dhd", "cacheblend", "epic", "random"):
        rows = [r for r in result["settings"].values() if r["selector"] == selector]
        shares = [100 * r["recomputed_share"] for r in rows]
        axis.plot(shares, [100 * r["two_documents"] for r in rows], marker="o", label=selector)
    full = 100 * result["full_prefill"]["two_documents"]
    axis.axhline(full, color="grey", linestyle="--", label="full prefill")
    lay_out_shares(axis)
    axis.set_xlabel("reused tokens that were recomputed")
    axis.set_ylabel("right answers that need two documents, %")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--only", default="", help="labels that begin with this")
    args = parser.parse_args()
    cases = make_cases(args.pairs, args.seed)
    result: dict[str, Any] = {"full_prefill": measure(cases), "settings": {}}
    print(f"{'full prefill':16}", result["full_prefill"], flush=True)
    for label, (selector, ratio, text) in settings().items():
        if not label.startswith(args.only):
            continue
        row = {"selector": selector, "ratio": ratio, "plugin": text, **measure(cases, text)}
        result["settings"][label] = row
        print(
            f"{label:16} one {row['one_document']:.3f} two {row['two_documents']:.3f} "
            f"cached {row['cached_share']:.2f} recomputed {row['recomputed_share']:.3f}",
            flush=True,
        )
    write(args.out, result)
    if args.plot:
        draw(result, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
