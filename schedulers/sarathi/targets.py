"""Per-request latency targets, given through a request's extra arguments.

Over HTTP: ``"vllm_xargs": {"ttft_slo_ms": 500, "tbt_slo_ms": 40}``; offline:
``SamplingParams(extra_args={"ttft_slo_ms": 500})``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

MAX_MS = 3_600_000.0


class InvalidTargetError(ValueError):
    """A request's target is not a number of milliseconds in (0, 3,600,000]."""


@dataclass(frozen=True)
class Targets:
    """What a request asked for, in seconds; None where it did not."""

    ttft: float | None = None
    tbt: float | None = None


NO_TARGETS = Targets()


def request_targets(request: Request) -> Targets:
    """Read a request's own targets.

    Raises:
        InvalidTargetError: A target is malformed.
    """
    params = request.sampling_params
    extra = params.extra_args if params is not None else None
    if not extra:
        return NO_TARGETS
    return Targets(_seconds(extra, "ttft_slo_ms"), _seconds(extra, "tbt_slo_ms"))


def _seconds(extra: dict[str, object], name: str) -> float | None:
    value = extra.get(name)
    if value is None:
        return None
    try:
        # JSON's true would pass for one millisecond.
        ms = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise InvalidTargetError(f"{name}={value!r} is not a number of milliseconds") from None
    if not (math.isfinite(ms) and 0 < ms <= MAX_MS):
        raise InvalidTargetError(f"{name}={value!r} is not in (0, {MAX_MS:.0f}] milliseconds")
    return ms / 1000
