"""What a simulation is fed with and what it leaves behind. Times are virtual seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class SimulatedRequest:
    """One request of a workload.

    Attributes:
        request_id: Unique in its simulation.
        arrival_s: When it arrives.
        prompt: Token ids of the prompt.
        output_tokens: Most tokens that it generates.
        stops_after: Tokens after which the model stops by itself; None for never.
        priority: Smaller goes first under the priority policy.
        extra_args: The request's extra arguments, where plug-ins find its latency targets.
    """

    request_id: str
    arrival_s: float
    prompt: tuple[int, ...]
    output_tokens: int
    stops_after: int | None = None
    priority: int = 0
    extra_args: Mapping[str, Any] | None = None


@dataclass
class RequestRecord:
    """What happened to one request.

    Attributes:
        request: The request.
        token_times: When each output token was handed out.
        tokens: The output tokens.
        scheduled_tokens: Rows that steps spent on it, recomputation after preemption included.
        chunks: ``(context before, tokens)`` of each of its parts of a step, in order.
        admissions: Positions in ``chunks`` at which it was admitted, again after preemption.
        finished_s: When it finished or was aborted; None while it runs.
        aborted: Whether the client gave it up.
    """

    request: SimulatedRequest
    token_times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    scheduled_tokens: int = 0
    chunks: list[tuple[int, int]] = field(default_factory=list)
    admissions: list[int] = field(default_factory=list)
    finished_s: float | None = None
    aborted: bool = False

    @property
    def first_token_s(self) -> float | None:
        """When the first token was handed out."""
        return self.token_times[0] if self.token_times else None

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token."""
        first = self.first_token_s
        return None if first is None else first - self.request.arrival_s

    @property
    def gaps(self) -> list[float]:
        """Seconds between consecutive tokens."""
        times = self.token_times
        return [later - earlier for earlier, later in pairwise(times)]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step that was scheduled.

    Attributes:
        scheduled_s: When it was scheduled.
        finished_s: When its result was there.
        num_scheduled_tokens: Rows by request.
        rows: Rows in total.
        decodes: Requests of it that decode.
        budget: Most rows that the step could have.
    """

    scheduled_s: float
    finished_s: float
    num_scheduled_tokens: Mapping[str, int]
    rows: int
    decodes: int
    budget: int
