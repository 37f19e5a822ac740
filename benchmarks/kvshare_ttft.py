"""Time to first token with KVShare against stock vLLM, over prompt lengths.

    python benchmarks/kvshare_ttft.py MODEL [--lengths 1024 2048 4096] [--out FILE.json]

A prompt is 85 % documents that an earlier prompt held in another order, and 15 % new text, so that
no prefix is shared. Two more go on from there: the same prompt again, and a next turn with some
more text, of which stock vLLM has the prefix in its cache. The last has nothing in common with
anything, to see what the plug-in costs where it cannot help. The plug-in, stock vLLM, and stock
without prefix caching take turns, each in an engine of its own, in one run. Beside the time stand
the tokens that went through each layer, summed over the layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from in_process import counted, engine, generate, write

from vllm_plugins.kv_connectors.kvshare.work import PROJECTION

SHARED, DOCUMENTS = 0.85, 8
TURN = 64
KINDS = ("shared", "repeated", "turn", "unrelated")
STOCK, UNCACHED, PLUGIN = "stock", "stock, no prefix caching", "kvshare:recompute_max=0.15"
COUNTERS, CHECK_LAYER = ("reused", "gap", "recomputed"), 1


def prompts(length: int, seed: int, vocab: int) -> tuple[list[int], dict[str, list[int]]]:
    """Return an earlier prompt, and one of each kind."""
    rng = np.random.default_rng([seed, length])
    size = int(SHARED * length) // DOCUMENTS
    documents = [rng.integers(0, vocab, size).tolist() for _ in range(DOCUMENTS)]
    order = [*range(1, DOCUMENTS, 2), *range(0, DOCUMENTS, 2)]
    new = rng.integers(0, vocab, (2, length - size * DOCUMENTS)).tolist()
    earlier = [token for document in documents for token in document] + new[0]
    later = [token for i in order for token in documents[i]] + new[1]
    unrelated, turn = (rng.integers(0, vocab, size).tolist() for size in (length, TURN))
    return earlier, dict(zip(KINDS, (later, later, later + turn, unrelated), strict=True))


def first_token(llm: Any, prompt: list[int]) -> dict[str, float]:
    """Return the CPU time until a prompt's first token, and how many tokens its layers computed.

    The engine runs in this process, so that on one thread this is the time that it takes on an idle
    core; what else runs on the machine hardly shows.
    """
    before = {name: counted(f"kvshare_{name}_tokens_total") for name in COUNTERS}
    began = time.process_time()
    [output] = generate(llm, [prompt], 1, ignore_eos=True)
    spent = time.process_time() - began
    found = {name: counted(f"kvshare_{name}_tokens_total") - n for name, n in before.items()}
    layers = llm.llm_engine.model_config.get_total_num_hidden_layers()
    tokens = layers * (len(prompt) - (output.num_cached_tokens or 0))
    if found["reused"]:
        again = found["recomputed"] + found["gap"]
        tokens += (CHECK_LAYER + PROJECTION) * (found["reused"] + found["gap"] - again)
        tokens += layers * again
    return {"cpu_s": spent, "layer_tokens": tokens}


def measure(args: argparse.Namespace, variant: str, seed: int) -> dict[str, list[dict[str, float]]]:
    """Return what each kind of prompt took, one entry for each length."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in args.kinds}
    settings: dict[str, Any] = {
        "max_model_len": max(args.lengths) + TURN + 1,
        "max_num_batched_tokens": 2048,
        "block_size": 32,
        "enable_prefix_caching": variant != UNCACHED,
    }
    plugins = () if variant in (STOCK, UNCACHED) else (variant,)
    with engine(args.model, *plugins, **settings) as llm:
        vocab = llm.llm_engine.model_config.get_vocab_size() - 8
        generate(llm, [list(range(200))], 1)
        for length in args.lengths:
            earlier, asked = prompts(length, seed, vocab)
            if plugins and set(args.kinds) != {"unrelated"}:
                generate(llm, [earlier], 1)
            for kind in args.kinds:
                found[kind].append(first_token(llm, asked[kind]))
    return found


def compare(rounds: list[Any], variants: list[str], kind: str, place: int) -> dict[str, Any]:
    """Return the medians of one kind and length, and the ratios of the pairs."""
    rows = {v: [row[v][kind][place] for row in rounds] for v in variants}
    ours = rows.pop(variants[-1])
    found: dict[str, Any] = {
        "kvshare_cpu_s": statistics.median(row["cpu_s"] for row in ours),
        "layer_tokens_share": statistics.median(
            o["layer_tokens"] / s["layer_tokens"] for o, s in zip(ours, rows[STOCK], strict=True)
        ),
    }
    for name, theirs in rows.items():
        ratios = sorted(s["cpu_s"] / o["cpu_s"] for s, o in zip(theirs, ours, strict=True))
        found[name] = {
            "cpu_s": statistics.median(row["cpu_s"] for row in theirs),
            "over_kvshare": {"median": statistics.median(ratios), "all": ratios},
        }
    return found


def main() -> int:
    """Measure in turns, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="in this order")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plugin", default=PLUGIN)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if {"repeated", "turn"} & set(args.kinds) and args.kinds[0] != "shared":
        parser.error("what goes on from a shared prompt comes behind it")
    rounds, variants = [], [STOCK, UNCACHED, args.plugin]
    for number in range(args.rounds):
        turns = variants if number % 2 == 0 else variants[::-1]
        rounds.append({variant: measure(args, variant, number) for variant in turns})
        print(rounds[-1], flush=True)
    summary = {
        f"{kind} {length}": compare(rounds, variants, kind, place)
        for kind in args.kinds
        for place, length in enumerate(args.lengths)
    }
    print(json.dumps(summary, indent=1))
    write(args.out, {"plugin": args.plugin, "summary": summary, "rounds": rounds})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
