"""Metrics of EPD, all written in the scheduler's process."""

from __future__ import annotations

import threading

from vllm_plugins.metrics import SECONDS_BUCKETS, Metrics, MetricSpec

PUBLISHED = MetricSpec(
    "epd_published_items_total",
    "counter",
    "Media items that were encoded here and can be fetched.",
)
FETCHED = MetricSpec(
    "epd_fetched_items_total", "counter", "Media items whose embeddings were fetched."
)
FETCHED_BYTES = MetricSpec(
    "epd_fetched_bytes_total", "counter", "Bytes of embeddings that were fetched."
)
SENT_BYTES = MetricSpec(
    "epd_sent_bytes_total", "counter", "Bytes of embeddings that were sent to prefill servers."
)
FETCH_SECONDS = MetricSpec(
    "epd_fetch_seconds",
    "histogram",
    "Time from wanting an item's embeddings until they are here and checked, in seconds.",
    SECONDS_BUCKETS,
)
REUSED = MetricSpec(
    "epd_reused_items_total",
    "counter",
    "Items of requests whose embeddings were here already, or on their way.",
)
MISSING = MetricSpec(
    "epd_missing_items_total",
    "counter",
    "Items whose embeddings could not be had, by reason: gone, timeout, damaged, mismatch, "
    "refused, unreachable, internal.",
    (),
    "reason",
)
REFUSED = MetricSpec(
    "epd_refused_requests_total",
    "counter",
    "Requests refused: malformed parameters, or more embeddings than the arena holds.",
)
DEFERRED = MetricSpec(
    "epd_deferred_requests_total",
    "counter",
    "Requests to encode that had to wait for room in the arena.",
)
EARLY = MetricSpec(
    "epd_early_prefill_tokens_total",
    "counter",
    "Prompt tokens that were computed while an item of their request was not here yet.",
)
ARENA = MetricSpec(
    "epd_arena_used_bytes", "gauge", "Bytes of the arena that hold embeddings, needed or kept."
)

REASONS = ("gone", "timeout", "damaged", "mismatch", "refused", "unreachable",
           "internal")  # fmt: skip
ALL = (PUBLISHED, FETCHED, FETCHED_BYTES, SENT_BYTES, FETCH_SECONDS, REUSED, MISSING, REFUSED,
       DEFERRED, EARLY, ARENA)  # fmt: skip


class Ledger:
    """The metrics writer for several threads.

    Args:
        writer: What the values are written with.
    """

    def __init__(self, writer: Metrics) -> None:
        self._writer = writer
        self._lock = threading.Lock()
        for reason in REASONS:
            writer.inc(MISSING.name, 0, reason)

    def inc(self, spec: MetricSpec, amount: float = 1, label: str = "") -> None:
        """Add to a counter."""
        with self._lock:
            self._writer.inc(spec.name, amount, label)

    def set(self, spec: MetricSpec, value: float) -> None:
        """Set a gauge."""
        with self._lock:
            self._writer.set(spec.name, value)

    def observe(self, spec: MetricSpec, value: float) -> None:
        """Add an observation to a histogram."""
        with self._lock:
            self._writer.observe(spec.name, value)
