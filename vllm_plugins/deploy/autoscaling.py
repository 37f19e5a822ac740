"""How many instances of a role Ray Serve should run, by the requests that they have."""

from __future__ import annotations

from typing import Any


def by_load(context: Any) -> tuple[float, dict[str, Any]]:
    """Return the wanted number of instances; Ray Serve applies bounds and delays to it.

    Args:
        context: Ray Serve's `AutoscalingContext`, with the ``load`` that each replica recorded.
    """
    loads = (context.aggregated_metrics or {}).get("load") or {}
    if not loads:
        # Nothing is known yet, as after a start.
        return float(context.target_num_replicas), {}
    return sum(loads.values()) / context.config.target_ongoing_requests, {}
