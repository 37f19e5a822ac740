"""What the router counts, in Prometheus' format on its own ``/metrics``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_plugins.metrics import PREFIX, SECONDS_BUCKETS
from vllm_plugins.router.first_token import HOLDS_ONE, REASONS
from vllm_plugins.routing import Fleet, Ledger, Move, Role, State

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge, Histogram

# The router's own share is far below a model's times.
ADDED_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
# Behind a queue the first byte takes much longer than a step.
TTFT_BUCKETS = (*SECONDS_BUCKETS, 20.0, 60.0)
OUTCOMES = (
    "complete", "rejected", "invalid", "too_large", "queue_full", "queue_timeout", "no_instance",
    "failed", "broken", "timeout", "disconnected",
)  # fmt: skip
"""How a request can end."""


class RouterMetrics:
    """The metrics of one router.

    Args:
        fleet: The instances.
        ledger: Their load, read when the metrics are.
    """

    def __init__(self, fleet: Fleet, ledger: Ledger) -> None:
        from prometheus_client import CollectorRegistry

        self._fleet, self._ledger = fleet, ledger
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests that have ended.", "outcome")
        self._retries = self._counter("retries", "Requests sent again after a failure.", "role")
        self._resumed = self._counter("resumed", "Streams continued on another decode instance.")
        self._late = self._counter(
            "late_first_token", "Requests whose first token prefill could not give.", "reason"
        )
        self._alone = self._counter("alone", "Requests served without a hand-over.", "reason")
        self._moves = self._counter(
            "role_moves", "Instances that have changed role.", "source", "target"
        )
        self._releases = self._counter("releases", "Held prompts that were let go of.", "outcome")
        self._queue = self._gauge("queue", "Requests that wait for an instance.", "role")
        self._in_flight = self._gauge("in_flight", "Requests at an instance.", "instance", "role")
        self._up = self._gauge("up", "1 for an instance that gets requests.", "instance", "role")
        self._ttft = self._histogram("ttft_seconds", "Time to the first byte, in s.", TTFT_BUCKETS)
        self._added = self._histogram(
            "added_seconds", "Share of the time to the first byte that is the router's own, in s.",
            ADDED_BUCKETS,
        )  # fmt: skip
        self._show_zeros()

    def ended(self, outcome: str) -> None:
        """Count a request by how it ended, one of ``OUTCOMES``."""
        self._requests.labels(outcome).inc()

    def retried(self, role: Role) -> None:
        """Count a request that is sent again for a stage."""
        self._retries.labels(role.value).inc()

    def resumed(self) -> None:
        """Count a stream that another instance continues."""
        self._resumed.inc()

    def late(self, reason: str) -> None:
        """Count a request whose first token decode gives, by a key of ``REASONS``."""
        self._late.labels(reason).inc()

    def alone(self, reason: str) -> None:
        """Count a request that is not handed over, by a key of ``HOLDS_ONE``."""
        self._alone.labels(reason).inc()

    def moved(self, move: Move) -> None:
        """Count a change of role."""
        self._moves.labels(move.source.value, move.target.value).inc()

    def released(self, outcome: str) -> None:
        """Count a release of held KV: ``done`` or ``failed``."""
        self._releases.labels(outcome).inc()

    def queue(self, role: Role, waiting: int) -> None:
        """Note how many requests wait for a role."""
        self._queue.labels(role.value).set(waiting)

    def first_byte(self, ttft_s: float, added_s: float) -> None:
        """Note the time to a request's first byte, and the router's own share of it."""
        self._ttft.observe(ttft_s)
        self._added.observe(max(0.0, added_s))

    def render(self) -> bytes:
        """Return all metrics as text."""
        from prometheus_client import generate_latest

        # Instances come, go and change their roles, so these are made anew each time.
        self._in_flight.clear()
        self._up.clear()
        for one in self._fleet:
            labels = (one.id, one.active.value)
            self._in_flight.labels(*labels).set(self._ledger.load(one).requests)
            self._up.labels(*labels).set(one.state is State.UP)
        return generate_latest(self._registry)

    def _show_zeros(self) -> None:
        # A series that appears late hides its first increase.
        for metric, values in (
            (self._requests, OUTCOMES),
            (self._retries, [role.value for role in Role]),
            (self._late, REASONS),
            (self._alone, HOLDS_ONE),
            (self._releases, ("done", "failed")),
            (self._queue, [role.value for role in Role]),
        ):
            for value in values:
                metric.labels(value)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        from prometheus_client import Counter

        return Counter(_full(name), text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        from prometheus_client import Gauge

        return Gauge(_full(name), text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        from prometheus_client import Histogram

        return Histogram(_full(name), text, buckets=buckets, registry=self._registry)


def _full(name: str) -> str:
    return f"{PREFIX}router_{name}"
