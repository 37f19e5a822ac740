"""The scheduler host: vLLM's own scheduler with policies around ``schedule()``.

``schedule()`` is never copied. Before it runs, the policies narrow a :class:`StepPlan`; the host
applies the plan to the few attributes that the stock method reads (token budget, order of running
requests, admission limit), calls it, and puts everything back. With no policy, nothing at all
happens around the stock method.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_plugins.engine.policy import (
    SchedulerFacts,
    SchedulerPolicy,
    Step,
    StepPlan,
    WaitingKey,
    prefill_left,
)
from vllm_plugins.engine.step_reports import reports_of
from vllm_plugins.engine.waiting_queue import KeyedRequestQueue
from vllm_plugins.engine.whole_media import fit_media
from vllm_plugins.metrics import ACTIVE, Metrics, engine_labels
from vllm_plugins.plugin import SchedulerPlugin
from vllm_plugins.settings import enabled_plugins, requested
from vllm_plugins.versions import admission_limits

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

# Under vLLM's own root logger, so that its handlers and levels apply.
logger = init_logger("vllm.vllm_plugins.scheduler")


def create_scheduler(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Scheduler:
    """Make the scheduler of one engine; the value of ``--scheduler-cls``.

    Chooses between the asynchronous and the synchronous scheduler as vLLM does when no class is
    given. A function, because only the engine's final configuration knows which.
    """
    if vllm_config.scheduler_config.async_scheduling:
        return AsyncSchedulerHost(vllm_config, *args, **kwargs)
    return SchedulerHost(vllm_config, *args, **kwargs)


class _PolicyHost(Scheduler):
    """Mixed in before a scheduler class; every attribute of its own starts with ``plugin_``."""

    running: list[Request]
    max_num_scheduled_tokens: int

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.plugin_clock: Callable[[], float] = time.monotonic
        self.plugin_wall_clock: Callable[[], float] = time.time
        self.plugin_steps: deque[Step] = deque()
        self.plugin_last_update = 0.0
        self.plugin_admission_limits = admission_limits(self)
        self.plugin_policies = self._plugin_load_policies()

    def _plugin_load_policies(self) -> list[SchedulerPolicy]:
        policies = {
            item.plugin.name: item.plugin.policy(item.options, self.vllm_config)
            for item in enabled_plugins(self.vllm_config)
            if isinstance(item.plugin, SchedulerPlugin)
        }
        specs = [spec for policy in policies.values() for spec in policy.metrics]
        metrics = Metrics([ACTIVE, *specs], engine_labels(self.vllm_config))
        keys = [key for policy in policies.values() if (key := policy.waiting_key()) is not None]
        # The registry has let at most one plug-in through that has one.
        key = keys[0] if keys else None
        facts = self._plugin_facts(key)
        for name, policy in policies.items():
            policy.bind(facts, metrics)
            metrics.set(ACTIVE.name, 1, name)
        if key is not None and not any(p.arranges_waiting for p in policies.values()):
            self.waiting = KeyedRequestQueue(partial(_key_of, key))
        host = type(self).__name__
        for spec in requested(self.vllm_config.additional_config):
            logger.info("vllm-plugins: %s is on (%s): %s", spec.name, host, spec.options)
        return list(policies.values())

    def _plugin_facts(self, waiting_key: WaitingKey | None) -> SchedulerFacts:
        return SchedulerFacts(
            max_tokens=self.max_num_scheduled_tokens,
            decode_rows=1 + self.num_spec_tokens,
            pipeline_stages=self.parallel_config.pipeline_parallel_size,
            clock=lambda: self.plugin_clock(),
            kv_connector=self.connector,
            kv_cache_manager=self.kv_cache_manager,
            waiting_key=waiting_key,
        )

    def add_request(self, request: Request) -> None:
        """Add a request, telling the policies of it first."""
        if self.plugin_policies:
            # A long step keeps arrivals in the engine's input queue, and that wait counts too.
            age = max(0.0, self.plugin_wall_clock() - request.arrival_time)
            for policy in self.plugin_policies:
                policy.added(request, self.plugin_clock() - age)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule one step with vLLM's own method, under the policies' plan."""
        if not self.plugin_policies:
            return super().schedule(*args, **kwargs)
        _, num_waiting = self.get_request_counts()
        plan = StepPlan(
            self.plugin_clock(),
            self.running,
            self.waiting,
            num_waiting,
            self.max_num_scheduled_tokens,
            self._plugin_can_admit,
        )
        for policy in self.plugin_policies:
            policy.plan(plan)
        if self._plugin_whole_media():
            fit_media(plan, self)
        with self._plugin_applied(plan):
            output = super().schedule(*args, **kwargs)
        step = Step(plan, output, plan.now)
        self.plugin_steps.append(step)
        for policy in self.plugin_policies:
            policy.scheduled(step)
            if output.finished_req_ids:
                policy.forget(output.finished_req_ids)
        return output

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, *args: Any, **kw: Any
    ) -> Any:
        """Choose the media items of a step with vLLM's own method, whole where a policy needs them.

        ``--disable-chunked-mm-input`` cuts a step before an item that does not fit into it, but not
        where the step would begin with that item or in its middle.
        """
        if self._plugin_whole_media():
            end = num_computed_tokens + num_new_tokens
            for feature in request.mm_features:
                place = feature.mm_position
                if place.offset < end < place.offset + place.length:
                    num_new_tokens = max(0, place.offset - num_computed_tokens)
        return super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, *args, **kw
        )

    def _plugin_whole_media(self) -> bool:
        return any(policy.whole_media for policy in self.plugin_policies)

    def _plugin_can_admit(self, request: Request) -> bool:
        taken = len(self.running) + self.num_waiting_for_streaming_input
        if taken >= min(getattr(self, name) for name in self.plugin_admission_limits):
            return False
        blocks = self.cache_config.num_gpu_blocks or 0
        free = (1.0 - self.get_kv_cache_usage()) * blocks * self.block_size
        # Every running request may need another block before the prompt is through.
        return bool(request.num_tokens + len(self.running) * self.block_size <= free)

    @contextmanager
    def _plugin_applied(self, plan: StepPlan) -> Iterator[None]:
        stock_tokens = self.max_num_scheduled_tokens
        stock_limits = [getattr(self, name) for name in self.plugin_admission_limits]
        order = self.running
        if plan.decode_first and plan.prefills:
            order = plan.decodes + plan.prefills
        self.running = [r for r in order if r not in plan.hidden] if plan.hidden else order
        self._plugin_limit_admissions(plan, stock_limits)
        self.max_num_scheduled_tokens = plan.token_budget
        try:
            yield
        finally:
            self.max_num_scheduled_tokens = stock_tokens
            for name, limit in zip(self.plugin_admission_limits, stock_limits, strict=True):
                setattr(self, name, limit)
            if plan.hidden:
                self.running = _put_back(self.running, order, plan.hidden)

    def _plugin_limit_admissions(self, plan: StepPlan, stock_limits: list[int]) -> None:
        """Lower the limits so that hidden requests keep their slots."""
        if not plan.hidden and plan.max_admissions is None:
            return
        for name, stock in zip(self.plugin_admission_limits, stock_limits, strict=True):
            limit = stock - len(plan.hidden)
            if plan.max_admissions is not None:
                taken = len(self.running) + self.num_waiting_for_streaming_input
                limit = min(limit, taken + plan.max_admissions)
            setattr(self, name, limit)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Process a step's result with vLLM's own method, then let the policies learn from it."""
        if not self.plugin_policies:
            return super().update_from_output(scheduler_output, model_runner_output)
        ran_until = self.plugin_clock()
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        step = self._plugin_take_step(scheduler_output)
        if step is not None:
            self._plugin_time(step, ran_until)
            step.reports = reports_of(model_runner_output)
            step.emitted = [
                item.request_id
                for client in outputs.values()
                for item in client.outputs
                if item.new_token_ids
            ]
            for policy in self.plugin_policies:
                policy.completed(step)
        return outputs

    def _plugin_take_step(self, output: SchedulerOutput) -> Step | None:
        # Results come back in the order in which steps were scheduled.
        while self.plugin_steps:
            step = self.plugin_steps.popleft()
            if step.output is output:
                return step
        return None

    def _plugin_time(self, step: Step, ran_until: float) -> None:
        """Attribute engine time to a step.

        Steps overlap when several are in flight: a step has the engine to itself from when it was
        scheduled or the one before it ended, whichever is later.
        """
        if step.output.total_num_scheduled_tokens > 0:
            step.duration = ran_until - max(step.scheduled_at, self.plugin_last_update)
        self.plugin_last_update = step.finished_at = ran_until


class SchedulerHost(_PolicyHost, Scheduler):
    """Host on the synchronous scheduler."""


class AsyncSchedulerHost(_PolicyHost, AsyncScheduler):
    """Host on the asynchronous scheduler, vLLM's default on CUDA."""


def _key_of(key: WaitingKey, request: Request) -> float:
    """Return a request's place in the order as far as its own tokens tell."""
    return key(request, prefill_left(request))


def _put_back(after: list[Request], before: list[Request], hidden: set[Request]) -> list[Request]:
    """Return the running list with hidden requests at their old places and new ones at the end."""
    survivors = set(after)
    kept = [request for request in before if request in survivors or request in hidden]
    known = set(kept)
    return kept + [request for request in after if request not in known]
