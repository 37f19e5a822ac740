"""Simulated engines for tests: workloads from seeds, and the invariants of a step."""

import itertools
import random
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vllm_plugins.engine.cost_model import StepCostModel, StepWork
from vllm_plugins.engine.cost_profile import CostProfile, profile_key
from vllm_plugins.engine.scheduler_host import create_scheduler
from vllm_plugins.simulator.config import make_config, write_model_config
from vllm_plugins.simulator.engine import STOP_TOKEN, VirtualEngine
from vllm_plugins.simulator.records import RequestRecord, SimulatedRequest

_FOLDER = tempfile.TemporaryDirectory(prefix="simulated-model-")
# 10 ms a step, 0.1 ms a row, a little for what attention reads: a mid-sized model's proportions.
MACHINE = StepCostModel((0.01, 1e-4, 0.0, 1e-5, 1e-7, 1e-9))


@cache
def config(*plugins: str, **arguments: Any) -> VllmConfig:
    """One configuration per set of arguments; schedulers are what tests build anew."""
    defaults = {"max_num_seqs": 16, "max_num_batched_tokens": 256, "block_size": 16}
    folder = write_model_config(Path(_FOLDER.name))
    return make_config(folder, *plugins, **defaults | arguments)


def engine(
    *plugins: str,
    stock: bool = False,
    blocks: int = 4096,
    step_seconds: Callable[[StepWork], float] = MACHINE.seconds,
    runner: str = "V1",
    observer: Any = None,
    **arguments: Any,
) -> VirtualEngine:
    """A simulated engine: of vLLM's own class, or of the host with these plug-ins."""
    made = config(*plugins, **arguments)
    own = AsyncScheduler if made.scheduler_config.async_scheduling else Scheduler
    factory = own if stock else create_scheduler
    return VirtualEngine(made, factory, step_seconds, blocks, runner=runner, observer=observer)


def profile_file(model: StepCostModel = MACHINE, **arguments: Any) -> Path:
    """A cost profile of the simulated machine that is valid for the test configuration."""
    file = Path(_FOLDER.name) / f"profile-{abs(hash((model, *arguments.items())))}.json"
    key = profile_key(config(**arguments))
    file.write_text(
        CostProfile(
            key=key, coefficients=model.coefficients, knee=None, tile=model.tile
        ).model_dump_json()
    )
    return file


def request(name: str, arrival: float, prompt: int, output: int, **fields: Any) -> SimulatedRequest:
    """A request whose prompt shares nothing with the others'."""
    source = random.Random(name)
    return SimulatedRequest(
        name, arrival, tuple(source.randrange(1, 500) for _ in range(prompt)), output, **fields
    )


def mixed_workload(
    seed: int, count: int, longest: int = 900, rate: float = 40.0
) -> list[SimulatedRequest]:
    """Short and long prompts, shared prefixes, priorities, early stops; arrivals in bursts."""
    source = random.Random(seed)
    shared = [tuple(source.randrange(1, 500) for _ in range(200)) for _ in range(2)]
    arrival, requests = 0.0, []
    for i in range(count):
        if source.random() < 0.7:
            arrival += source.expovariate(rate)
        prefix = source.choice(shared)[: source.randrange(200)] if source.random() < 0.4 else ()
        length = source.choice([source.randrange(1, 40), source.randrange(1, longest)])
        own = tuple(source.randrange(1, 500) for _ in range(length))
        requests.append(
            SimulatedRequest(
                f"{i}",
                arrival,
                prefix + own,
                source.choice([source.randrange(1, 12), source.randrange(1, 150)]),
                stops_after=source.choice([None, None, None, source.randrange(1, 20)]),
                priority=source.randrange(3),
            )
        )
    return requests


def abort_some(simulated: VirtualEngine, seed: int, requests: Iterable[SimulatedRequest]) -> None:
    """Abort a fifth of the requests, at any time of their lives."""
    source = random.Random(seed)
    for item in requests:
        if source.random() < 0.2:
            simulated.abort(item.request_id, item.arrival_s + source.expovariate(1.0))


def is_runnable(scheduler: Scheduler, item: Request) -> bool:
    """Whether the next step could compute a token of a decode, by the conditions of vLLM 0.32."""
    placeholders = item.num_output_placeholders
    finishing = placeholders > 0 and (
        item.num_computed_tokens + 2 - placeholders >= item.num_prompt_tokens + item.max_tokens
    )
    known = item.num_tokens_with_spec + placeholders
    eligible = scheduler.current_step + 1 >= item.next_decode_eligible_step
    return known > item.num_computed_tokens and not finishing and eligible


