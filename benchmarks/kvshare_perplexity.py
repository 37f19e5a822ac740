"""Perplexity of text that follows reused text, against a full prefill.

    python benchmarks/kvshare_perplexity.py MODEL [--passages 8] [--out FILE.json]

Passages are cut from modules of Python's own library, so that no data set is needed. A first
request stores a passage's four pieces in reverse order, each after another module's text. A second
one holds them in their true order, and the text that follows is forced token by token, so that its
log likelihood is that of decoding on the blended KV.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from in_process import counted, engine, write

MODULES = ("argparse", "ast", "configparser", "datetime", "decimal", "difflib", "doctest",
           "fractions", "inspect", "ipaddress", "mailbox", "optparse", "pathlib", "pickle",
           "shutil", "statistics", "subprocess", "tarfile", "textwrap", "typing")  # fmt: skip
COUNTERS = ("kvshare_recomputed_tokens_total", "kvshare_reused_tokens_total")
PIECES, PIECE, FOLLOWING = 4, 200, 64
BASE = "kvshare:min_run=32,recompute_min=0,recompute_max={most}"
VARIANTS = {
    "no recompute": BASE.format(most=0) + ",link_tokens=0,decode_interval=0",
    "cacheblend 15%": BASE.format(most=0.15) + ",selector=cacheblend,decode_interval=0",
    "epic 16": BASE.format(most=0.15) + ",selector=epic,link_tokens=16,decode_interval=0",
    "dhd 10%": BASE.format(most=0.10) + ",decode_interval=0",
    "dhd 15%": BASE.format(most=0.15) + ",decode_interval=0",
    "dhd 10% + 5% at decode": BASE.format(most=0.10) + ",decode_budget=0.05",
}


def forced_processor() -> type[Any]:
    """Return the logits processor that makes a request generate given tokens first."""
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class Forced(AdapterLogitsProcessor):
        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Callable[..., Any] | None:
            tokens = (params.extra_args or {}).get("forced")
            if tokens is None:
                return None

            def force(output_ids: list[int], logits: Any) -> Any:
                if len(output_ids) >= len(tokens):
                    return logits
                wanted = tokens[len(output_ids)]
                kept = logits[wanted].clone()
                logits.fill_(-math.inf)
                logits[wanted] = kept
                return logits

            return force

    return Forced


@dataclass(frozen=True)
class Passage:
    """Token ids of what is stored, of the prompt, and of what follows it."""

    stored: list[int]
    prompt: list[int]
    following: list[int]


def passages(model: Path, count: int) -> list[Passage]:
    """Cut passages from the library's modules."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [Path(str(find_spec(name).origin)).read_text() for name in MODULES]
    span = PIECES * PIECE
    ids = [tokenizer(text)["input_ids"] for text in texts]
    # So long that the last start still leaves room for what follows.
    last = 1000 + 700 * (count // len(MODULES))
    ids = [text for text in ids if len(text) >= max(last + span + FOLLOWING, 5000)]
    made = []
    for number in range(count):
        own, other = ids[number % len(ids)], ids[(number + 1) % len(ids)]
        start = 1000 + 700 * (number // len(ids))
        pieces = [own[start + i * PIECE : start + (i + 1) * PIECE] for i in range(PIECES)]
        between = [other[4000 + i * 40 : 4040 + i * 40] for i in range(PIECES)]
        order = range(PIECES - 1, -1, -1)
        stored = [token for i in order for token in (*between[i], *pieces[i])]
        head = other[3000:3100]
        prompt = [*head, *own[start : start + span]]
        made.append(Passage(stored, prompt, own[start + span : start + span + FOLLOWING]))
    return made


def log_likelihoods(
    model: Path, texts: Sequence[Passage], plugin: str | None
) -> tuple[np.ndarray, float]:
    """Return the mean log likelihood of a following token, per passage, and the cached share."""
    from vllm import SamplingParams

    totals, cached, length = [], 0, 0
    settings = {"max_model_len": 2048, "block_size": 32, "logits_processors": [forced_processor()]}
    with engine(model, *([plugin] if plugin else []), **settings) as llm:
        for text in texts:
            if plugin:
                llm.generate(
                    [{"prompt_token_ids": text.stored}],
                    SamplingParams(temperature=0, max_tokens=1),
                    use_tqdm=False,
                )
            params = SamplingParams(
                temperature=0,
                max_tokens=len(text.following),
                ignore_eos=True,
                logprobs=0,
                extra_args={"forced": text.following},
            )
            [out] = llm.generate([{"prompt_token_ids": text.prompt}], params, use_tqdm=False)
            answer = out.outputs[0]
            assert list(answer.token_ids) == text.following
            totals.append(
                sum(p[t].logprob for p, t in zip(answer.logprobs, answer.token_ids, strict=True))
            )
            cached += out.num_cached_tokens or 0
            length += len(text.prompt)
    return np.array(totals) / FOLLOWING, cached / length


def ratio_of_perplexities(full: np.ndarray, blended: np.ndarray) -> dict[str, Any]:
    """Return the ratio over all passages, and where it would lie in 95 of 100 other draws of them.

    Passages are pairs, so they are drawn with both of their likelihoods (bootstrap).
    """
    lost = full - blended
    drawn = np.random.default_rng(0).integers(0, len(lost), (10_000, len(lost)))
    low, high = np.exp(np.quantile(lost[drawn].mean(1), (0.025, 0.975)))
    return {"ratio": float(np.exp(lost.mean())), "interval_95": [float(low), float(high)]}


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    texts = passages(args.model, args.passages)
    full, _ = log_likelihoods(args.model, texts, None)
    result: dict[str, Any] = {"full_prefill": math.exp(-full.mean()), "variants": {}}
    print(f"full prefill: perplexity {result['full_prefill']:.3f}", flush=True)
    for name, plugin in VARIANTS.items():
        before = [counted(counter) for counter in COUNTERS]
        blended, cached = log_likelihoods(args.model, texts, plugin)
        recomputed, reused = (counted(c) - b for c, b in zip(COUNTERS, before, strict=True))
        row = ratio_of_perplexities(full, blended)
        shares = {"cached_share": cached, "recomputed_share": recomputed / reused}
        result["variants"][name] = {"plugin": plugin, **row, **shares}
        print(f"{name}: {row}, {shares}", flush=True)
    write(args.out, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
