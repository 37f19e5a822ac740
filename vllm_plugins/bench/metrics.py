"""From token times to figures: percentiles, SLO attainment, goodput, stalls. Pure numpy.

TTFT is the time from sending a request to its first token, TBT the time between two tokens of one
request (the load generator's inter-token latency). A request is *good* when it did not fail, its
TTFT is within the TTFT target, and its own TBT statistic (99th percentile by default) is within
the TBT target. Goodput is good requests per second of the trial.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
TBT_STATS = {"p99": 99.0, "max": 100.0, "p50": 50.0}


@dataclass(frozen=True)
class Slo:
    """Latency targets in milliseconds, and which statistic of a request's TBT must meet its own."""

    ttft_ms: float
    tbt_ms: float
    tbt_stat: str = "p99"


@dataclass(frozen=True)
class Trial:
    """Token times of one trial, in columns.

    Attributes:
        start_s: When each request was sent, shape (requests,).
        ttft_s: Time to first token, shape (requests,); NaN for a failed request.
        gap_s: Every time between tokens, request by request, shape (gaps,).
        gap_owner: Request that each gap belongs to, ascending, shape (gaps,).
        failed: Requests without an answer, shape (requests,).
        prompt_tokens: Sum over answered requests.
        output_tokens: Sum over answered requests.
        duration_s: From the first request sent to the last answer.
        texts: Generated text per request.
    """

    start_s: Floats
    ttft_s: Floats
    gap_s: Floats
    gap_owner: NDArray[np.int64]
    failed: Bools
    prompt_tokens: int
    output_tokens: int
    duration_s: float
    texts: tuple[str, ...]


def read_trial(result: Mapping[str, Any]) -> Trial:
    """Read what ``vllm bench serve --save-result --save-detailed`` wrote."""
    ttft = np.asarray(result["ttfts"], dtype=float)
    # The result names no success flag: an answer has a first token and no error text.
    failed = np.array([bool(error) for error in result["errors"]], dtype=bool) | (ttft <= 0)
    counts = [0 if bad else len(gaps) for gaps, bad in zip(result["itls"], failed, strict=True)]
    kept = [gaps for gaps, bad in zip(result["itls"], failed, strict=True) if not bad]
    good = ~failed
    return Trial(
        start_s=np.asarray(result["start_times"], dtype=float),
        ttft_s=np.where(failed, np.nan, ttft),
        gap_s=np.concatenate([np.asarray(gaps, dtype=float) for gaps in kept] or [np.empty(0)]),
        gap_owner=np.repeat(np.arange(len(ttft)), counts),
        failed=failed,
        prompt_tokens=int(np.asarray(result["input_lens"])[good].sum()),
        output_tokens=int(np.asarray(result["output_lens"])[good].sum()),
        duration_s=float(result["duration"]),
        texts=tuple(result["generated_texts"]),
    )


def percentile_by_owner(values: Floats, owner: NDArray[np.int64], count: int, q: float) -> Floats:
    """Percentile of each owner's values, by linear interpolation as ``numpy.percentile``.

    Args:
        values: Shape (values,).
        owner: Owner of each value, from 0 to ``count - 1``, shape (values,).
        count: Number of owners.
        q: Percentile, 0 to 100.

    Returns:
        Shape (count,); NaN for an owner without values.
    """
    ordered = values[np.lexsort((values, owner))]
    sizes = np.bincount(owner, minlength=count)
    first = np.cumsum(sizes) - sizes
    result = np.full(count, np.nan)
    has = sizes > 0
    position = q / 100 * (sizes[has] - 1)
    below = np.floor(position).astype(int)
    above = np.minimum(below + 1, sizes[has] - 1)
    low, high = ordered[first[has] + below], ordered[first[has] + above]
    result[has] = low + (high - low) * (position - below)
    return result


def meets(trial: Trial, slo: Slo) -> tuple[Bools, Bools]:
    """Which requests meet the TTFT target and which the TBT target, each of shape (requests,).

    A request of one token has no TBT and meets that target; a failed request meets none.
    """
    q = TBT_STATS[slo.tbt_stat]
    tbt = percentile_by_owner(trial.gap_s, trial.gap_owner, len(trial.ttft_s), q)
    answered = ~trial.failed
    with np.errstate(invalid="ignore"):
        return trial.ttft_s * 1e3 <= slo.ttft_ms, answered & ~(tbt * 1e3 > slo.tbt_ms)


