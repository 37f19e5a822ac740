"""What drafting costs and saves on a model whose steps cost something, at a given acceptance.

    python benchmarks/specvlm_cost.py [--layers 24] [--width 512] [--rounds 3] [--out F.json]

Target and drafter are random, so drafts are accepted by vLLM's synthetic rejection sampler: as many
tokens a round as asked for, whatever was drafted. Answers mean nothing; times are those of a
drafter that is so often right. Each variant answers a prompt that is mostly one image of 576
tokens, in an engine of its own, and they take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "models"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from dynamic_llava import IMAGE_TOKENS, PIXELS, asked, settings
from in_process import counted, engine, write

NONE = "none"
DRAFTS, GRID = 5, 24
# Answered before anything is timed.
WARM_UP = 1
WAYS = {
    "image whole": "mode=off",
    "pool": "mode=static,default_operator=pool",
    "text only": "mode=static,default_operator=text_only",
}


def timed(llm: Any, seeds: range, tokens: int) -> list[float]:
    """Return the CPU time of each answer, its prefill included."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    found = []
    for seed in seeds:
        prompt = asked(seed)
        began = time.process_time()
        llm.generate([prompt], params, use_tqdm=False)
        found.append(time.process_time() - began)
    return found


def variant(drafter: Path, name: str, length: float) -> dict[str, Any]:
    """Return the engine arguments of a variant.

    Args:
        drafter: The drafter.
        name: Of the variant.
        length: Tokens a round.
    """
    if name == NONE:
        return {}
    from vllm_plugins import engine_args

    given = engine_args(f"specvlm:model={drafter},num_speculative_tokens={DRAFTS},{WAYS[name]}")
    synthetic = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": length}
    return given | {"speculative_config": given["speculative_config"] | synthetic}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time every variant at every acceptance."""
    from drafter import random_drafter
    from vision import tiny_llava

    positions = settings()["max_model_len"]
    model = tiny_llava(width=args.width, layers=args.layers, positions=positions, pixels=PIXELS)
    drafter = random_drafter(model, (GRID, GRID), block_size=settings()["block_size"])
    cases = [(NONE, 1.0), *((name, length) for length in args.lengths for name in WAYS)]
    rounds: list[dict[str, list[float]]] = []
    rows: dict[str, float] = {}
    for number in range(args.rounds):
        row = {}
        for name, length in cases[:: 1 if number % 2 == 0 else -1]:
            label = name if name == NONE else f"{name}, {length:g} a round"
            with engine(model, **settings(**variant(drafter, name, length))) as llm:
                timed(llm, range(WARM_UP), args.tokens)
                before = counted("specvlm_draft_rows_total", state="dropped")
                seeds = range(1000 * number + 1, 1000 * number + 1 + args.prompts)
                row[label] = timed(llm, seeds, args.tokens)
                dropped = counted("specvlm_draft_rows_total", state="dropped") - before
                rows[label] = dropped / args.prompts
        rounds.append(row)
        print({name: round(statistics.median(t), 3) for name, t in row.items()}, flush=True)
    shape = {
        "layers": args.layers, "width": args.width, "image_tokens": IMAGE_TOKENS,
        "answer_tokens": args.tokens, "drafts": DRAFTS,
    }  # fmt: skip
    return {"shape": shape, "summary": compared(rounds, rows), "rounds": rounds}


def compared(rounds: list[dict[str, list[float]]], rows: dict[str, float]) -> dict[str, Any]:
    """Return each variant's time, and how many times faster it is than no drafting."""
    summary = {}
    for name in rounds[0]:
        ratios = [
            plain / ours for row in rounds for plain, ours in zip(row[NONE], row[name], strict=True)
        ]
        low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9)).tolist()
        summary[name] = {
            "cpu_s": statistics.median(t for row in rounds for t in row[name]),
            "none_over_this": {"median": middle, "p10": low, "p90": high},
            "draft_rows_dropped": rows.get(name, 0.0),
        }
        print(f"{name:24} {summary[name]}", flush=True)
    return summary


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--prompts", type=int, default=2, help="in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=float, nargs="+", default=[3.5, 4.9])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    write(args.out, measure(args))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
