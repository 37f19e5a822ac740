"""Workloads: which request arrives when, with how many prompt and output tokens.

Pure functions of their arguments. Prompts are not text here: each request carries the identity of
its content, from which vLLM's load generator draws the token ids with the model's tokenizer, so
that equal identities mean equal prompts in every variant.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_plugins.bench.errors import BenchError

Floats = NDArray[np.float64]
SAMPLE_TRACE = "azure_llm_2023_conversation_sample.csv"
CHAT, DECODE, LONG = "chat", "decode", "long"
# Contents of one trial stay apart from those of the next one by this many identities.
CONTENTS_PER_TRIAL = 100_000


@dataclass(frozen=True)
class Request:
    """One request of a workload.

    Attributes:
        arrival_s: Seconds after the start of the trial.
        prompt_tokens: Length of the prompt.
        output_tokens: Length of the answer; the end-of-sequence token is ignored.
        role: ``chat``, or in the stall workload ``decode`` or ``long``.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    role: str = CHAT


@dataclass(frozen=True)
class TraceRow:
    """One row of a trace: arrival in seconds from the first row, and the two lengths in tokens."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Lengths:
    """How trace lengths are fitted to a machine: scaled first, then capped.

    Attributes:
        scale: Factor on both lengths; a length never falls below 1.
        max_input: Cap on prompt tokens.
        max_output: Cap on output tokens.
    """

    scale: float = 1.0
    max_input: int = 4096
    max_output: int = 1024

    def fit(self, row: TraceRow) -> tuple[int, int]:
        """Return prompt and output tokens of a row."""
        prompt = max(1, round(row.prompt_tokens * self.scale))
        output = max(1, round(row.output_tokens * self.scale))
        return min(prompt, self.max_input), min(output, self.max_output)


def load_trace(path: Path | None = None) -> list[TraceRow]:
    """Read a trace in the format of the Azure LLM inference dataset.

    Args:
        path: A CSV file with ``TIMESTAMP``, ``ContextTokens`` and ``GeneratedTokens``;
            the sample shipped with the package when None.

    Returns:
        The rows in order of arrival, the first at 0 s.

    Raises:
        BenchError: The file has other columns or no rows.
    """
    source = path or files("vllm_plugins.bench").joinpath("data", SAMPLE_TRACE)
    try:
        raw = [_read_row(row) for row in csv.DictReader(source.read_text().splitlines())]
    except KeyError as error:
        raise BenchError(f"--trace {path}: column {error} is missing") from None
    if not raw:
        raise BenchError(f"--trace {path}: has no rows")
    raw.sort(key=lambda row: row.arrival_s)
    start = raw[0].arrival_s
    return [replace(row, arrival_s=row.arrival_s - start) for row in raw]


def _read_row(row: dict[str, str]) -> TraceRow:
    # datetime holds microseconds and the trace writes 100 ns.
    arrival = datetime.fromisoformat(row["TIMESTAMP"][:26] + "+00:00").timestamp()
    return TraceRow(arrival, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def from_trace(
    rows: Sequence[TraceRow], count: int, rate: float, lengths: Lengths, window: int = 0
) -> list[Request]:
    """Take a window of a trace and bring it to a request rate.

    The gaps between arrivals keep their proportions, and so their burstiness.

    Args:
        rows: The trace.
        count: Requests to take; the trace is repeated from its start where it is too short.
        rate: Mean requests per second of the result.
        lengths: Scaling and caps of the lengths.
        window: Which window of ``count`` rows: 0 starts at the first row.
    """
    if count < 1 or rate <= 0:
        raise BenchError(f"a trace needs a request and a positive rate, not {count} at {rate}")
    index = (np.arange(count) + window * count) % len(rows)
    arrivals = _rescale(_gaps_before(rows)[index], rate)
    fitted = [lengths.fit(rows[int(i)]) for i in index]
    return [Request(float(t), *pair) for t, pair in zip(arrivals, fitted, strict=True)]


def _gaps_before(rows: Sequence[TraceRow]) -> Floats:
    """Seconds between each row and the one before it, shape (rows,)."""
    gaps = np.diff([row.arrival_s for row in rows], prepend=0.0)
    # The first row follows the last one when a trace is repeated: give it a typical gap.
    gaps[0] = gaps[1:].mean() if len(rows) > 1 else 1.0
    return gaps


def _rescale(gaps: Floats, rate: float) -> Floats:
    """Arrival times in seconds, shape (requests,), the first at 0, mean gap ``1 / rate``."""
    arrivals = np.concatenate([[0.0], np.cumsum(gaps[1:])])
    if len(gaps) == 1 or arrivals[-1] == 0:
        return np.arange(len(gaps)) / rate
    return np.asarray(arrivals * ((len(gaps) - 1) / rate / arrivals[-1]))


def stall(
    decodes: int,
    prompt_tokens: int,
    decode_tokens: int,
    stalls: int,
    start_s: float,
    every_s: float,
) -> list[Request]:
    """Make long prompts arrive while decodes run.

    Args:
        decodes: Requests that decode from the start.
        prompt_tokens: Length of each long prompt.
        decode_tokens: Output tokens per decode; enough to last beyond the last long prompt.
        stalls: Number of long prompts.
        start_s: Arrival of the first long prompt, in seconds.
        every_s: Seconds between long prompts.
    """
    running = [Request(0.0, 32, decode_tokens, DECODE) for _ in range(decodes)]
    long = [Request(start_s + i * every_s, prompt_tokens, 8, LONG) for i in range(stalls)]
    return running + long


def offline(count: int, prompt_tokens: int, output_tokens: int) -> list[Request]:
    """Make short requests that all wait from the start: a batch job, where latency is nothing."""
    return [Request(0.0, prompt_tokens, output_tokens) for _ in range(count)]


def sample_for_accuracy(
    requests: Sequence[Request], count: int, output_tokens: int
) -> list[Request]:
    """Take the workload's first prompts, all at once and with short answers."""
    return [
        replace(request, arrival_s=0.0, output_tokens=min(request.output_tokens, output_tokens))
        for request in requests[:count]
    ]


def trace_lines(requests: Iterable[Request], seed: int, trial: int) -> Iterator[str]:
    """Write requests as lines of vLLM's ``timed_trace`` dataset.

    Args:
        requests: In order of arrival.
        seed: Seed of the benchmark.
        trial: Contents differ between trials, so that a server's prefix cache never helps;
            equal trials of two variants have equal contents.
    """
    base = (seed * 10_000 + trial) * CONTENTS_PER_TRIAL
    for index, request in enumerate(requests):
        row = {
            "timestamp": round(request.arrival_s, 6),
            "input_length": request.prompt_tokens,
            "output_length": request.output_tokens,
            "hash_ids": [base + index],
        }
        yield json.dumps(row)


def check_fits(requests: Sequence[Request], max_model_len: int) -> None:
    """Refuse a workload that the server would answer with errors.

    Args:
        requests: The workload, in order of arrival.
        max_model_len: Longest prompt plus output that the server accepts, in tokens.

    Raises:
        BenchError: A request is too long.
    """
    if any(later.arrival_s < earlier.arrival_s for earlier, later in pairwise(requests)):
        raise BenchError("requests of a workload must be in order of arrival")
    longest = max(request.prompt_tokens + request.output_tokens for request in requests)
    if longest > max_model_len:
        raise BenchError(
            f"the longest request has {longest} tokens and the server takes {max_model_len}: "
            "lower --length-scale, --max-input or --max-output (stall: --long-prompt, "
            "--decode-tokens), or raise --max-model-len in --serve-args"
        )
