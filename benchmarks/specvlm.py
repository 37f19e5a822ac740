"""What SpecVLM costs where many requests run: tokens per second by batch, drafting and not.

    python benchmarks/specvlm.py TARGET DRAFTER --data scenes.json --images DIR [--out F.json]

Drafting pays while verifying more tokens costs little, so the plug-in stops it at
`draft_until_batch`, and the result names the value that the figures speak for. Every batch is
answered by a stock engine, by one that stops there and by one that never does, in turns, each in
this process; the figure is processor time on one thread, which other work on the machine disturbs
less than the clock on the wall. For one request at a time see
`vllm-plugins bench --drafting`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from in_process import engine, write

STOCK, STOPS, ALWAYS = "stock", "stops", "always"
BATCHES = (1, 4, 8, 16, 32, 48)
BLOCK = 32


def variants(drafter: Path, until: int) -> dict[str, str | None]:
    """Return what is given to ``--plugin``, by name."""
    ours = {"name": "specvlm", "model": str(drafter)}
    return {
        STOCK: None,
        STOPS: json.dumps(ours | {"draft_until_batch": until}),
        ALWAYS: json.dumps(ours | {"draft_until_batch": None}),
    }


def messages(data: Path, images: Path, count: int) -> list[list[dict[str, Any]]]:
    """Return the first questions of samples about images, again and again if they are few."""
    from PIL import Image

    from vllm_plugins.training.data import read_samples

    found: list[list[dict[str, Any]]] = []
    for sample in read_samples(data, images):
        assert sample.image is not None
        with Image.open(sample.image) as picture:
            image = {"type": "image_pil", "image_pil": picture.convert("RGB")}
        text = {"type": "text", "text": sample.turns[0].question}
        found.append([{"role": "user", "content": [image, text]}])
    return [found[i % len(found)] for i in range(count)]


def answer(llm: Any, asked: list[Any], tokens: int) -> tuple[float, list[list[int]]]:
    """Answer all at once; return the seconds of processor time, and the tokens."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens)
    began = time.process_time()
    outputs = llm.chat(asked, params, use_tqdm=False)
    return time.process_time() - began, [list(o.outputs[0].token_ids) for o in outputs]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Answer every batch by every variant, round by round."""
    asked = messages(args.data, args.images, max(args.batches))
    specs = variants(args.drafter, args.draft_until_batch)
    rounds: list[dict[str, dict[str, float]]] = []
    answers: dict[int, list[list[int]]] = {}
    equal = True
    for number in range(args.rounds):
        row: dict[str, dict[str, float]] = {}
        # Each begins as often as it ends.
        for name in list(specs)[:: 1 if number % 2 == 0 else -1]:
            spec, row[name] = specs[name], {}
            settings = {"block_size": BLOCK, "max_num_seqs": max(args.batches),
                        "max_model_len": 1024, "enable_prefix_caching": False}  # fmt: skip
            with engine(args.target, *([spec] if spec else []), **settings) as llm:
                answer(llm, asked[:2], args.max_tokens)
                for batch in args.batches:
                    took, told = answer(llm, asked[:batch], args.max_tokens)
                    row[name][str(batch)] = sum(map(len, told)) / took
                    equal &= answers.setdefault(batch, told) == told
        rounds.append(row)
        print(row, flush=True)
    summary = compared(rounds)
    found = {"answers_equal": equal, "draft_until_batch": draft_until(summary)}
    return {**found, "summary": summary, "rounds": rounds}


def draft_until(summary: dict[str, Any]) -> int:
    """Return the value of `draft_until_batch` that the figures speak for, 0 for no drafting at all.

    It is the largest batch measured up to which a drafting engine was at no batch slower than stock
    in the median of the rounds.
    """
    until = 0
    for batch, found in sorted(summary.items(), key=lambda item: int(item[0])):
        if found[ALWAYS]["median"] < 1:
            break
        until = int(batch)
    return until


def compared(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return each variant's tokens per second over stock's, by batch."""
    found: dict[str, Any] = {}
    for batch in rounds[0][STOCK]:
        found[batch] = {"stock_tokens_per_s": statistics.median(r[STOCK][batch] for r in rounds)}
        for name in (STOPS, ALWAYS):
            ratios = [row[name][batch] / row[STOCK][batch] for row in rounds]
            found[batch][name] = {"median": statistics.median(ratios), "least": min(ratios),
                                  "most": max(ratios)}  # fmt: skip
        print(batch, found[batch], flush=True)
    return found


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("drafter", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="samples in LLaVA's layout")
    parser.add_argument("--images", type=Path, required=True, help="their pictures")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--draft-until-batch", type=int, default=32, help="of `stops`")
    parser.add_argument("--max-tokens", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    write(args.out, measure(args))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
