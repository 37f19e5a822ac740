"""An engine core whose executor only tells the time.

Follows ``EngineCore.step`` and ``step_with_batch_queue``: new requests and aborts are looked at
between steps, and with several steps in flight filling the queue goes before waiting for results.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_plugins.engine.cost_model import StepWork, chunk_work
from vllm_plugins.simulator.config import make_kv_cache
from vllm_plugins.simulator.records import RequestRecord, SimulatedRequest, StepRecord

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler

STOP_TOKEN = 0
_VOCABULARY = 500


class Observer(Protocol):
    """Looks at the scheduler around every call of ``schedule()``."""

    def before(self, engine: VirtualEngine) -> None:
        """The next step is about to be scheduled."""

    def after(self, engine: VirtualEngine, output: SchedulerOutput) -> None:
        """A step was scheduled."""


@dataclass
class _InFlight:
    """A step on its way through the pipeline, with the result that it will have."""

    output: SchedulerOutput
    result: ModelRunnerOutput
    finished_s: float


@dataclass(order=True)
class _Event:
    """Something that a client does at a time."""

    at_s: float
    sequence: int
    action: Callable[[], None] = field(compare=False)


class VirtualEngine:
    """One engine core in virtual time.

    Args:
        config: The engine's configuration.
        scheduler: Makes the scheduler: vLLM's own class, or the host's ``create_scheduler``.
        step_seconds: Time that a step takes through all pipeline stages.
        blocks: Blocks of the KV cache.
        in_flight: Steps in flight at once; by default what vLLM would use.
        runner: ``V2`` makes the scheduler behave as for that model runner.
        observer: Looks at every step.
    """

    def __init__(
        self,
        config: VllmConfig,
        scheduler: Callable[..., Scheduler],
        step_seconds: Callable[[StepWork], float],
        blocks: int = 4096,
        in_flight: int | None = None,
        runner: str = "V1",
        observer: Observer | None = None,
    ) -> None:
        self.now = 0.0
        self.config = config
        self.records: dict[str, RequestRecord] = {}
        self.steps: list[StepRecord] = []
        self._step_seconds = step_seconds
        self._observer = observer
        self._events: list[_Event] = []
        self._sequence = itertools.count()
        self._queue: deque[_InFlight] = deque()
        stages = config.parallel_config.pipeline_parallel_size
        self._stage_free = [0.0] * stages
        v2 = runner == "V2" and config.scheduler_config.async_scheduling
        self._depth = in_flight or (stages + 1 if v2 else config.max_concurrent_batches)
        self._aborts: list[tuple[float, str]] = []
        self.scheduler = self._make_scheduler(scheduler, blocks)
        self.scheduler.use_v2_model_runner = runner == "V2"

    def _make_scheduler(self, factory: Callable[..., Scheduler], blocks: int) -> Scheduler:
        kv_cache = make_kv_cache(self.config, blocks)
        block_size, hash_block_size = resolve_kv_cache_block_sizes(kv_cache, self.config)
        self._hasher = None
        if self.config.cache_config.enable_prefix_caching:
            hash_fn = get_hash_fn_by_name(self.config.cache_config.prefix_caching_hash_algo)
            init_none_hash(hash_fn)
            self._hasher = get_request_block_hasher(hash_block_size, hash_fn)
        scheduler = factory(
            vllm_config=self.config,
            kv_cache_config=kv_cache,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=block_size,
            hash_block_size=hash_block_size,
        )
        if hasattr(scheduler, "plugin_clock"):
            scheduler.plugin_clock = scheduler.plugin_wall_clock = lambda: self.now
        return scheduler

    def add(self, requests: Iterable[SimulatedRequest]) -> None:
        """Let requests arrive at their times."""
        for request in requests:
            self.at(request.arrival_s, partial(self._arrive, request))

    def at(self, at_s: float, action: Callable[[], None]) -> None:
        """Do something at a time, between two steps."""
        heapq.heappush(self._events, _Event(at_s, next(self._sequence), action))

    def abort(self, request_id: str, at_s: float = 0.0) -> None:
        """Give a request up at a time, as a client that hangs up does.

        It is heard between steps and before a step's result, and does nothing to a request that
        is not there.
        """
        heapq.heappush(self._aborts, (at_s, request_id))

    def _arrive(self, request: SimulatedRequest) -> None:
        params = SamplingParams(
            max_tokens=request.output_tokens,
            ignore_eos=True,
            stop_token_ids=[STOP_TOKEN],
            extra_args=dict(request.extra_args) if request.extra_args else None,
        )
        core_request = EngineCoreRequest(
            request_id=request.request_id,
            prompt_token_ids=list(request.prompt),
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=request.arrival_s,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            priority=request.priority,
        )
        self.records[request.request_id] = RequestRecord(request)
        self.scheduler.add_request(Request.from_engine_core_request(core_request, self._hasher))

    def run(self, until_s: float = float("inf"), max_steps: int = 10_000_000) -> None:
        """Run until nothing is left to do, or until a time or a number of steps.

        Raises:
            RuntimeError: Requests are left and nothing can ever move them.
        """
        idle = 0
        while self.now < until_s and len(self.steps) < max_steps:
            self._deliver()
            if not self._busy():
                if not self._events:
                    return
                self.now = max(self.now, self._events[0].at_s)
                continue
            rows = self.steps[-1].rows if self.step() else 1
            idle = 0 if rows or self._events else idle + 1
            if idle > 100:
                raise RuntimeError("requests are left and no step schedules any of them")

    def _busy(self) -> bool:
        return bool(self._queue) or self.scheduler.has_requests()

    def _deliver(self) -> None:
        while self._events and self._events[0].at_s <= self.now:
            heapq.heappop(self._events).action()
        self._process_aborts()

    def _process_aborts(self) -> None:
        due = []
        while self._aborts and self._aborts[0][0] <= self.now:
            due.append(heapq.heappop(self._aborts)[1])
        for request in self.scheduler.finish_requests(due, RequestStatus.FINISHED_ABORTED):
            record = self.records[request.request_id]
            record.aborted, record.finished_s = True, self.now

    def step(self) -> bool:
        """Do one turn of the engine core's loop; True if a step was scheduled."""
        scheduled = self.scheduler.has_requests()
        if scheduled:
            self._queue.append(self._schedule())
            rows = self.steps[-1].rows
            if len(self._queue) < self._depth and (rows or self.scheduler.has_requests()):
                return True
        self._finish(self._queue.popleft())
        return scheduled

    def _schedule(self) -> _InFlight:
        if self._observer:
            self._observer.before(self)
        output = self.scheduler.schedule()
        if self._observer:
            self._observer.after(self, output)
        work, decodes = self._account(output)
        finished = self._through_pipeline(self._step_seconds(work)) if work.rows else self.now
        self.steps.append(
            StepRecord(
                self.now,
                finished,
                dict(output.num_scheduled_tokens),
                output.total_num_scheduled_tokens,
                decodes,
                self._budget(),
            )
        )
        return _InFlight(output, self._sample(output), finished)

    def _budget(self) -> int:
        steps = getattr(self.scheduler, "plugin_steps", None)
        budget = steps[-1].plan.token_budget if steps else self.scheduler.max_num_scheduled_tokens
        return int(budget)

    def _through_pipeline(self, seconds: float) -> float:
        at, share = self.now, seconds / len(self._stage_free)
        for stage, free in enumerate(self._stage_free):
            at = self._stage_free[stage] = max(at, free) + share
        return at

    def _account(self, output: SchedulerOutput) -> tuple[StepWork, int]:
        """Record each request's part of a step and sum up what the step contains."""
        context = work = 0.0
        decodes = 0
        cached = output.scheduled_cached_reqs
        admitted = {r.req_id for r in output.scheduled_new_reqs} | set(cached.resumed_req_ids)
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[request_id]
            before = request.num_computed_tokens - tokens
            record = self.records[request_id]
            if request_id in admitted:
                record.admissions.append(len(record.chunks))
            record.chunks.append((before, tokens))
            record.scheduled_tokens += tokens
            if before >= request.num_prompt_tokens and request_id not in admitted:
                context += before
                decodes += 1
            else:
                work += chunk_work(tokens, before)
        rows = output.total_num_scheduled_tokens
        return StepWork(rows, len(output.num_scheduled_tokens), context, work), decodes

    def _sample(self, output: SchedulerOutput) -> ModelRunnerOutput:
        ids = list(output.num_scheduled_tokens)
        sampled = [self._token(self.scheduler.requests[request_id]) for request_id in ids]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
        )

    def _token(self, request: Request) -> list[int]:
        """The token that a step samples for a request: a function of the request and position."""
        # The scheduler has counted the step already: this is known only right after scheduling.
        if request.is_prefill_chunk:
            return []
        position = request.num_computed_tokens - request.num_prompt_tokens
        if self.records[request.request_id].request.stops_after == position + 1:
            return [STOP_TOKEN]
        return [1 + (7 * position + 13 * sum(request.prompt_token_ids[:4])) % _VOCABULARY]

    def _finish(self, step: _InFlight) -> None:
        self.now = max(self.now, step.finished_s)
        self._process_aborts()
        outputs = self.scheduler.update_from_output(step.output, step.result)
        for client in outputs.values():
            for item in client.outputs:
                self._hand_out(item)

    def _hand_out(self, item: Any) -> None:
        record = self.records[item.request_id]
        record.tokens += item.new_token_ids
        record.token_times += [self.now] * len(item.new_token_ids)
        if item.finish_reason is not None:
            record.finished_s = self.now

    @property
    def free_blocks(self) -> int:
        """Blocks of the KV cache that nobody holds."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())
