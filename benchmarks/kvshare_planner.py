"""Time of KVShare's planner, per 1,000 prompt tokens.

    python benchmarks/kvshare_planner.py [--stored 200000] [--lengths 1000 4000 8000] [--out FILE]

An index is filled with a store's worth of documents, served four at a time with a question of their
own. Then prompts are planned: novel text alone, documents and novel text half and half, and 85 %
documents. ``periodic`` repeats 40 tokens for ever, in the index too: the worst that a client can
send. What is timed is ``plan()``, given a list of integers as a server has it, on the thread's own
CPU clock; what is reported is the median and the 90th percentile over prompts. For the prompts with
85 % documents, ``store`` is the time to draft and store what is new in them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_plugins.kv_connectors.kvshare.index import SegmentIndex
from vllm_plugins.kv_connectors.kvshare.planner import Plan, Planner

DOMAIN = b"benchmark"
VOCABULARY = 50_000
SHARES = {"novel": 0.0, "half": 0.5, "rag": 0.85}
Text = NDArray[np.int32]


class Workload:
    """Documents, an index that holds them, and prompts made of them.

    Args:
        stored: Tokens that the index holds.
        document: Tokens of a document.
    """

    def __init__(self, stored: int, document: int) -> None:
        self._rng = np.random.default_rng(0)
        self._documents = [self.novel(document) for _ in range(int(0.9 * stored) // document)]
        # Of its own, so that what it holds beside documents does not depend on the order.
        self.index = SegmentIndex(stored)
        self.planner = Planner(self.index, max_generation=8)
        while self.index.used < 0.99 * stored:
            self.serve(self.prompt(4 * document + 60, 4 * document / (4 * document + 60)))
        self.serve(np.resize(self.novel(40), 1000))

    def novel(self, tokens: int) -> Text:
        """Return random text."""
        return self._rng.integers(0, VOCABULARY, tokens).astype(np.int32)

    def prompt(self, tokens: int, share: float) -> Text:
        """Return a prompt of so many tokens, a share of them documents in random order."""
        known = round(tokens * share)
        chosen = self._rng.choice(len(self._documents), -(-known // len(self._documents[0])))
        documents = [self._documents[i] for i in chosen]
        head = np.concatenate([self.novel(0), *documents])[:known]
        return np.concatenate([head, self.novel(tokens - known)])

    def periodic(self, tokens: int) -> Text:
        """Return the text that the index holds and that repeats itself."""
        last = [self.index.get(key) for key in self.index][-1]
        assert last is not None
        return np.resize(last.tokens[:40], tokens)

    def serve(self, text: Text) -> None:
        """Plan a prompt and store what is new in it."""
        self.store(text, self.planner.plan(DOMAIN, text, 0, len(text)))

    def store(self, text: Text | list[int], plan: Plan) -> None:
        """Store what is new in a prompt that was planned."""
        self.index.pin(plan.segments)
        drafts = self.planner.new_segments(DOMAIN, text, plan, 0, len(text))
        self.index.store(DOMAIN, drafts)
        self.index.unpin(plan.segments)


def timed(work: Callable[[], object]) -> float:
    """Return the CPU seconds that something takes."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def row(workload: Workload, kind: str, tokens: int, prompts: int) -> dict[str, float | str]:
    """Measure one kind of prompt; times in milliseconds per 1,000 tokens."""
    times, reused, runs, stores = [], [], [], []
    for _ in range(prompts):
        share = SHARES.get(kind)
        text = workload.periodic(tokens) if share is None else workload.prompt(tokens, share)
        values, scale = text.tolist(), 1e6 / len(text)
        plan = workload.planner.plan(DOMAIN, values, 0, len(values))
        times.append(scale * timed(partial(workload.planner.plan, DOMAIN, values, 0, len(values))))
        reused.append(plan.reused / len(text))
        runs.append(len(plan.runs))
        if kind == "rag":
            stores.append(scale * timed(partial(workload.store, values, plan)))
    result: dict[str, float | str] = {
        "prompt": kind,
        "tokens": tokens,
        "plan_ms_per_1k_median": float(np.median(times)),
        "plan_ms_per_1k_p90": float(np.quantile(times, 0.9)),
        "reused_share": float(np.mean(reused)),
        "runs": float(np.mean(runs)),
    }
    if stores:
        result["store_ms_per_1k_median"] = float(np.median(stores))
    return result


def main() -> int:
    """Measure, print a table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--stored", type=int, default=200_000)
    parser.add_argument("--documents", type=int, nargs="+", default=[300, 1500])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 4000, 8000, 32000])
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    results = []
    print(f"{'document':>9} {'prompt':9} {'tokens':>7} {'plan':>7} {'p90':>7} {'store':>7}  reused")
    for document in options.documents:
        workload = Workload(options.stored, document)
        for kind in (*SHARES, "periodic"):
            for tokens in options.lengths:
                result = row(workload, kind, tokens, options.prompts)
                results.append({"document": document, **result})
                store = result.get("store_ms_per_1k_median")
                print(
                    f"{document:9} {kind:9} {tokens:7} {result['plan_ms_per_1k_median']:7.3f} "
                    f"{result['plan_ms_per_1k_p90']:7.3f} "
                    f"{'' if store is None else format(store, '.3f'):>7}  "
                    f"{result['reused_share']:.2f}"
                )
    if options.out:
        from vllm_plugins.bench.machine import describe_machine

        command = " ".join(["python", "benchmarks/kvshare_planner.py", *sys.argv[1:]])
        report = {
            "command": command,
            "machine": describe_machine(),
            "stored_tokens": options.stored,
            "unit": "CPU milliseconds per 1,000 prompt tokens",
            "results": results,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
