"""Whether KVShare's gain lasts: novel shuffled queries over a fixed set of documents.

    python benchmarks/kvshare_lasting.py MODEL [--queries 500] [--out FILE.json] [--plot FILE.png]

Each query holds four of the documents in a random order and a question that nobody asked before.
The store has room for a little more than the documents, so every question that is stored has to go
again. The gain is the CPU time to first token of stock vLLM over that of KVShare on such queries,
in the first fifty after every document was seen and at the end.
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

DOCUMENTS, LENGTH, PER_QUERY, QUESTION = 24, 300, 4, 60
WINDOW = 50


class Queries:
    """An endless supply, the same for every engine of one seed."""

    def __init__(self, vocab: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._vocab = vocab
        self._documents = [self._draw(LENGTH) for _ in range(DOCUMENTS)]

    def _draw(self, length: int) -> list[int]:
        return self._rng.integers(0, self._vocab, length).tolist()

    def next(self) -> list[int]:
        """Return another query."""
        chosen = self._rng.permutation(DOCUMENTS)[:PER_QUERY]
        return [token for i in chosen for token in self._documents[i]] + self._draw(QUESTION)

    def warm_up(self) -> list[list[int]]:
        """Return prompts that hold every document once."""
        groups = range(0, DOCUMENTS, PER_QUERY)
        parts = [self._documents[i : i + PER_QUERY] for i in groups]
        return [[token for text in part for token in text] + self._draw(8) for part in parts]


def store_gib(model: Path, tokens: int) -> float:
    """Return the host memory that holds so many tokens of a model's KV in float32."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = config.num_hidden_layers * 2 * config.num_key_value_heads * size * 4
    return tokens * per_token / 2**30


def measure(model: Path, plugin: str | None, queries: int) -> tuple[list[float], list[float]]:
    """Return each query's CPU seconds to its first token, and the share of it that was cached."""
    seconds, cached = [], []
    with engine(model, *([plugin] if plugin else []), block_size=32, max_model_len=2048) as llm:
        supply = Queries(llm.llm_engine.model_config.get_vocab_size() - 8, seed=3)
        for prompt in supply.warm_up():
            generate(llm, [prompt], 1)
        for _ in range(queries):
            prompt = supply.next()
            began = time.process_time()
            [output] = generate(llm, [prompt], 1)
            seconds.append(time.process_time() - began)
            cached.append((output.num_cached_tokens or 0) / len(prompt))
    return seconds, cached


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the gain over the queries."""
    from vllm_plugins.cli.pictures import pyplot

    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 3.5))
    gains = result["gain_by_window"]
    axis.plot([WINDOW * (i + 0.5) for i in range(len(gains))], gains, marker="o")
    axis.axhline(0.9 * gains[0], color="grey", linestyle="--", label="90 % of the first")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("novel queries")
    axis.set_ylabel("TTFT, stock over KVShare")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    gib = store_gib(args.model, int(1.25 * DOCUMENTS * LENGTH))
    plugin = f"kvshare:recompute_max=0.15,host_gib={gib:.9f}"
    # The machine's slow moments fall on both: stock before and after.
    stock, _ = measure(args.model, None, WINDOW)
    ours, cached = measure(args.model, plugin, args.queries)
    stock += measure(args.model, None, WINDOW)[0]
    base = statistics.median(stock)
    windows = [ours[i : i + WINDOW] for i in range(0, len(ours), WINDOW)]
    gains = [base / statistics.median(window) for window in windows]
    result = {
        "plugin": plugin,
        "stock_ttft_cpu_s": base,
        "gain_by_window": gains,
        "lasting": gains[-1] / gains[0],
        "cached_share_first": statistics.mean(cached[:WINDOW]),
        "cached_share_last": statistics.mean(cached[-WINDOW:]),
    }
    print(result)
    write(args.out, result)
    if args.plot:
        draw(result, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
