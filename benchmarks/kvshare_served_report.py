"""What the KVShare benchmark over HTTP concludes: as numbers, as text and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from kvshare_served_client import Outcome
from kvshare_served_requests import Request
from kvshare_served_trial import Trial

from vllm_plugins.bench.compare import bootstrap_median, median_summary
from vllm_plugins.bench.report import FEWEST_ROUNDS, number
from vllm_plugins.bench.variants import STOCK

FIGURES = {
    "ttft_p50_ms": "TTFT p50, ms",
    "ttft_p99_ms": "TTFT p99, ms",
    "shared_ttft_p50_ms": "TTFT p50, shared, ms",
    "novel_ttft_p50_ms": "TTFT p50, novel, ms",
    "tbt_p50_ms": "TBT p50, ms",
    "tbt_p99_ms": "TBT p99, ms",
    "requests_per_s": "requests/s",
    "output_tokens_per_s": "output tokens/s",
}
COUNTS = ("answered", "aborted", "aborted_before_first", "errors")
Summary = Mapping[str, float]


def _whole(request: Request, *outcomes: Outcome) -> bool:
    """Whether a request was answered to its end, by all."""
    return request.hang_up is None and not any(outcome.error for outcome in outcomes)


def waits(requests: Sequence[Request], outcomes: Sequence[Outcome], novel: bool) -> list[float]:
    """Return the times to first token of one kind of request, in seconds, as they were sent."""
    both = zip(requests, outcomes, strict=True)
    return [o.ttft_s for r, o in both if r.novel == novel and _whole(r, o)]


def summarise(requests: Sequence[Request], outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return the figures of a trial, over requests answered to their end; none of nothing.

    The time between tokens is that between chunks of a stream, as a client sees it.
    """
    both = list(zip(requests, outcomes, strict=True))
    left = [o for r, o in both if r.hang_up is not None and not o.error]
    answered = [(r, o) for r, o in both if _whole(r, o)]
    counts = (len(answered), len(left), sum(not o.tokens for o in left))
    errors = sum(bool(o.error) for o in outcomes)
    figures: dict[str, float] = dict(zip(COUNTS, (*counts, errors), strict=True))
    shared, novel = (waits(requests, outcomes, kind) for kind in (False, True))
    gaps = [late - early for _, o in answered for early, late in pairwise(o.chunk_s)]
    for name, values, percentiles in (
        ("ttft", [*shared, *novel], (50, 99)),
        ("shared_ttft", shared, (50,)),
        ("novel_ttft", novel, (50,)),
        ("tbt", gaps, (50, 99)),
    ):
        for q in percentiles if values else ():
            figures[f"{name}_p{q}_ms"] = 1e3 * float(np.percentile(values, q))
    if answered:
        seconds = max(o.chunk_s[-1] for _, o in answered) - min(o.sent_s for o in outcomes)
        figures["requests_per_s"] = len(answered) / seconds
        figures["output_tokens_per_s"] = sum(len(o.tokens) for _, o in answered) / seconds
    return figures


def ratios(ours: Sequence[Summary], theirs: Sequence[Summary]) -> dict[str, dict[str, Any]]:
    """Return ours over theirs, round by round, with the median and its spread.

    The spread is a bootstrap interval from five rounds on, and the range below.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in FIGURES:
        if not all(summary.get(name) for summary in (*ours, *theirs)):
            continue
        values = [a[name] / b[name] for a, b in zip(ours, theirs, strict=True)]
        low, high, spread = min(values), max(values), "range"
        if len(values) >= FEWEST_ROUNDS:
            interval = bootstrap_median(values)
            low, high, spread = interval.low, interval.high, "95 % interval"
        median = statistics.median(values)
        found[name] = {"median": median, "low": low, "high": high, "spread": spread, "all": values}
    return found


def matching(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two answers have in common at their start."""
    differs = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differs, min(len(one), len(other)))


def agreement(triples: Iterable[tuple[Request, Outcome, Outcome]]) -> dict[str, float | None]:
    """Compare two answers to each request, of those that both answered to their end."""
    kept = [
        (r.novel, one.tokens, other.tokens) for r, one, other in triples if _whole(r, one, other)
    ]
    return {
        "compared": len(kept),
        "identical": _mean(a == b for _, a, b in kept),
        "identical_shared": _mean(a == b for novel, a, b in kept if not novel),
        "identical_novel": _mean(a == b for novel, a, b in kept if novel),
        "matching_tokens": _mean(matching(a, b) for _, a, b in kept),
        "answer_tokens": _mean(len(b) for _, _, b in kept),
    }


