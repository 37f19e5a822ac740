"""P-PAS (arXiv 2608.15171): a small token budget while prefills and decodes compete."""

from typing import ClassVar

from pydantic import Field

from vllm_plugins.engine.policy import SchedulerPolicy, StepPlan
from vllm_plugins.metrics import MetricSpec
from vllm_plugins.plugin import Options, SchedulerPlugin

SMALL = MetricSpec("ppas_small_steps_total", "counter", "Steps that had the small budget.")


class PpasOptions(Options):
    """Options of P-PAS."""

    small_budget: int = Field(2048, ge=1, description="Rows of a step in the small state.")


class PpasPolicy(SchedulerPolicy):
    """A small budget while two prefills and a decode are pending, else all that a step holds."""

    metrics = (SMALL,)

    def __init__(self, options: PpasOptions) -> None:
        self._options = options

    def plan(self, plan: StepPlan) -> None:
        """Choose between the two budgets."""
        if len(plan.prefills) + plan.num_waiting >= 2 and plan.decodes:
            plan.limit_tokens(self._options.small_budget)
            self.metric.inc(SMALL.name)


class PpasPlugin(SchedulerPlugin):
    """Declaration: what `--plugin ppas` finds."""

    name = "ppas"
    summary = "Two-state prefill budget: small while several prefills wait beside decodes."
    exactness = "exact"
    Options: ClassVar[type[Options]] = PpasOptions

    def policy(self, options: PpasOptions, config: object) -> PpasPolicy:
        """Make the policy of one engine."""
        return PpasPolicy(options)