class Invariants:
    """Checks every step against section 7 of the Sarathi note.

    Args:
        decode_first: Whether decodes must come before everything else.
        single_prefill: Whether at most one request may have more than one row.
        tile: Rows of a step with an unfinished prompt are a multiple of this.
        strict: Whether no decode may be left out where blocks run short.
    """

    def __init__(
        self, decode_first=False, single_prefill=False, tile: int = 1, strict: bool = True
    ) -> None:
        self.decode_first, self.single_prefill = decode_first, single_prefill
        self.tile, self.strict = tile, strict
        self.prefill_steps = 0

    def before(self, simulated: VirtualEngine) -> None:
        running = simulated.scheduler.running
        self.decodes = [r for r in running if not r.is_prefill_chunk]
        self.runnable = [r for r in self.decodes if is_runnable(simulated.scheduler, r)]
        self.limits = _limits(simulated.scheduler)

    def after(self, simulated: VirtualEngine, output: SchedulerOutput) -> None:
        scheduler, ran = simulated.scheduler, output.num_scheduled_tokens
        assert _limits(scheduler) == self.limits
        steps = getattr(scheduler, "plugin_steps", ())
        plan = steps[-1].plan if steps else None
        budget = plan.token_budget if plan else scheduler.max_num_scheduled_tokens
        rows = output.total_num_scheduled_tokens
        assert rows == sum(ran.values()) <= budget <= scheduler.max_num_scheduled_tokens
        preempted = [r for r in self.decodes if r.status == RequestStatus.PREEMPTED]
        hidden = plan.hidden if plan else set()
        if self.strict or not preempted:
            for decode in self.runnable:
                assert decode.request_id in ran or decode in hidden or decode in preempted
        self._check_prefills(scheduler, ran, rows, budget)

    def _check_prefills(
        self, scheduler: Scheduler, ran: dict[str, int], rows: int, budget: int
    ) -> None:
        decodes = {r.request_id for r in self.decodes}
        if self.decode_first:
            kinds = [request_id in decodes for request_id in ran]
            assert kinds == sorted(kinds, reverse=True)
        if self.single_prefill:
            assert sum(tokens > 1 for tokens in ran.values()) <= 1
        unfinished = [i for i in ran if scheduler.requests[i].is_prefill_chunk]
        self.prefill_steps += bool(unfinished)
        if unfinished:
            assert rows == budget
            assert rows % self.tile == 0


def _limits(scheduler: Scheduler) -> tuple[int, ...]:
    names = ("max_num_scheduled_tokens", "max_num_running_reqs", "max_num_active_reqs")
    return tuple(getattr(scheduler, name) for name in names if hasattr(scheduler, name))


def check_conservation(simulated: VirtualEngine, free_before: int) -> None:
    """Every token computed exactly once per admission, every answer right, every block free."""
    assert simulated.free_blocks == free_before
    assert not simulated.scheduler.requests
    assert not simulated.scheduler.running
    for record in simulated.records.values():
        _check_chunks(record, simulated)
        _check_tokens(record)


def _check_chunks(record: RequestRecord, simulated: VirtualEngine) -> None:
    assert record.scheduled_tokens == sum(tokens for _, tokens in record.chunks)
    bounds = [*record.admissions, len(record.chunks)]
    block = simulated.config.cache_config.block_size
    end = 0
    for first, last in itertools.pairwise(bounds):
        end, _ = record.chunks[first]
        assert end % block == 0
        for context, tokens in record.chunks[first:last]:
            assert context == end
            end = context + tokens
    if record.aborted or not record.chunks:
        return
    needed = len(record.request.prompt) + len(record.tokens) - 1
    # A step in flight cannot know yet that the one before it ended the answer.
    stopped = record.request.stops_after is not None
    in_flight = simulated.config.scheduler_config.async_scheduling and stopped
    assert needed <= end <= needed + in_flight


def _check_tokens(record: RequestRecord) -> None:
    item = record.request
    expected = min(item.output_tokens, item.stops_after or item.output_tokens)
    if record.aborted:
        assert len(record.tokens) <= expected
        return
    assert record.finished_s is not None
    assert len(record.tokens) == expected
    base = 13 * sum(item.prompt[:4])
    wanted = [1 + (7 * position + base) % 500 for position in range(expected)]
    if item.stops_after == expected:
        wanted[-1] = STOP_TOKEN
    assert record.tokens == wanted