def summarise(trial: Trial, slo: Slo) -> dict[str, float]:
    """Figures of one trial; a percentile of nothing is NaN."""
    ttft_met, tbt_met = meets(trial, slo)
    good = ttft_met & tbt_met
    answered = int((~trial.failed).sum())
    return {
        "requests": float(len(trial.failed)),
        "failed": float(trial.failed.sum()),
        "duration_s": trial.duration_s,
        **_percentiles("ttft", trial.ttft_s[~trial.failed], (50, 99)),
        **_percentiles("tbt", trial.gap_s, (50, 99, 100)),
        "requests_per_s": answered / trial.duration_s,
        "output_tokens_per_s": trial.output_tokens / trial.duration_s,
        "total_tokens_per_s": (trial.prompt_tokens + trial.output_tokens) / trial.duration_s,
        "ttft_attainment": float(ttft_met.mean()),
        "tbt_attainment": float(tbt_met.mean()),
        "attainment": float(good.mean()),
        "goodput": float(good.sum()) / trial.duration_s,
    }


def _percentiles(name: str, seconds: Floats, qs: Sequence[int]) -> dict[str, float]:
    values = np.percentile(seconds * 1e3, qs) if len(seconds) else np.full(len(qs), np.nan)
    labels = ["max" if q == 100 else f"p{q}" for q in qs]
    return {f"{name}_{label}_ms": float(v) for label, v in zip(labels, values, strict=True)}


def token_times(trial: Trial) -> Floats:
    """When the token that ends each gap arrived, on the clock of ``start_s``, shape (gaps,)."""
    total = np.cumsum(trial.gap_s)
    sizes = np.bincount(trial.gap_owner, minlength=len(trial.start_s))
    before = np.concatenate([[0.0], total])[np.cumsum(sizes) - sizes]
    within = total - before[trial.gap_owner]
    first = trial.start_s + trial.ttft_s
    return np.asarray(first[trial.gap_owner] + within, dtype=float)


def stall_gaps(trial: Trial, long: Bools) -> Floats:
    """Decode gaps that overlap the prefill of a long prompt, in seconds, shape (stalled gaps,).

    Args:
        trial: Token times.
        long: Which requests are long prompts, shape (requests,).
    """
    ends = token_times(trial)
    starts = ends - trial.gap_s
    touched = np.zeros(len(ends), dtype=bool)
    for begin, end in _windows(trial, long):
        touched |= (ends > begin) & (starts < end)
    return trial.gap_s[touched & ~long[trial.gap_owner]]


def _windows(trial: Trial, long: Bools) -> list[tuple[float, float]]:
    """From arrival to first token of each answered long prompt, in seconds."""
    begin = trial.start_s[long & ~trial.failed]
    return list(zip(begin, begin + trial.ttft_s[long & ~trial.failed], strict=True))


def summarise_stall(trial: Trial, long: Bools) -> dict[str, float]:
    """Figures of the stalls alone: TBT of decodes while a long prompt is prefilled, and its TTFT.

    ``stall_decodes`` is the smallest number of decodes that streamed through a whole prefill: less
    than the workload's decodes means that they ended too early and the figures are too kind.
    """
    last = np.full(len(trial.start_s), -np.inf)
    np.maximum.at(last, trial.gap_owner, token_times(trial))
    first = trial.start_s + trial.ttft_s
    spans = [
        int(((first < begin) & (last > end) & ~long).sum()) for begin, end in _windows(trial, long)
    ]
    return {
        **_percentiles("stall_tbt", stall_gaps(trial, long), (50, 99, 100)),
        **_percentiles("stall_ttft", trial.ttft_s[long & ~trial.failed], (50, 100)),
        "stall_decodes": float(min(spans, default=0)),
    }


def identical_share(one: Sequence[str], other: Sequence[str]) -> float:
    """Share of prompts with the same completion in both; 1.0 is identical."""
    return float(np.mean([a == b for a, b in zip(one, other, strict=True)]))
