"""Runs the trials: a sweep of static settings, then alternated rounds of pairs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from vllm_plugins.bench.capacity import Capacity, find_capacity
from vllm_plugins.bench.config import OFFLINE, STALL, TRACE, BenchConfig
from vllm_plugins.bench.load import Client, load_client, run_load
from vllm_plugins.bench.metrics import Trial, summarise, summarise_stall
from vllm_plugins.bench.results import PAIR, SWEEP, Point, Record, Results
from vllm_plugins.bench.server import Server, serve
from vllm_plugins.bench.variants import Variant, alternate
from vllm_plugins.bench.workloads import (
    LONG,
    Request,
    check_fits,
    from_trace,
    load_trace,
    offline,
    sample_for_accuracy,
    stall,
)

ACCURACY_OUTPUT = 32
# Trials of one round get contents by these numbers: load points from 0, then the others.
TRIALS_PER_ROUND, CAPACITY_TRIAL, ACCURACY_TRIAL = 200, 100, 199


class Progress(Protocol):
    """Where a run tells how far it is."""

    def start(self, label: str) -> None:
        """Say what is being measured now."""

    def done(self, trials: int, outcome: str) -> None:
        """Count finished or spared trials and say how they ended."""


def load_points(config: BenchConfig) -> tuple[Point, ...]:
    """Load points of the workload."""
    if config.workload != TRACE:
        return (Point(config.workload),)
    return tuple(Point(f"{rate:g} req/s", rate) for rate in config.trace.rates)


def planned_trials(config: BenchConfig) -> int:
    """Most trials that a run can take, for its progress bar."""
    points, search = len(load_points(config)), config.capacity.trials * config.capacity.enabled
    sweep = 1 + search * (config.criterion == "capacity") if len(config.statics) > 1 else 0
    variants = 1 + len(config.challengers)
    accuracy = min(2, config.repeats) if config.accuracy_prompts else 0
    pairs = variants * (config.repeats * (points + search) + accuracy)
    return len(config.statics) * sweep + pairs


@dataclass
class Runner:
    """One run, which fills ``results`` as it goes on.

    Attributes:
        config: What to measure.
        results: Filled trial by trial, so that an interrupted run keeps what it has.
        progress: Told about each trial.
    """

    config: BenchConfig
    results: Results
    progress: Progress

    _client: Client = field(init=False)

    def __post_init__(self) -> None:
        self._rows = load_trace(self.config.trace.path) if self.config.workload == TRACE else []

    def run(self) -> None:
        """Measure everything.

        Raises:
            BenchError: A server or the load generator failed; everything has been stopped.
        """
        with load_client(self.config.out / "logs" / "client.log") as self._client:
            self._run()

    def _run(self) -> None:
        config = self.config
        if len(config.statics) > 1:
            for variant in config.statics:
                # Other requests than in the pairs, so that no baseline wins by having been chosen.
                self._visit(variant, SWEEP, config.repeats)
        chosen = self.results.choose_best_static()
        order = alternate([chosen, *config.challengers], config.repeats)
        for number, variants in enumerate(order):
            for variant in variants:
                self._visit(variant, PAIR, number)

    def _visit(self, variant: Variant, phase: str, number: int) -> None:
        """Start a variant's server once and run all its trials of this round."""
        config = self.config
        points = self.results.points[:1] if phase == SWEEP else self.results.points
        log = config.out / f"{self._stem(variant, phase, number, 'server')}.log"
        self.progress.start(f"{variant.name}: starting")
        arguments = [*config.common, *variant.arguments]
        with serve(config.model, arguments, variant.name, log, config.start_timeout_s) as server:
            self._prepare(server, points)
            for index, point in enumerate(points):
                self._measure(server, variant, phase, number, index, point)
            if config.capacity.enabled and (phase == PAIR or config.criterion == "capacity"):
                self._search(server, variant, phase, number, points[0])
            if config.accuracy_prompts and phase == PAIR and number < 2:
                self._compare_answers(server, variant, number)

    def _prepare(self, server: Server, points: Sequence[Point]) -> None:
        limit = server.max_model_len()
        for point in points:
            check_fits(self._requests(point.rate, 0), limit)
        longest = max(r.prompt_tokens for r in self._requests(points[0].rate, 0))
        server.warm_up([16, 16, 16, longest])

    def _requests(self, rate: float | None, number: int) -> list[Request]:
        shape = self.config.trace
        if self.config.workload == TRACE and rate is not None:
            return from_trace(self._rows, shape.requests, rate, shape.lengths, number)
        if self.config.workload == STALL:
            s = self.config.stall
            times = (s.stalls, s.start_s, s.every_s)
            return stall(s.decodes, s.long_prompt, s.decode_tokens, *times)
        assert self.config.workload == OFFLINE
        o = self.config.offline
        return offline(o.requests, o.prompt_tokens, o.output_tokens)

    def _measure(
        self, server: Server, variant: Variant, phase: str, number: int, index: int, point: Point
    ) -> None:
        label = f"{variant.name}, {_phase(phase, number)}, {point.label}"
        self.progress.start(label)
        requests = self._requests(point.rate, number)
        stem = self._stem(variant, phase, number, point.label)
        trial = self._load(server, requests, number * TRIALS_PER_ROUND + index, stem)
        summary = summarise(trial, self.config.slo)
        if self.config.workload == STALL:
            long = np.array([request.role == LONG for request in requests])
            summary |= summarise_stall(trial, long)
        self.results.records.append(
            Record(phase, number, variant.name, point, summary, trial, stem, server.startup_s)
        )
        self.progress.done(1, f"{label}: {_outcome(summary)}")

    def _search(
        self, server: Server, variant: Variant, phase: str, number: int, point: Point
    ) -> None:
        search, label = self.config.capacity, f"{variant.name}, {_phase(phase, number)}, capacity"
        tried = 0

        def attainment(rate: float) -> float:
            nonlocal tried
            self.progress.start(f"{label} at {rate:.3g} req/s")
            stem = self._stem(variant, phase, number, f"capacity-{tried}")
            contents = number * TRIALS_PER_ROUND + CAPACITY_TRIAL + tried
            trial = self._load(server, self._requests(rate, number), contents, stem)
            tried += 1
            share = summarise(trial, self.config.slo)["attainment"]
            self.progress.done(1, f"{label} at {rate:.3g} req/s: {share:.0%} good")
            return share

        found = find_capacity(attainment, search.start, search.target, search.trials)
        self.progress.done(search.trials - tried, f"{label}: {found.rate:.3g} req/s")
        self._note_capacity(variant, phase, number, point, found)

    def _note_capacity(
        self, variant: Variant, phase: str, number: int, point: Point, found: Capacity
    ) -> None:
        for record in self.results.records:
            key = (record.variant, record.phase, record.round, record.point)
            if key == (variant.name, phase, number, point):
                record.capacity = found
                record.summary["capacity"] = found.rate

    def _compare_answers(self, server: Server, variant: Variant, number: int) -> None:
        label = f"{variant.name}, pair {number + 1}, greedy answers"
        self.progress.start(label)
        requests = self._requests(self.results.points[0].rate, 0)
        sample = sample_for_accuracy(requests, self.config.accuracy_prompts, ACCURACY_OUTPUT)
        stem = self._stem(variant, PAIR, number, "answers")
        # The same contents in every round: starts of one variant are compared as well.
        trial = self._load(server, sample, ACCURACY_TRIAL, stem)
        self.results.completions[variant.name, number] = trial.texts
        self.progress.done(1, label)

    def _load(self, server: Server, requests: Sequence[Request], contents: int, stem: str) -> Trial:
        config = self.config
        path = config.out / stem
        return run_load(
            self._client,
            server,
            requests,
            config.seed,
            contents,
            path,
            config.trial_timeout_s,
            config.tokenizer,
        )

    def _stem(self, variant: Variant, phase: str, number: int, what: str) -> str:
        text = f"{_phase(phase, number)}-{variant.name}-{what}"
        return "logs/" + re.sub(r"[^A-Za-z0-9_-]+", "_", text)


def _phase(phase: str, number: int) -> str:
    return f"{phase}{number + 1}" if phase == PAIR else phase


def _outcome(summary: dict[str, float]) -> str:
    text = (
        f"{summary['goodput']:.3g} good req/s, {summary['attainment']:.0%} good, "
        f"TTFT p99 {summary['ttft_p99_ms']:.0f} ms, TBT p99 {summary['tbt_p99_ms']:.0f} ms"
    )
    return text + (f", {summary['failed']:.0f} FAILED" if summary["failed"] else "")
