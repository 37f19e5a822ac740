"""Sarathi-Serve's stall-free batching as a policy of the scheduler host.

Sarathi-Serve (arXiv 2403.02310), algorithm of section 2.2 of the implementation note: every decode
first, then prompts under way in order of arrival, then new ones, until the token budget is spent.
vLLM's own scheduler fills a step in just that manner once the running requests stand in that
order, so what remains is the budget: fixed, or for every step the largest whose predicted time
meets the TBT target.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from vllm_plugins.engine.cost_model import StepWork
from vllm_plugins.engine.policy import SchedulerFacts, SchedulerPolicy, Step, StepPlan
from vllm_plugins.engine.step_work import work_of
from vllm_plugins.schedulers.sarathi import metrics as m
from vllm_plugins.schedulers.sarathi.budget import Budgets, PendingPrefill, step_work
from vllm_plugins.schedulers.sarathi.estimator import StepTimeEstimator
from vllm_plugins.schedulers.sarathi.latency import LatencyLedger
from vllm_plugins.schedulers.sarathi.least_slack import Overtaking, Waiting, least_slack_order
from vllm_plugins.schedulers.sarathi.targets import Targets

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_plugins.metrics import Metrics
    from vllm_plugins.schedulers.sarathi.plugin import SarathiOptions


class SarathiPolicy(SchedulerPolicy):
    """Chooses the token budget of each step and keeps decodes ahead of prefills.

    Args:
        options: The plug-in's options with their platform's defaults filled in.
        estimator: Predicts step times; unused in static mode.
    """

    metrics = m.ALL

    def __init__(self, options: SarathiOptions, estimator: StepTimeEstimator) -> None:
        self._options = options
        self._estimator = estimator
        self._ledger = LatencyLedger(
            Targets(_seconds(options.ttft_slo_ms), _seconds(options.tbt_slo_ms))
        )
        # Seconds per prefill token while others run beside it; what a waiting prompt will cost.
        self._prefill_pace = 0.0
        self._overtaking = Overtaking()
        # Decodes of the micro-batches that are still in the pipeline's other stages.
        self._recent: deque[set[str]] = deque()

    def bind(self, facts: SchedulerFacts, metrics: Metrics) -> None:
        """Receive the engine's constants."""
        super().bind(facts, metrics)
        self._recent = deque(maxlen=facts.pipeline_stages - 1)

    def added(self, request: Request, arrived: float) -> None:
        """Take a new request's arrival and its own targets."""
        if not self._ledger.add(request, arrived):
            self.metric.inc(m.INVALID.name)

    def plan(self, plan: StepPlan) -> None:
        """Set the step's budget and order."""
        options = self._options
        self._ledger.follow_sessions()
        plan.decode_first |= options.decode_first
        if options.pp_balance:
            self._balance_decodes(plan)
        if options.order == "least_slack" and plan.waiting:
            self._order_prefills(plan)
        if options.max_prefills_per_step == 1:
            self._single_prefill(plan)
        if plan.prefills or plan.num_waiting:
            plan.limit_tokens(self._budget(plan))

    def _budget(self, plan: StepPlan) -> int:
        decodes = self._decodes_of_step(plan)
        decode_rows = len(decodes) * self.facts.decode_rows
        options = self._options
        # `SarathiOptions.resolved` has filled in every default.
        assert options.min_budget and options.tile
        budgets = Budgets(options.min_budget, self.facts.max_tokens, options.tile)
        if options.budget_mode == "static":
            assert options.token_budget
            return max(options.token_budget, budgets.least(decode_rows))
        allowed = self._allowed_seconds(plan)
        if allowed is None:
            return self.facts.max_tokens
        predict = self._estimator.predictor()
        if predict is None:
            # Nothing is known yet; small steps teach quickly and hurt nobody.
            return budgets.least(decode_rows)
        context = (
            plan.decode_context()
            if len(decodes) == len(plan.decodes)
            else sum([request.num_computed_tokens for request in decodes])
        )
        pending = PendingPrefill(
            [
                (r.num_tokens - r.num_computed_tokens, r.num_computed_tokens)
                for r in plan.prefills
                if r not in plan.hidden
            ]
        )

        def seconds(rows: int) -> float:
            return predict(step_work(rows, decode_rows, len(decodes), context, pending))

        # A step's time is how long one pipeline stage is busy with it; the next token of a request
        # is as many such times away as there are stages.
        margin = max(self._options.margin, self._estimator.spread)
        self.metric.set(m.MARGIN.name, margin)
        limit = allowed / margin / self.facts.pipeline_stages
        budget = budgets.largest(seconds, limit, decode_rows)
        if budget == budgets.least(decode_rows) and seconds(budget) > limit:
            self.metric.inc(m.INFEASIBLE.name)
        return budget

    def _allowed_seconds(self, plan: StepPlan) -> float | None:
        """Return how long this step may take; None where no running token has a target."""
        if not plan.decodes:
            return None
        if self._options.budget_mode == "slack":
            return self._ledger.least_slack(plan.decodes, plan.now)
        return self._ledger.tightest_tbt(plan.decodes)

    def _single_prefill(self, plan: StepPlan) -> None:
        """Decode-maximal batches of SARATHI (arXiv 2308.16369): at most one prefill chunk."""
        visible = [request for request in plan.prefills if request not in plan.hidden]
        for request in visible[1:]:
            plan.hide(request)
        plan.limit_admissions(0 if visible else 1)

    def _balance_decodes(self, plan: StepPlan) -> None:
        """Spread decodes evenly over the micro-batches of a pipeline.

        Without it the first micro-batch takes every decode and the next ones find none.
        """
        share = self._turn_size({request.request_id for request in plan.decodes})
        runnable = [request for request in plan.decodes if _runnable(request)]
        # Asynchronous scheduling could run a decode ahead of its own result; those whose turn has
        # not come yet go first, or the same ones would be taken every time.
        waiting = [r for r in runnable if not any(r.request_id in ids for ids in self._recent)]
        turn = (waiting or runnable)[:share]
        for request in set(runnable).difference(turn):
            plan.hide(request)

    def _turn_size(self, decodes: set[str]) -> int:
        """Return how many of the decodes the next micro-batch takes.

        Of seven decodes in three micro-batches one takes three and the others two.
        """
        size, extra = divmod(len(decodes), self.facts.pipeline_stages)
        larger = sum(len(ids & decodes) > size for ids in self._recent)
        return size + (larger < extra)

    def _decodes_of_step(self, plan: StepPlan) -> list[Request]:
        """Return the decodes that will take rows of the step."""
        decodes = plan.visible_decodes()
        if self.facts.pipeline_stages == 1:
            return decodes
        return [request for request in decodes if _runnable(request)]

    def _order_prefills(self, plan: StepPlan) -> None:
        """Put prompts under way and those that wait into one order of slack.

        A prompt under way that a waiting one comes before sits this step out: it keeps its blocks
        and goes on where it stopped. That is how a long prompt that will be late anyway does not
        make the short ones behind it late as well.
        """
        under_way, waiting = plan.prefills, list(plan.waiting)
        order = least_slack_order(
            self._dues([*under_way, *waiting]), plan.now, self._options.max_wait_ms / 1000
        )
        self._let_past(plan, [(under_way + waiting)[i] for i in order])
        plan.prefills = [under_way[i] for i in order if i < len(under_way)]
        queue = [i - len(under_way) for i in order if i >= len(under_way)]
        if queue != list(range(len(queue))):
            plan.waiting.remove_requests(waiting)
            for i in queue:
                plan.waiting.add_request(waiting[i])
            self.metric.inc(m.REORDERED.name)

    def _let_past(self, plan: StepPlan, order: Sequence[Request]) -> None:
        """Hide prompts under way behind the first waiting one that may start before them."""
        under_way = set(plan.prefills)
        ranks = enumerate(order)
        may = (i for i, r in ranks if r not in under_way and self._overtaking.may(r.request_id))
        first = next(may, len(order))
        overtaken = [i for i in range(first, len(order)) if order[i] in under_way]
        if overtaken and plan.can_admit(order[first]):
            before = [r.request_id for r in order[: overtaken[0]] if r not in under_way]
            self._overtaking.let_past(before)
            for i in overtaken:
                plan.hide(order[i])

    def _dues(self, requests: Sequence[Request]) -> list[Waiting]:
        dues = []
        for i, request in enumerate(requests):
            # A preempted answer is being read already: it goes first, as in vLLM's own queue.
            started = request.num_output_tokens > 0
            arrived = -math.inf if started else self._ledger.arrived(request.request_id)
            ttft = self._ledger.targets(request.request_id).ttft
            deadline = arrived + (ttft if ttft is not None else self._options.max_wait_ms / 1000)
            work = self._prefill_pace * (request.num_tokens - request.num_computed_tokens)
            dues.append(Waiting(i, arrived, deadline, work))
        return dues

    def scheduled(self, step: Step) -> None:
        """Remember what the step contains, and count decodes that were left out."""
        work, prefill_rows = work_of(step)
        step.notes["sarathi"] = (work, prefill_rows)
        out = step.output
        began = out.scheduled_new_reqs or out.scheduled_cached_reqs.resumed_req_ids
        self._overtaking.scheduled(
            out.num_scheduled_tokens, lost=work.rows < step.plan.token_budget or bool(began)
        )
        if prefill_rows:
            self.metric.observe(m.BUDGET.name, step.plan.token_budget)
        ran = step.output.num_scheduled_tokens
        stalled = 0
        if len(step.plan.decodes) * self.facts.decode_rows > work.rows - prefill_rows:
            left_out = [r for r in step.plan.decodes if r.request_id not in ran]
            stalled = sum(r not in step.plan.hidden and _runnable(r) for r in left_out)
        if self._options.pp_balance:
            self._recent.append(ran.keys() & {r.request_id for r in step.plan.decodes})
        if stalled:
            self.metric.inc(m.STALLED.name, stalled)

    def completed(self, step: Step) -> None:
        """Learn from the step's time, and hold the emitted tokens against their targets."""
        work, prefill_rows = step.notes["sarathi"]
        if step.duration is not None and step.duration > 0:
            self._learn(work, prefill_rows, step.duration)
        ttft_misses, tbt_misses = self._ledger.emitted(step.emitted, step.finished_at)
        if ttft_misses:
            self.metric.inc(m.TTFT_MISSES.name, ttft_misses)
        if tbt_misses:
            self.metric.inc(m.TBT_MISSES.name, tbt_misses)

    def _learn(self, work: StepWork, prefill_rows: int, duration: float) -> None:
        self.metric.observe(m.MEASURED.name, duration)
        predict = self._estimator.predictor()
        if predict is not None:
            predicted = predict(work)
            self.metric.observe(m.PREDICTED.name, predicted)
            self.metric.observe(m.ERROR.name, abs(predicted - duration) / duration)
        self._estimator.learn(work, duration)
        self.metric.set(m.CORRECTION.name, self._estimator.correction)
        if prefill_rows:
            pace = duration / prefill_rows
            self._prefill_pace += (0.1 if self._prefill_pace else 1.0) * (pace - self._prefill_pace)

    def forget(self, request_ids: Collection[str]) -> None:
        """Drop finished requests."""
        self._ledger.forget(request_ids)
        self._overtaking.forget(request_ids)


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000


def _runnable(request: Request) -> bool:
    """Whether a running decode has a token to compute that no step in flight computes already."""
    known = request.num_tokens_with_spec + request.num_output_placeholders
    return bool(known > request.num_computed_tokens)
