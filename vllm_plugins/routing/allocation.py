"""How many workers should encode, prefill and decode: try every split in virtual time.

Goodput is the highest request rate at which the wanted share of requests meets both targets. Every
split of N workers is simulated on the same requests, brought to different rates by stretching the
gaps between them; the split with the highest goodput wins. Workers that do everything (colocated)
are a candidate like any other, and win ties, as they are simpler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from vllm_plugins.bench.capacity import DEFAULT_TARGET, Capacity, find_capacity
from vllm_plugins.errors import PluginError
from vllm_plugins.routing.stage_times import StageTimes
from vllm_plugins.routing.virtual import AT_DECODE, Outcome, Request, Setup, Shape, simulate

# Queues need a while to build up; what arrives before says nothing about the rate.
WARM_UP = 0.1
# Goodputs closer than this are equal: the search stops at such a bracket.
PRECISION = 1.03
TRIALS = 16
# Between arrivals of requests that must not meet, in seconds.
APART_S = 1e5


@dataclass(frozen=True)
class Targets:
    """Targets of a request, and the share of requests that must meet both.

    Attributes:
        ttft_ms: Time to first token, in milliseconds.
        tpot_ms: Mean time per output token after the first, in milliseconds.
        attainment: Over 0, at most 1.
    """

    ttft_ms: float
    tpot_ms: float
    attainment: float = DEFAULT_TARGET

    def __post_init__(self) -> None:
        if not (self.ttft_ms > 0 and self.tpot_ms > 0):
            raise PluginError("targets", "must be over 0 ms", "give --slo-ttft-ms, --slo-tpot-ms")
        if not 0 < self.attainment <= 1:
            raise PluginError("--attainment", "must be over 0 and at most 1", "0.9 is usual")


@dataclass(frozen=True)
class Candidate:
    """A split of the workers and what it can do.

    Attributes:
        shape: How many workers do what.
        capacity: Its goodput in req/s, and the rates that were tried.
    """

    shape: Shape
    capacity: Capacity

    @property
    def goodput(self) -> float:
        """Requests per second; 0 where even a lone request misses the targets too often."""
        return self.capacity.rate


def shapes(workers: int, with_images: bool) -> Iterator[Shape]:
    """Yield every split: colocated, P and D, E and PD, E, P and D; the latter two for images.

    Without encode workers, prefill and colocated workers encode themselves.
    """
    yield Shape(combined=workers)
    for encode in range(workers - 1 if with_images else 1):
        if encode:
            yield Shape(encode=encode, combined=workers - encode)
        for prefill in range(1, workers - encode):
            yield Shape(encode=encode, prefill=prefill, decode=workers - encode - prefill)
    if with_images and workers > 1:
        yield Shape(encode=workers - 1, combined=1)


def attainment(outcomes: Sequence[Outcome], targets: Targets) -> float:
    """Return the share of requests that meet both targets, without the first ones."""
    counted = outcomes[int(len(outcomes) * WARM_UP) :]
    good = sum(
        one.ttft_s * 1e3 <= targets.ttft_ms and one.tpot_s * 1e3 <= targets.tpot_ms
        for one in counted
    )
    return good / len(counted)


def at_rate(requests: Sequence[Request], rate: float) -> list[Request]:
    """Bring a trace to a mean rate in req/s; the gaps keep their proportions."""
    factor = _rate(requests) / rate
    first = requests[0].arrival_s
    return [replace(one, arrival_s=(one.arrival_s - first) * factor) for one in requests]


def _rate(requests: Sequence[Request]) -> float:
    span = requests[-1].arrival_s - requests[0].arrival_s if requests else 0.0
    if span <= 0:
        raise PluginError("trace", "its requests all arrive at once", "give one with a rate")
    return (len(requests) - 1) / span


def evaluate(requests: Sequence[Request], setup: Setup, targets: Targets) -> Candidate:
    """Find the goodput of one split."""

    def measured(rate: float) -> float:
        return attainment(simulate(at_rate(requests, rate), setup), targets)

    # So slowly that requests meet nobody: who fails then fails at every rate.
    apart = [replace(one, arrival_s=i * APART_S) for i, one in enumerate(requests)]
    alone = attainment(simulate(apart, setup), targets)
    if alone < targets.attainment:
        return Candidate(setup.shape, Capacity(0.0, 0.0, ((0.0, alone),)))
    capacity = find_capacity(measured, _rate(requests), targets.attainment, TRIALS, PRECISION)
    return Candidate(setup.shape, capacity)


def allocate(
    requests: Sequence[Request],
    times: StageTimes,
    workers: int,
    targets: Targets,
    dispatch: str = "backlog",
    first_token: str = AT_DECODE,
    seen: Callable[[Candidate], None] = lambda candidate: None,
) -> list[Candidate]:
    """Find the goodput of every split.

    Args:
        requests: A trace in order of arrival.
        times: Of one worker.
        workers: How many there are.
        targets: What a good request is.
        dispatch: Name of the dispatcher.
        first_token: Which instance computes the first token.
        seen: Called with each candidate as soon as it is known.

    Returns:
        The candidates, the best first.

    Raises:
        PluginError: The trace is empty, has no rate or does not fit, or there are no workers.
    """
    if workers < 1:
        raise PluginError("--workers", f"{workers} is too few", "give at least 1")
    found = []
    for shape in shapes(workers, any(one.images for one in requests)):
        found.append(evaluate(requests, Setup(times, shape, dispatch, first_token), targets))
        seen(found[-1])
    return ranked(found)


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates, the best first.

    The winner is the simplest of those that are within the search's precision of the highest
    goodput: colocated, then the fewest encode workers. The others follow by goodput.
    """
    most = max(one.goodput for one in candidates)
    equal = [one for one in candidates if one.goodput * PRECISION >= most]
    best = min(equal, key=lambda one: (bool(one.shape.decode or one.shape.encode),
                                       one.shape.encode, -one.goodput))  # fmt: skip
    others = sorted(candidates, key=lambda one: -one.goodput)
    return [best, *(one for one in others if one is not best)]
