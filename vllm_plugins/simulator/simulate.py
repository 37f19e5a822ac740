"""Policies compared on a workload in virtual time: latencies, attainment, capacity."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vllm_plugins.bench.capacity import Capacity, find_capacity
from vllm_plugins.bench.metrics import Slo, Trial, summarise
from vllm_plugins.bench.workloads import Request
from vllm_plugins.engine.cost_model import StepWork
from vllm_plugins.simulator.records import RequestRecord, SimulatedRequest

_VOCABULARY = 500


@dataclass(frozen=True)
class Machine:
    """What is simulated besides the policy.

    Attributes:
        model: Folder with the model's ``config.json``.
        step_seconds: Time of a step.
        blocks: Blocks of the KV cache.
        arguments: Engine arguments by field name.
        stages: Pipeline stages.
        asynchronous: Whether scheduling is asynchronous.
    """

    model: Path
    step_seconds: Callable[[StepWork], float]
    blocks: int = 8192
    arguments: dict[str, Any] = field(default_factory=dict)
    stages: int = 1
    asynchronous: bool = False


@dataclass(frozen=True)
class Policy:
    """A scheduler to simulate: plug-ins, or with none vLLM's own; and its engine arguments."""

    name: str
    plugins: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)


def simulate(machine: Machine, policy: Policy, requests: Sequence[SimulatedRequest]) -> Trial:
    """Serve a workload and return its token times, as the benchmark over HTTP does."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_plugins.engine.scheduler_host import create_scheduler
    from vllm_plugins.simulator.config import make_config
    from vllm_plugins.simulator.engine import VirtualEngine

    config = make_config(
        machine.model,
        *policy.plugins,
        asynchronous=machine.asynchronous,
        stages=machine.stages,
        **{**machine.arguments, **policy.arguments},
    )
    own = AsyncScheduler if machine.asynchronous else Scheduler
    factory = create_scheduler if policy.plugins else own
    engine = VirtualEngine(config, factory, machine.step_seconds, machine.blocks)
    engine.add(requests)
    engine.run()
    return as_trial(list(engine.records.values()))


def as_trial(records: Sequence[RequestRecord]) -> Trial:
    """Return token times in the form of the benchmark's trials."""
    done = [bool(record.token_times) for record in records]
    gaps = [record.gaps for record in records]
    ends = [record.token_times[-1] for record in records if record.token_times]
    return Trial(
        start_s=np.array([record.request.arrival_s for record in records]),
        ttft_s=np.array([np.nan if record.ttft is None else record.ttft for record in records]),
        gap_s=np.concatenate([np.array(g, dtype=float) for g in gaps] or [np.empty(0)]),
        gap_owner=np.repeat(np.arange(len(records)), [len(g) for g in gaps]),
        failed=~np.array(done, dtype=bool),
        prompt_tokens=sum(len(r.request.prompt) for r in records if r.token_times),
        output_tokens=sum(len(r.tokens) for r in records),
        duration_s=max(ends, default=0.0) - min((r.request.arrival_s for r in records), default=0),
        texts=(),
    )


def with_prompts(requests: Iterable[Request], seed: int = 0) -> list[SimulatedRequest]:
    """Give the requests of a workload token ids; prompts share nothing."""
    source = random.Random(seed)
    return [
        SimulatedRequest(
            f"{i}",
            request.arrival_s,
            tuple(source.choices(range(1, _VOCABULARY), k=request.prompt_tokens)),
            request.output_tokens,
        )
        for i, request in enumerate(requests)
    ]


def figures(
    machine: Machine, policy: Policy, workload: Callable[[float], list[Request]], rate: float,
    slo: Slo,
) -> dict[str, float]:  # fmt: skip
    """Return the figures of one policy at a rate, in requests per second."""
    return summarise(simulate(machine, policy, with_prompts(workload(rate))), slo)


def capacity(
    machine: Machine,
    policy: Policy,
    workload: Callable[[float], list[Request]],
    slo: Slo,
    start: float,
    target: float = 0.9,
    trials: int = 10,
) -> Capacity:
    """Search the highest rate at which enough requests meet their targets.

    Args:
        machine: What is simulated.
        policy: The scheduler.
        workload: Makes the workload for a rate in requests per second.
        slo: Targets of a request.
        start: First rate to try.
        target: Share of requests that must meet theirs.
        trials: Most rates to try.
    """

    def attainment(rate: float) -> float:
        return figures(machine, policy, workload, rate, slo)["attainment"]

    return find_capacity(attainment, start, target, trials, precision=1.02)