def right_answers(both: Iterable[tuple[Request, Outcome]]) -> dict[str, float | None]:
    """Return the share of right answers, by the documents that an answer needs; none known: {}."""
    kept = [
        (r.asked.hops, o.tokens[:1] == [r.asked.answer])
        for r, o in both
        if r.asked.answer is not None and _whole(r, o)
    ]
    if not kept:
        return {}
    return {
        "right": _mean(right for _, right in kept),
        "right_one_document": _mean(right for hops, right in kept if hops == 1),
        "right_two_documents": _mean(right for hops, right in kept if hops == 2),
    }


def _mean(values: Iterable[float]) -> float | None:
    kept = list(values)
    return sum(kept) / len(kept) if kept else None


def conclude(requests: Sequence[Request], trials: Sequence[Trial]) -> dict[str, Any]:
    """Return what follows from the rounds in which every variant was measured."""
    names = list(dict.fromkeys(trial.variant for trial in trials))
    by_round: dict[int, dict[str, Trial]] = {}
    for trial in trials:
        by_round.setdefault(trial.round, {})[trial.variant] = trial
    rounds = [row for row in by_round.values() if len(row) == len(names) and STOCK in row]
    if not rounds:
        return {}
    summaries = {n: [summarise(requests, row[n].outcomes) for row in rounds] for n in names}
    others = [name for name in names if name != STOCK]
    pairs = {f"{name} / {STOCK}": [(row[name], row[STOCK]) for row in rounds] for name in others}
    pairs[f"{STOCK} / itself, next round"] = [(b[STOCK], a[STOCK]) for a, b in pairwise(rounds)]
    return {
        "medians": {name: median_summary(summaries[name]) for name in names},
        "ratios": {f"{n} / {STOCK}": ratios(summaries[n], summaries[STOCK]) for n in others},
        "agreement": {
            label: agreement(
                triple
                for one, other in rows
                for triple in zip(requests, one.outcomes, other.outcomes, strict=True)
            )
            for label, rows in pairs.items()
        },
        "right": {
            name: right_answers(
                pair for row in rounds for pair in zip(requests, row[name].outcomes, strict=True)
            )
            for name in names
        },
        "counters_per_round": {
            name: _mean_of([row[name].counters for row in rounds]) for name in names
        },
    }


def _mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = sorted({name for row in rows for name in row})
    return {name: sum(row.get(name, 0.0) for row in rows) / len(rows) for name in names}


def table(head: str, columns: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out numbers: a line for each column's name, so that many figures fit any width."""
    width = max(map(len, (head, *columns)))
    widths = [max(len(name), 24) for name in rows]
    lines = [
        [head, *rows],
        *([name, *(_cell(row.get(name)) for row in rows.values())] for name in columns),
    ]
    return "\n".join(
        line[0].ljust(width) + "".join(f"  {c:>{w}}" for c, w in zip(line[1:], widths, strict=True))
        for line in lines
    )


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
    return number(value)


def report(result: Mapping[str, Any]) -> str:
    """Return a result as text."""
    kinds = {row["spread"] for found in result["ratios"].values() for row in found.values()}
    parts = [
        table("medians over rounds", (*FIGURES, *COUNTS), result["medians"]),
        table(f"ratios, median ({', '.join(kinds)})", tuple(FIGURES), result["ratios"]),
    ]
    for head, key in (
        ("answers", "agreement"),
        ("right answers", "right"),
        ("counted, per round", "counters_per_round"),
    ):
        columns = list(dict.fromkeys(name for row in result[key].values() for name in row))
        if columns:
            parts.append(table(head, columns, result[key]))
    return "\n\n".join(parts)


def draw(requests: Sequence[Request], trials: Sequence[Trial], path: Path) -> None:
    """Draw how the time to the first token is distributed, over all rounds."""
    from vllm_plugins.cli.pictures import pyplot

    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for axis, novel in zip(axes, (False, True), strict=True):
        for name in dict.fromkeys(trial.variant for trial in trials):
            mine = [trial.outcomes for trial in trials if trial.variant == name]
            times = sorted(t for outcomes in mine for t in waits(requests, outcomes, novel))
            axis.step(times, [(i + 1) / len(times) for i in range(len(times))], label=name)
        axis.set_title("documents nobody sent before" if novel else "documents sent before")
        axis.set_xlabel("time to first token, s")
        axis.set_xlim(left=0)
    axes[0].set_ylabel("share of requests")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
