"""Whether facts are still found in a prompt that ZipCache has packed, by bits and salient tokens.

    python benchmarks/zipcache_needle.py tests/fixtures/retriever [--lengths 2048,4096] [--out F]

Right answers on the real engine, in percent. With `asked` the question is the prompt's end, where
the probes see what it attends to, and the first token of the answer comes from the exact keys of
the prompt's own step. With `later` the question is decoded too, so that tokens were ranked by a
text that asks nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "models"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from in_process import engine, write
from kvshare_perplexity import forced_processor

STOCK = "stock"
ASKED, LATER = "asked", "later"


def settings(ratios: list[float]) -> dict[str, str | None]:
    """Return what is given to ``--plugin``, by name."""
    same = "key_salient_ratio=null"
    mixed = {f"4/2, ratio {r:g}": f"zipcache:salient_ratio={r:g},{same}" for r in ratios}
    few = f"zipcache:salient_ratio=0.6,{same},probe_recent=0,probe_random=0.01"
    ranks_nothing = {"4/2, ratio 0.6, no probes": few}
    keys_first = {
        f"4/2, keys 1, values {r:g}": f"zipcache:salient_ratio={r:g},key_salient_ratio=1"
        for r in (0.2, 0.3)
    }
    return {STOCK: None, "4/4": "zipcache:bits=4/4", **keys_first, **mixed, **ranks_nothing,
            "2/2": "zipcache:bits=2/2"}  # fmt: skip


def right_answers(llm: Any, task: str, length: int, count: int, when: str) -> float:
    """Return the share of prompts whose whole answer is right."""
    from retriever_data import make_prompt
    from vllm import SamplingParams

    prompts = [make_prompt(task, length, (i + 0.5) / count, seed=i) for i in range(count)]
    asked = [p.question() if when == LATER else () for p in prompts]
    params = [
        SamplingParams(
            temperature=0, max_tokens=len(first) + len(p.answer()), ignore_eos=True,
            extra_args={"forced": first} if first else {},
        )
        for p, first in zip(prompts, asked, strict=True)
    ]  # fmt: skip
    inputs = [
        {"prompt_token_ids": [*p.context, *(() if first else p.question())]}
        for p, first in zip(prompts, asked, strict=True)
    ]
    outs = llm.generate(inputs, params, use_tqdm=False)
    answers = [
        list(o.outputs[0].token_ids)[len(first) :] for o, first in zip(outs, asked, strict=True)
    ]
    return sum(a == list(p.answer()) for a, p in zip(answers, prompts, strict=True)) / count


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Ask everything under every setting."""
    from retriever_data import PASSKEY, RECALL

    found: dict[str, Any] = {}
    arguments = {"max_model_len": max(args.lengths) + 64, "block_size": args.block_size,
                 "max_num_batched_tokens": max(args.lengths) + 64,
                 "logits_processors": [forced_processor()]}  # fmt: skip
    for name, spec in settings(args.ratios).items():
        with engine(args.model, *([spec] if spec else []), **arguments) as llm:
            found[name] = {
                f"{task} {length}, {when}": 100
                * right_answers(llm, task, length, args.prompts, when)
                for task in (PASSKEY, RECALL)
                for length in args.lengths
                for when in (ASKED, LATER)
            }
        print(name, found[name], flush=True)
    return {"prompts": args.prompts, "block_size": args.block_size, "right": found}


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", type=lambda t: [int(x) for x in t.split(",")],
                        default=[2048, 4096])  # fmt: skip
    parser.add_argument("--ratios", type=lambda t: [float(x) for x in t.split(",")],
                        default=[0.1, 0.3, 0.6, 0.8])  # fmt: skip
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    write(args.out, measure(args))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
