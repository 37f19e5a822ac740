"""What a scheduled step contains, in the terms of the cost model."""

from __future__ import annotations

from vllm_plugins.engine.cost_model import StepWork, chunk_work
from vllm_plugins.engine.policy import Step


def work_of(step: Step) -> tuple[StepWork, int]:
    """Return what a scheduled step contains, and how many of its rows are prefill.

    To be asked while the step is being scheduled: later the requests have moved on.
    """
    output, plan = step.output, step.plan
    ran = output.num_scheduled_tokens
    chunks = [(r.req_id, r.num_computed_tokens) for r in output.scheduled_new_reqs]
    cached = output.scheduled_cached_reqs
    if cached.resumed_req_ids:
        resumed = zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        chunks += [(i, context) for i, context in resumed if i in cached.resumed_req_ids]
    # By now the running requests count this step's tokens as computed.
    chunks += [
        (r.request_id, r.num_computed_tokens - ran[r.request_id])
        for r in plan.prefills
        if r.request_id in ran
    ]
    prefill_rows = sum(ran[request_id] for request_id, _ in chunks)
    prefill_work = sum(chunk_work(ran[request_id], context) for request_id, context in chunks)
    if len(ran) - len(chunks) < len(plan.decodes):
        context = sum([r.num_computed_tokens for r in plan.decodes if r.request_id in ran])
    else:
        context = plan.decode_context()
    rows = output.total_num_scheduled_tokens
    return StepWork(rows, len(ran), context, prefill_work), prefill_rows
