"""What a scheduling policy sees and may decide, without knowing vLLM's scheduler.

A step runs like this::

    host: StepPlan(running requests, stock budget)
    each policy:  plan(plan)          narrows the plan, never widens what another one narrowed
    host: stock schedule() under the plan
    each policy:  scheduled(step)     what was actually scheduled
    ... the model runs ...
    each policy:  completed(step)     how long it took and which requests emitted tokens

A policy never allocates blocks, never picks victims and never builds the scheduler's output:
that stays vLLM's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from vllm_plugins.metrics import MetricSpec

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.request_queue import RequestQueue
    from vllm.v1.request import Request

    from vllm_plugins.metrics import Metrics


# Order of a waiting request, smallest first, given the tokens that are to be computed of it.
WaitingKey: TypeAlias = "Callable[[Request, float], float]"


def prefill_left(request: Request) -> int:
    """Return the tokens of a request that are not computed yet."""
    return request.num_tokens - request.num_computed_tokens


@dataclass(frozen=True)
class SchedulerFacts:
    """Constants of the engine that a policy may need.

    Args:
        max_tokens: Most rows (tokens) that a step can have.
        decode_rows: Rows that one decoding request takes: 1, or 1 plus the drafts.
        pipeline_stages: Pipeline-parallel size.
        clock: Monotonic time in seconds; virtual in a simulation.
        kv_connector: The scheduler's part of the KV connector, if there is one.
        kv_cache_manager: vLLM's own, which knows the blocks of every request.
        waiting_key: The order of waiting requests by one of the policies; None where none has any.
    """

    max_tokens: int
    decode_rows: int
    pipeline_stages: int
    clock: Callable[[], float]
    kv_connector: Any = None
    kv_cache_manager: Any = None
    waiting_key: WaitingKey | None = None


class StepPlan:
    """One step before it is scheduled: what could run, and the limits that policies put on it.

    Attributes:
        now: Time in seconds on the scheduler's clock.
        decodes: Running requests whose prompt is complete, in the order they will be tried.
        prefills: Running requests in the middle of their prompt, in the order they will be tried.
        waiting: The waiting queue itself; a policy that owns its order may rearrange it.
        num_waiting: Requests that wait for admission.
        can_admit: Whether there is a slot and room in the KV cache for a waiting request.
        token_budget: Most rows this step may have.
        max_admissions: Most waiting requests that may start, or None for no limit.
        decode_first: Whether every decode is tried before any prefill.
    """

    __slots__ = (
        "_decode_context",
        "can_admit",
        "decode_first",
        "decodes",
        "hidden",
        "max_admissions",
        "now",
        "num_waiting",
        "prefills",
        "token_budget",
        "waiting",
    )

    def __init__(
        self,
        now: float,
        running: Collection[Request],
        waiting: RequestQueue,
        num_waiting: int,
        max_tokens: int,
        can_admit: Callable[[Request], bool],
    ) -> None:
        self.now = now
        self.decodes = [request for request in running if not request.is_prefill_chunk]
        self.prefills = (
            [request for request in running if request.is_prefill_chunk]
            if len(self.decodes) < len(running)
            else []
        )
        self.waiting = waiting
        self.num_waiting = num_waiting
        self.can_admit = can_admit
        self.token_budget = max_tokens
        self.max_admissions: int | None = None
        self.decode_first = False
        self.hidden: set[Request] = set()
        self._decode_context: int | None = None

    def visible_decodes(self) -> list[Request]:
        """Return the decodes that are not hidden."""
        if not self.hidden:
            return self.decodes
        return [request for request in self.decodes if request not in self.hidden]

    def decode_context(self) -> int:
        """Return the sum of all decodes' context lengths, in tokens, as of the first call."""
        if self._decode_context is None:
            # A list and once only: this runs over every decode in every step.
            self._decode_context = sum([request.num_computed_tokens for request in self.decodes])
        return self._decode_context

    def limit_tokens(self, tokens: int) -> None:
        """Lower the step's token budget to at most ``tokens`` rows."""
        self.token_budget = min(self.token_budget, tokens)

    def limit_admissions(self, requests: int) -> None:
        """Let at most ``requests`` waiting requests start in this step."""
        if self.max_admissions is None or requests < self.max_admissions:
            self.max_admissions = requests

    def hide(self, request: Request) -> None:
        """Keep a running request out of this step; it keeps its blocks and its place."""
        self.hidden.add(request)


@dataclass(slots=True)
class Step:
    """A scheduled step, and after it ran, what is known about it.

    Args:
        plan: The plan it was scheduled under.
        output: vLLM's own description of the step.
        duration: Seconds that the engine was busy with this step; None where that is not known
            (first step after an idle time in a pipelined engine, a step without work).
        finished_at: Time in seconds at which its tokens were handed out.
        emitted: Requests that got new tokens from it.
        notes: Room for what a policy wants to remember from planning until completion.
        reports: What workers' parts of plug-ins told with the step's result, by the plug-in's name.
    """

    plan: StepPlan
    output: SchedulerOutput
    scheduled_at: float
    duration: float | None = None
    finished_at: float = 0.0
    emitted: Sequence[str] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    reports: Mapping[str, Any] = field(default_factory=dict)


class SchedulerPolicy:
    """Base of a policy; every hook does nothing."""

    metrics: tuple[MetricSpec, ...] = ()
    whole_media: bool = False
    """Whether a step with some of a media item's tokens has to have all that are left of it."""
    arranges_waiting: bool = False
    """Whether it keeps the waiting queue in order itself, by another policy's key if it has one."""

    def bind(self, facts: SchedulerFacts, metrics: Metrics) -> None:
        """Receive the engine's constants and the metrics writer, once, before the first step."""
        self.facts = facts
        self.metric = metrics

    def waiting_key(self) -> WaitingKey | None:
        """Return the key that orders waiting requests, or None to leave the order alone.

        Called once, before `bind`. The key is asked whenever a request enters the queue, with
        `prefill_left`, or by a policy that knows better what is left as often as it likes.
        """
        return None

    def added(self, request: Request, arrived: float) -> None:
        """A request arrived, in seconds on the scheduler's clock; called before it is queued."""

    def plan(self, plan: StepPlan) -> None:
        """Narrow the plan of the next step."""

    def scheduled(self, step: Step) -> None:
        """The step was scheduled and is about to run."""

    def completed(self, step: Step) -> None:
        """The step has run."""

    def forget(self, request_ids: Collection[str]) -> None:
        """These requests finished or were aborted; drop whatever is kept for them."""
