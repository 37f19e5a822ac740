"""Time to first token with KVShare against stock vLLM, over prompt lengths.

    python benchmarks/kvshare_ttft.py MODEL [--lengths 1024 2048 4096] [--out FILE.json]

A prompt is 85 % documents that an earlier prompt held in another order, and 15 % new text. Stock
vLLM, with prefix caching as by default, finds the first block at most. A second set of prompts has
nothing in common with anything, to see what the plug-in costs where it cannot help. Stock and
plug-in take turns, each in an engine of its own, in one run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from in_process import engine, generate, write

SHARED, DOCUMENTS = 0.85, 8
KINDS = ("shared", "unrelated")
PLUGIN = "kvshare:recompute_max=0.15"


def prompts(length: int, seed: int, vocab: int) -> tuple[list[int], list[int], list[int]]:
    """Return an earlier prompt, one with its documents in another order, and an unrelated one."""
    rng = np.random.default_rng([seed, length])
    size = int(SHARED * length) // DOCUMENTS
    documents = [rng.integers(0, vocab, size).tolist() for _ in range(DOCUMENTS)]
    order = [*range(1, DOCUMENTS, 2), *range(0, DOCUMENTS, 2)]
    new = rng.integers(0, vocab, (2, length - size * DOCUMENTS)).tolist()
    earlier = [token for document in documents for token in document] + new[0]
    later = [token for i in order for token in documents[i]] + new[1]
    return earlier, later, rng.integers(0, vocab, length).tolist()


def first_token_seconds(llm: Any, prompt: list[int]) -> float:
    """Return the CPU time until a prompt's first token.

    The engine runs in this process, so that on one thread this is the time that it takes on an idle
    core; what else runs on the machine hardly shows.
    """
    began = time.process_time()
    generate(llm, [prompt], 1, ignore_eos=True)
    return time.process_time() - began


def measure(args: argparse.Namespace, plugin: str | None, seed: int) -> dict[str, list[float]]:
    """Return seconds by kind of prompt, one for each length."""
    found: dict[str, list[float]] = {kind: [] for kind in args.kinds}
    longest = max(args.lengths)
    settings = {"max_model_len": longest + 64, "max_num_batched_tokens": 2048, "block_size": 32}
    with engine(args.model, *([plugin] if plugin else []), **settings) as llm:
        vocab = llm.llm_engine.model_config.get_vocab_size() - 8
        generate(llm, [list(range(200))], 1)
        for length in args.lengths:
            earlier, later, unrelated = prompts(length, seed, vocab)
            if plugin and "shared" in args.kinds:
                generate(llm, [earlier], 1)
            for kind, prompt in (("shared", later), ("unrelated", unrelated)):
                if kind in args.kinds:
                    found[kind].append(first_token_seconds(llm, prompt))
    return found


def main() -> int:
    """Measure in turns, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plugin", default=PLUGIN)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rounds = []
    for number in range(args.rounds):
        variants = ["stock", args.plugin] if number % 2 == 0 else [args.plugin, "stock"]
        row = {v: measure(args, None if v == "stock" else v, number) for v in variants}
        rounds.append(row)
        print(row, flush=True)
    summary = {}
    for kind in args.kinds:
        for i, length in enumerate(args.lengths):
            stock = [row["stock"][kind][i] for row in rounds]
            ours = [row[args.plugin][kind][i] for row in rounds]
            ratios = sorted(s / o for s, o in zip(stock, ours, strict=True))
            summary[f"{kind} {length}"] = {
                "stock_cpu_s": statistics.median(stock),
                "kvshare_cpu_s": statistics.median(ours),
                "stock_over_kvshare": {"median": statistics.median(ratios), "all": ratios},
            }
            print(f"{kind:9} {length}: {summary[f'{kind} {length}']}", flush=True)
    write(args.out, {"plugin": args.plugin, "summary": summary, "rounds": rounds})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
