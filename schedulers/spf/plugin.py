"""Declaration of the shortest-prefill-first plug-in."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from vllm_plugins.plugin import Options, Paper, SchedulerPlugin

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_plugins.schedulers.spf.policy import SpfPolicy


class SpfOptions(Options):
    """Options of shortest prefill first."""

    gamma: float = Field(
        15.0,
        ge=0,
        description="Ageing, in tokens per second of waiting; 0 never lets a long prompt catch up. "
        "The paper gives 15 without a unit; the unit is our reading.",
    )


class SpfPlugin(SchedulerPlugin):
    """Waiting requests in order of their remaining prefill, with ageing."""

    name = "spf"
    summary = "Shortest prefill first: waiting requests by remaining prompt length, with ageing."
    papers = (
        Paper("Nexus: Proactive Intra-GPU Disaggregation of Prefill and Decode", "2507.06608"),
    )
    exactness = "exact"
    Options: ClassVar[type[Options]] = SpfOptions

    def orders_waiting(self, options: SpfOptions) -> bool:
        """Always: the order is all that this plug-in does."""
        return True

    def policy(self, options: SpfOptions, config: VllmConfig) -> SpfPolicy:
        """Make the policy of one engine."""
        from vllm_plugins.schedulers.spf.policy import SpfPolicy

        return SpfPolicy(options.gamma)
