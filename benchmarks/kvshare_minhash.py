"""What MinHash and a diff would find of reused text, beside KVShare's anchors.

    python benchmarks/kvshare_minhash.py [--out FILE]

Random documents are stored four to a prompt. Then prompts are made of pieces of four documents with
novel text after each, and the share of the pieces' tokens that is found is counted. MinHash works
on the same content-defined chunks, with 128 permutations over 5-token shingles and two ways of
banding; every candidate gets a perfect diff for nothing (all common runs of 32 tokens count). Times
are CPU milliseconds per 1,000 prompt tokens; MinHash's are those of the signatures and the look-up
alone. The time of two real diffs of 512 by 512 tokens is measured as well.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_plugins.kv_connectors.kvshare.chunking import ChunkSizes, WindowHash
from vllm_plugins.kv_connectors.kvshare.index import SegmentIndex
from vllm_plugins.kv_connectors.kvshare.planner import Planner

DOMAIN = b"benchmark"
DOCUMENT, NOVEL, MIN_RUN, SHINGLE, PERMUTATIONS = 300, 60, 32, 5, 128
Text = NDArray[np.int32]


class MinHash:
    """Chunks found by banded MinHash signatures.

    Args:
        rows: Signature values in a band.
    """

    def __init__(self, rows: int) -> None:
        rng = np.random.default_rng(0)
        self._rows = rows
        self._factors = rng.integers(1, 2**63, (PERMUTATIONS, 1), dtype=np.uint64) | np.uint64(1)
        self._terms = rng.integers(0, 2**63, (PERMUTATIONS, 1), dtype=np.uint64)
        self._bands: dict[tuple[int, bytes], set[int]] = defaultdict(set)
        self.chunks: list[Text] = []

    def add(self, text: Text) -> None:
        """Store the chunks of a text."""
        for chunk in chunks(text):
            for band in self._signature(chunk):
                self._bands[band].add(len(self.chunks))
            self.chunks.append(chunk)

    def candidates(self, text: Text) -> set[int]:
        """Return the stored chunks that share a band with a chunk of the text."""
        bands = (band for chunk in chunks(text) for band in self._signature(chunk))
        return set().union(*(self._bands.get(band, ()) for band in bands))

    def _signature(self, chunk: Text) -> list[tuple[int, bytes]]:
        tokens = chunk.astype(np.uint64)
        shingles = np.zeros(len(chunk) - SHINGLE + 1, dtype=np.uint64)
        for i in range(SHINGLE):
            shingles = shingles * np.uint64(1_000_003) + tokens[i : len(shingles) + i]
        shingles = (shingles ^ (shingles >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        least = ((shingles * self._factors + self._terms) >> np.uint64(20)).min(axis=1)
        return [(i, least[i : i + self._rows].tobytes()) for i in range(0, len(least), self._rows)]


def chunks(text: Text) -> list[Text]:
    """Cut a text as KVShare does; chunks without a shingle are left out."""
    bounds = ChunkSizes().bounds(WindowHash(DOMAIN)(text), len(text))
    return [text[low:high] for low, high in pairwise(bounds) if high - low >= SHINGLE]


def found_by_diff(text: Text, candidates: list[Text]) -> int:
    """Return the tokens of a text in a run of 32 that it has in common with a candidate."""
    covered = np.zeros(len(text), dtype=bool)
    known = {c[i : i + MIN_RUN].tobytes() for c in candidates for i in range(len(c) - MIN_RUN + 1)}
    for i in range(len(text) - MIN_RUN + 1):
        if text[i : i + MIN_RUN].tobytes() in known:
            covered[i : i + MIN_RUN] = True
    return int(covered.sum())


def milliseconds(work: Callable[[], object]) -> float:
    """Return the CPU time that something takes."""
    start = time.thread_time()
    work()
    return (time.thread_time() - start) * 1e3


def compare(piece: int, prompts: int) -> list[dict[str, float | str]]:
    """Compare the methods on prompts of pieces of so many tokens."""
    rng = np.random.default_rng(0)
    documents = rng.integers(0, 50_000, (600, DOCUMENT)).astype(np.int32)
    index = SegmentIndex(2 * documents.size)
    planner = Planner(index, MIN_RUN)
    tables = {"MinHash, 32 bands of 4": MinHash(4), "MinHash, 64 bands of 2": MinHash(2)}
    for text in documents.reshape(-1, 4 * DOCUMENT):
        index.store(DOMAIN, planner.new_segments(DOMAIN, text, None, 0, len(text)))
        for table in tables.values():
            table.add(text)
    rows: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(3))
    for _ in range(prompts):
        parts: list[Text] = []
        for document in documents[rng.choice(len(documents), 4, replace=False)]:
            begin = int(rng.integers(0, DOCUMENT - piece + 1))
            parts.append(document[begin : begin + piece])
            parts.append(rng.integers(0, 50_000, NOVEL).astype(np.int32))
        text = np.concatenate(parts)
        spent = milliseconds(partial(planner.plan, DOMAIN, text, 0, len(text)))
        reused = planner.plan(DOMAIN, text, 0, len(text)).reused
        rows["anchors"] += (reused, spent, 0)
        for name, table in tables.items():
            spent = milliseconds(partial(table.candidates, text))
            near = [table.chunks[i] for i in table.candidates(text)]
            rows[name] += (found_by_diff(text, near), spent, len(near))
    scale = np.array([4 * piece, (4 * piece + 4 * NOVEL) / 1e3, 1]) * prompts
    names = ("found_share", "ms_per_1k", "candidates_per_prompt")
    return [
        {"method": method, "piece": piece, **dict(zip(names, (sums / scale).tolist(), strict=True))}
        for method, sums in rows.items()
    ]


def edit_distance(one: Text, other: Text) -> int:
    """Return the Levenshtein distance, a row at a time."""
    columns = np.arange(len(other) + 1)
    row = columns
    for i, token in enumerate(one):
        best = np.minimum(row[1:] + 1, row[:-1] + (other != token))
        best = np.concatenate(([i + 1], best))
        row = np.minimum.accumulate(best - columns) + columns
    return int(row[-1])


def diff_times() -> dict[str, float]:
    """Return the milliseconds of two diffs of 512 by 512 tokens, 13 of which differ."""
    one = np.random.default_rng(0).integers(0, 50_000, 512).astype(np.int32)
    other = one.copy()
    other[::40] += 1
    matcher = difflib.SequenceMatcher(None, one.tolist(), other.tolist(), autojunk=False)
    return {
        "edit_distance_ms": milliseconds(lambda: edit_distance(one, other)),
        "difflib_ms": milliseconds(matcher.get_matching_blocks),
    }


def main() -> int:
    """Compare, print a table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    results = [row for piece in (300, 100, 40) for row in compare(piece, options.prompts)]
    for row in results:
        print(
            f"{row['method']:24} {row['piece']:4} tokens  found {row['found_share']:.2f}  "
            f"{row['ms_per_1k']:.2f} ms  {row['candidates_per_prompt']:.1f} candidates"
        )
    diffs = diff_times()
    print(diffs)
    if options.out:
        from vllm_plugins.bench.machine import describe_machine

        command = " ".join(["python", "benchmarks/kvshare_minhash.py", *sys.argv[1:]])
        report = {"command": command, "machine": describe_machine(), "results": results, **diffs}
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
