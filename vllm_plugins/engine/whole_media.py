"""Room in a step for a media item that has to come whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    from vllm_plugins.engine.policy import StepPlan


def fit_media(plan: StepPlan, scheduler: Scheduler) -> None:
    """Raise a step's budget to what the media item needs with which the next prompt goes on.

    A smaller one would keep its request, and all that wait behind it, waiting for ever.

    Args:
        plan: Of the step, as the policies have left it.
        scheduler: vLLM's own, whose budget is never exceeded.
    """
    most = scheduler.max_num_scheduled_tokens
    if plan.token_budget == most:
        return
    following = [request for request in plan.prefills if request not in plan.hidden][:1]
    if not following:
        # Sessions between two turns hold KV, and go before those that have none.
        following = list(scheduler.kv_holding_waiting)
        following += [scheduler.waiting.peek_request()] if scheduler.waiting else []
    media = max(map(_media_rows, following), default=0)
    if media:
        decodes = len(plan.visible_decodes()) * (1 + scheduler.num_spec_tokens)
        plan.token_budget = min(max(plan.token_budget, decodes + media), most)


def _media_rows(request: Request) -> int:
    """Return how many tokens are left of the media item with which a prompt goes on.

    Where a prompt begins is known once its cached prefix is looked up: until then, of its longest.
    """
    reached = request.num_computed_tokens
    places = [feature.mm_position for feature in request.mm_features]
    if reached == 0:
        return max((place.length for place in places), default=0)
    ends = (p.offset + p.length for p in places if p.offset <= reached < p.offset + p.length)
    return max((end - reached for end in ends), default=0)
