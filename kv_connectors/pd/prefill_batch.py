"""DistServe's batches of a prefill instance: whole prompts, up to the saturating length ``L_m``.

``L_m`` is the least number of prompt tokens that keeps the device busy (section 3 of the paper;
`vllm-plugins profile` prints it). First come, first served, prompts join a batch while their total
stays within ``L_m``; a longer prompt runs alone, and whole. So steps are of equal length where
prompts are short, and nobody waits for batch mates that bring no throughput.

A prompt that is longer than ``--max-num-batched-tokens`` cannot run whole; its chunks run alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_plugins.engine.policy import SchedulerPolicy, StepPlan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vllm.v1.request import Request


class PrefillBatchPolicy(SchedulerPolicy):
    """Forms the batches of prompts; decodes, where there are any, join every step.

    Args:
        saturating_tokens: ``L_m``, in prompt tokens.
    """

    def __init__(self, saturating_tokens: int) -> None:
        self._saturating_tokens = saturating_tokens

    def plan(self, plan: StepPlan) -> None:
        """Limit who starts in this step, and the step to them."""
        connector = self.facts.kv_connector
        # Those whose KV was pulled only decode, and come before all that wait.
        ready = connector.admission.ready
        if plan.prefills:
            plan.limit_admissions(ready)
            return
        # What has to wait would leave its place in the batch to prompts of any length.
        waiting = connector.startable(plan.waiting)
        batch = list(whole_prompts(map(_remaining, waiting), self._saturating_tokens))
        # At least one, or vLLM would not look at what is to be pulled either.
        plan.limit_admissions(ready + max(1, len(batch)))


def whole_prompts(lengths: Iterable[int], saturating_tokens: int) -> Iterator[int]:
    """Return the prompts of the next batch.

    Args:
        lengths: Tokens of each waiting prompt, in order of arrival.
        saturating_tokens: ``L_m``.
    """
    total = 0
    for length in lengths:
        if total and total + length > saturating_tokens:
            return
        total += length
        yield length


def _remaining(request: Request) -> int:
    return request.num_tokens - request.num_computed_tokens
