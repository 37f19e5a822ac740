"""Measures the steps of a real engine over many batch compositions, for the cost model.

Drives an engine in this process through its scheduler host: a recording policy chooses random
token budgets while requests of chosen numbers and lengths run.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_plugins.engine.cost_model import StepWork
from vllm_plugins.engine.policy import SchedulerPolicy, Step, StepPlan
from vllm_plugins.engine.step_work import work_of

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

DECODE_STEPS = 6
MIXED_STEPS = 8
# A phase's running requests are prefilled first; more tokens than this cost more than they teach.
SETUP_TOKENS = 8192


@dataclass
class StepRecorder(SchedulerPolicy):
    """Records what every step contained and how long it took, under random budgets.

    Args:
        rng: Source of the budgets.
        smallest: Least budget, in rows.
    """

    rng: random.Random
    smallest: int
    works: list[StepWork] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    recording: bool = False
    budget_limit: int = 1 << 30

    def plan(self, plan: StepPlan) -> None:
        """Draw a budget from a log-uniform distribution, above the decodes."""
        plan.decode_first = True
        if not (self.recording and (plan.prefills or plan.num_waiting)):
            return
        low = len(plan.decodes) + self.smallest
        high = max(min(plan.token_budget, self.budget_limit), low + 1)
        plan.limit_tokens(round(math.exp(self.rng.uniform(math.log(low), math.log(high)))))

    def scheduled(self, step: Step) -> None:
        """Note what the step contains."""
        step.notes["recorder"] = work_of(step)[0]

    def completed(self, step: Step) -> None:
        """Keep the step's time."""
        if self.recording and step.duration:
            self.works.append(step.notes["recorder"])
            self.seconds.append(step.duration)


@dataclass(frozen=True)
class Phase:
    """One batch composition: ``decodes`` running requests with about ``context`` tokens each."""

    decodes: int
    context: int


def phases(max_requests: int, max_context: int) -> list[Phase]:
    """Return the compositions to measure, decode-free ones among them."""
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= max_requests - 1]
    contexts = [c for c in (32, 128, 512, 2048, 8192) if c <= max_context // 2] or [16]
    pairs = itertools.product(counts, contexts)
    return [Phase(0, 0)] * 3 + [Phase(n, c) for n, c in pairs if n * c <= SETUP_TOKENS]


class StepProfiler:
    """Runs phases on an engine whose scheduler is the host.

    Args:
        engine: An engine in this process; nothing else may use it meanwhile.
        seed: Seed of lengths, tokens and budgets.
    """

    def __init__(self, engine: LLMEngine, seed: int = 0) -> None:
        self._engine = engine
        self._scheduler: Any = engine.engine_core.engine_core.scheduler
        config = engine.vllm_config
        self._vocab = config.model_config.get_vocab_size()
        self._max_len = config.model_config.max_model_len
        self._max_requests = config.scheduler_config.max_num_seqs
        self._rng = random.Random(seed)
        self._ids = itertools.count()
        self.recorder = StepRecorder(self._rng, smallest=8)
        self._scheduler.plugin_policies.append(self.recorder)

    def run(self, seconds: float, progress: Callable[[float], None]) -> None:
        """Measure phases in random order for about ``seconds``; the first one only warms up.

        Args:
            seconds: When no further phase is begun.
            progress: Called with the share of the time that is spent, 0 to 1.
        """
        self._run_phase(Phase(2, 32))
        start = time.monotonic()
        self.recorder.recording = True
        for phase in self._endless_phases():
            spent = time.monotonic() - start
            progress(min(spent / seconds, 1.0))
            if spent >= seconds:
                return
            self._run_phase(phase)

    def _endless_phases(self) -> Iterator[Phase]:
        while True:
            order = phases(self._max_requests, self._max_len)
            self._rng.shuffle(order)
            yield from order

    def _run_phase(self, phase: Phase) -> None:
        recording, self.recorder.recording = self.recorder.recording, False
        running = [self._add(phase.context) for _ in range(phase.decodes)]
        while self._scheduler.waiting or any(r.is_prefill_chunk for r in self._scheduler.running):
            self._engine.step()
        self.recorder.recording = recording
        for _ in range(DECODE_STEPS if running else 0):
            self._engine.step()
        # Short and long prompts, so that chunks begin at many contexts.
        prompts = [self._add(self._rng.randint(64, max(64, self._max_len - 32))) for _ in range(3)]
        for _ in range(MIXED_STEPS):
            if not self._prefilling():
                break
            self._engine.step()
        self._engine.abort_request(running + prompts)
        while self._engine.has_unfinished_requests() or self._scheduler.has_requests():
            self._engine.step()

    def _prefilling(self) -> bool:
        running = self._scheduler.running
        return bool(self._scheduler.waiting) or any(r.is_prefill_chunk for r in running)

    def _add(self, prompt_tokens: int) -> str:
        from vllm import SamplingParams

        request_id = f"profile-{next(self._ids)}"
        length = min(prompt_tokens, self._max_len - 2)
        tokens = [self._rng.randrange(10, self._vocab) for _ in range(length)]
        params = SamplingParams(
            temperature=0.0, ignore_eos=True, max_tokens=self._max_len - length, detokenize=False
        )
        self._engine.add_request(request_id, {"prompt_token_ids": tokens}, params)
        return request_id
