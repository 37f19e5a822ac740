"""KVShare beside the scheduler plug-ins: each does its part, and the neutral setting is stock."""

import pytest

import vllm_plugins
from tests.engine.kvshare_engine import (
    DOCS,
    ENGINE,
    NEUTRAL,
    PROMPTS,
    Served,
    assert_stock,
    prompt,
)
from tests.models import make_engine, tiny_llama
from vllm_plugins.registry import enable
from vllm_plugins.settings import KEY, PluginSettings
from vllm_plugins.spec import parse_specs

pytestmark = pytest.mark.engine

BUDGET = 64
SARATHI = f"sarathi:token_budget={BUDGET}"
BESIDE = {
    "sarathi": (NEUTRAL, SARATHI),
    "spf": (NEUTRAL, "spf:gamma=0"),
    "sarathi+spf": (NEUTRAL, SARATHI, "spf:gamma=0"),
    "hit-rate+sarathi": (f"{NEUTRAL},order=hit_rate", SARATHI),
    "hit-rate+spf": (f"{NEUTRAL},order=hit_rate", "spf:gamma=0"),
    "hit-rate+sarathi+spf": (f"{NEUTRAL},order=hit_rate", SARATHI, "spf:gamma=0"),
}


@pytest.fixture(scope="module")
def engine(stock):
    """One engine with all three; a test chooses whose policies run."""
    arguments = vllm_plugins.engine_args(*BESIDE["sarathi+spf"])
    with make_engine(tiny_llama(layers=4), **ENGINE, **arguments) as llm:
        yield Served(llm)


def use(engine, specs):
    """Turn policies on in the running, empty scheduler, as its constructor would."""
    from vllm.v1.core.sched.request_queue import create_request_queue

    scheduler = engine.scheduler
    assert not scheduler.running
    assert not scheduler.waiting
    scheduler.vllm_config.additional_config = {KEY: PluginSettings.of(enable(parse_specs(specs)))}
    scheduler.waiting = create_request_queue(scheduler.policy)
    scheduler.plugin_policies = scheduler._plugin_load_policies()
    assert len(scheduler.plugin_policies) == len(specs)


@pytest.fixture
def steps(engine, monkeypatch):
    """The tokens of each step, and the prompt lengths in order of admission."""
    tokens, admitted, stock = [], [], engine.scheduler.schedule

    def schedule(*args, **kwargs):
        output = stock(*args, **kwargs)
        tokens.append(output.total_num_scheduled_tokens)
        admitted.extend(len(new.prompt_token_ids) for new in output.scheduled_new_reqs)
        return output

    monkeypatch.setattr(engine.scheduler, "schedule", schedule)
    return tokens, admitted


@pytest.mark.parametrize("specs", BESIDE.values(), ids=BESIDE)
def test_reuse_beside_policies_gives_stocks_answers(engine, steps, stock, specs):
    engine.forget()
    use(engine, specs)
    # Only the documents, so that each prompt of the batch reuses and none is stored itself before.
    engine.greedy([prompt(0, 1, 2, 3, 4)])
    tokens, admitted = steps
    tokens.clear(), admitted.clear()
    outputs = engine.greedy(PROMPTS)
    assert_stock(outputs, stock)
    reused = [output.num_cached_tokens for output in outputs]
    assert all(count > 0.5 * len(DOCS[0]) for count in reused)
    if SARATHI in specs:
        assert 1 < max(tokens) <= BUDGET
    assert len(admitted) == len(PROMPTS)
    if "spf:gamma=0" in specs:
        # Those after it start when what they reuse is put together.
        assert admitted[0] == min(map(len, PROMPTS)) < len(PROMPTS[0])
    engine.assert_idle()


@pytest.mark.parametrize("hit_rate", [False, True])
def test_beside_spf_reuse_makes_a_long_prompt_a_short_one(stock, hit_rate):
    """What is exact leaves nothing to compute: the longest prompt is then the shortest."""
    order = "hit_rate" if hit_rate else "arrival"
    spec = f"kvshare:mode=exact_only,order={order}"
    arguments = vllm_plugins.engine_args(spec, "spf:gamma=0")
    small = ENGINE | {"max_num_seqs": 1}
    with make_engine(tiny_llama(layers=4), **small, **arguments) as llm:
        engine = Served(llm)
        known = prompt(0, 1, 2, 3)
        engine.greedy([known])
        # Only the store knows it from here on.
        assert engine.llm.reset_prefix_cache()
        asked, promise = [], engine.side.promise
        engine.side.promise = lambda r, n: asked.append(r.num_tokens) or promise(r, n)
        engine.add(list(range(200)))
        engine.engine.step()
        short, long = list(range(100, 250)), [*known, 5]
        engine.add(short)
        engine.add(long)
        while engine.engine.has_unfinished_requests():
            engine.engine.step()
        order = list(dict.fromkeys(asked))[1:]
        assert order == [len(text) for text in ((long, short) if hit_rate else (short, long))]
        engine.assert_idle()
