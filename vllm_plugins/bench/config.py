"""Everything a benchmark run is decided by."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vllm_plugins.bench.capacity import DEFAULT_TARGET
from vllm_plugins.bench.metrics import Slo
from vllm_plugins.bench.variants import Variant
from vllm_plugins.bench.workloads import Lengths

TRACE, STALL, OFFLINE = "trace", "stall", "offline"
WORKLOADS = (TRACE, STALL, OFFLINE)
DEFAULT_CRITERION = {TRACE: "goodput", STALL: "stall", OFFLINE: "throughput"}


@dataclass(frozen=True)
class TraceShape:
    """Trace workload: rates in req/s, requests per trial, fitting of lengths, CSV file or None."""

    rates: tuple[float, ...] = (1.0,)
    requests: int = 64
    lengths: Lengths = field(default_factory=Lengths)
    path: Path | None = None


@dataclass(frozen=True)
class StallShape:
    """Stall workload; lengths in tokens, times in seconds."""

    decodes: int = 8
    long_prompt: int = 3000
    decode_tokens: int = 512
    stalls: int = 2
    start_s: float = 2.0
    every_s: float = 10.0


@dataclass(frozen=True)
class OfflineShape:
    """Offline workload: short requests, all there from the start; lengths in tokens."""

    requests: int = 64
    prompt_tokens: int = 32
    output_tokens: int = 64


@dataclass(frozen=True)
class CapacitySearch:
    """Search for the highest rate with enough good requests."""

    enabled: bool = False
    target: float = DEFAULT_TARGET
    trials: int = 6
    start: float = 1.0


@dataclass(frozen=True)
class BenchConfig:
    """One benchmark run.

    Attributes:
        model: Model path or name.
        out: Folder for results and logs.
        workload: ``trace``, ``stall`` or ``offline``.
        statics: Stock variants to choose the best from.
        challengers: What is compared with the best static variant, the plug-in first.
        slo: Latency targets.
        criterion: What "best" means for static variants.
        repeats: Rounds of pairs.
        seed: Seed of contents and of the bootstrap.
        common: Arguments of ``vllm serve`` that every variant gets.
        accuracy_prompts: Prompts whose greedy completions are compared; 0 for none.
        start_timeout_s: Longest wait for a server.
        trial_timeout_s: Longest trial.
    """

    model: str
    out: Path
    workload: str
    statics: tuple[Variant, ...]
    challengers: tuple[Variant, ...]
    slo: Slo
    criterion: str
    trace: TraceShape = field(default_factory=TraceShape)
    stall: StallShape = field(default_factory=StallShape)
    offline: OfflineShape = field(default_factory=OfflineShape)
    capacity: CapacitySearch = field(default_factory=CapacitySearch)
    repeats: int = 5
    seed: int = 0
    common: tuple[str, ...] = ()
    tokenizer: str | None = None
    accuracy_prompts: int = 8
    start_timeout_s: float = 600.0
    trial_timeout_s: float = 1800.0
