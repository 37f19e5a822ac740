"""Greedy outputs under every budget and order are stock's, and no KV block is lost."""

import itertools
from contextlib import contextmanager

import pytest

import vllm_plugins
from tests.models import make_engine, scheduler_of
from vllm_plugins.registry import enable
from vllm_plugins.settings import KEY, PluginSettings
from vllm_plugins.spec import parse_specs

pytestmark = pytest.mark.engine

BLOCKS = 16
ENGINE = {
    "max_num_batched_tokens": 256,
    "max_num_seqs": 8,
    "max_model_len": 400,
    "block_size": 32,
    "num_gpu_blocks_override": BLOCKS,
}
BUDGETS = {
    "32": "sarathi:token_budget=32,min_budget=1",
    "64": "sarathi:token_budget=64",
    "96": "sarathi:token_budget=96,tile=32",
    "200": "sarathi:token_budget=200",
    "varying": "sarathi:tbt_slo_ms=4,min_budget=1",
    "slack": "sarathi:tbt_slo_ms=4,min_budget=1,budget_mode=slack",
    "decode-maximal": "sarathi:token_budget=64,max_prefills_per_step=1",
    "stock-order": "sarathi:token_budget=64,decode_first=false",
    "least-slack": "sarathi:token_budget=64,ttft_slo_ms=50,max_wait_ms=200",
}

SPF = "spf:gamma=15"
# Only one plug-in can order the queue.
CASES = [pytest.param(name, (), id=name) for name in BUDGETS]
CASES += [pytest.param(name, (SPF,), id=f"{name}+spf") for name in BUDGETS if name != "least-slack"]


def prompts() -> list[list[int]]:
    """One token, shorter and longer than every budget, and pairs that share a prefix."""
    lengths = (1, 5, 33, 64, 97, 130, 290, 300, 16)
    made = [[(11 * i + 3 * j * (i + 1)) % 500 for j in range(n)] for i, n in enumerate(lengths)]
    return [*made, [*made[6][:250], 1, 2, 3], made[7][:128], made[3]]


class Run:
    """An engine whose scheduler gets new policies for each workload."""

    def __init__(self, llm) -> None:
        self.llm = llm
        self.scheduler = scheduler_of(llm)
        self.free = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def greedy(self, rounds: int = 1) -> list[list[int]]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts()] * rounds
        results = self.llm.generate(inputs, params, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]

    def use(self, *specs: str) -> None:
        """Turn plug-ins on in the running, empty scheduler, as its constructor would."""
        from vllm.v1.core.sched.request_queue import create_request_queue

        scheduler = self.scheduler
        assert not scheduler.running
        assert not scheduler.waiting
        settings = PluginSettings.of(enable(parse_specs(specs)))
        scheduler.vllm_config.additional_config = {KEY: settings}
        scheduler.waiting = create_request_queue(scheduler.policy)
        scheduler.plugin_policies = scheduler._plugin_load_policies()

    @contextmanager
    def recorded(self):
        """Record each step's tokens and preemptions, and the prompt lengths in admission order."""
        steps, preempted, admitted = [], [], {}
        scheduler, stock = self.scheduler, self.scheduler.schedule

        def schedule(*args, **kwargs):
            output = stock(*args, **kwargs)
            steps.append(output.total_num_scheduled_tokens)
            preempted.append(len(output.preempted_req_ids or ()))
            for new in output.scheduled_new_reqs:
                # Model runner V2 is told of a resumed request as of a new one.
                admitted.setdefault(new.req_id, len(new.prompt_token_ids))
            return output

        scheduler.schedule = schedule
        try:
            yield steps, preempted, admitted
        finally:
            del scheduler.schedule

    def assert_no_block_is_lost(self) -> None:
        self.llm.llm_engine.engine_core.get_output()
        assert not self.scheduler.running
        assert not self.scheduler.requests
        assert self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == self.free


@pytest.fixture(scope="module", params=[True, False], ids=["prefix-caching", "no-prefix-caching"])
def engines(request, tiny_llama):
    """Stock's outputs, and an engine with the scheduler host."""
    arguments = ENGINE | {"enable_prefix_caching": request.param}
    with make_engine(tiny_llama, **arguments) as llm:
        expected = Run(llm).greedy()
    with make_engine(tiny_llama, **arguments, **vllm_plugins.engine_args("sarathi")) as llm:
        yield expected, Run(llm)


@pytest.mark.parametrize(("budget", "others"), CASES)
def test_outputs_are_stocks(engines, budget, others):
    expected, run = engines
    run.use(BUDGETS[budget], *others)
    run.scheduler.reset_prefix_cache()
    with run.recorded() as (steps, preempted, _):
        assert run.greedy() == expected
    run.assert_no_block_is_lost()
    # Without these the comparison would hold for a plug-in that does nothing.
    if budget.isdecimal():
        assert max(steps) == int(budget)
    else:
        assert max(steps) <= ENGINE["max_num_batched_tokens"]
    assert sum(preempted) > 0


def test_spf_alone(engines):
    expected, run = engines
    run.use("spf:gamma=0")
    run.scheduler.reset_prefix_cache()
    with run.recorded() as (_, _, admitted):
        assert run.greedy() == expected
    lengths = list(admitted.values())
    assert lengths == sorted(lengths)
    assert lengths != [len(prompt) for prompt in prompts()]
    run.assert_no_block_is_lost()


def test_budgets_vary_under_a_target(engines):
    _, run = engines
    run.use(BUDGETS["varying"])
    with run.recorded() as (steps, _, _):
        run.greedy(rounds=2)
    assert len(set(steps)) >= 5


def test_a_cached_prefix_changes_no_output(engines):
    """The second round finds its prompts in the cache, where there is one."""
    expected, run = engines
    run.use("sarathi:token_budget=64", "spf")
    assert run.greedy(rounds=2) == expected * 2
    run.assert_no_block_is_lost()


def test_aborts_in_the_middle_lose_no_block(engines):
    from vllm import SamplingParams

    expected, run = engines
    run.use("sarathi:token_budget=32,min_budget=1", "spf")
    engine = run.llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    for i, prompt in enumerate(prompts()):
        engine.add_request(f"abort-{i}", {"prompt_token_ids": prompt}, params)
    for i, _ in itertools.product(range(len(prompts())), range(2)):
        engine.step()
        engine.abort_request([f"abort-{i}"])
    while engine.has_unfinished_requests():
        engine.step()
    assert run.greedy() == expected
    run.assert_no_block_is_lost()
