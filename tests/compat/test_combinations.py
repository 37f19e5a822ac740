"""Every pair of plug-ins is decided: refused with a reason, or it works on the real engine."""

import itertools
from pathlib import Path

import pytest
from drafter import random_drafter
from vision import tiny_llava

from tests.models import make_engine, scheduler_of, tiny_llama, worker_of
from tests.unit.fake_plugins import offer
from vllm_plugins import engine_args
from vllm_plugins.compat import combinations, trials
from vllm_plugins.compat.combinations import Pair, decide, decide_all, names_of, own_plugins
from vllm_plugins.plugin import SCHEDULER_HOST, SchedulerPlugin, WorkerPlugin
from vllm_plugins.registry import load

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = [pair for pair in decide_all() if not pair.refusal]
PROMPT = [8 + (7 * i) % 50 for i in range(150)]


@pytest.fixture(scope="module", autouse=True)
def _drafter() -> None:
    """Make what plug-ins that draft are tried with."""
    assert str(random_drafter(tiny_llava(), (4, 4))) == trials.DRAFTER


def test_the_page_is_current_and_has_every_pair():
    text = (ROOT / combinations.PAGE).read_text()
    assert text == combinations.page(), "run `python -m vllm_plugins.compat.combinations`"
    for pair in itertools.combinations(own_plugins(), 2):
        assert f"| {' + '.join(pair)} |" in text


def test_own_plugins_are_those_of_this_distribution(monkeypatch):
    offer(monkeypatch, loner="LonerPlugin")
    assert "loner" not in own_plugins()
    assert {"sarathi", "spf"} <= set(own_plugins())


def test_a_declared_conflict_is_a_refusal_in_either_order(monkeypatch):
    offer(monkeypatch, loner="LonerPlugin")
    for names in (("loner", "sarathi"), ("sarathi", "loner")):
        assert decide(*names).refusal == "cannot run beside 'sarathi' (both own the step)"


def test_two_owners_of_one_argument_are_a_refusal(monkeypatch):
    offer(monkeypatch, setter="SchedulerSetter")
    assert "sets --scheduler-cls" in decide("spf", "setter").refusal


def test_a_key_names_its_pair():
    assert names_of(Pair(("kvshare", "spf")).key) == ["kvshare", "spf"]


def test_options_that_exclude_one_another_are_found():
    pair = decide("sarathi", "spf")
    assert pair.refusal == ""
    assert any("`sarathi:order=least_slack` orders the wait" in o for o in pair.refused_options)
    assert not any("order=fcfs" in option for option in pair.refused_options)


def test_rows_say_refused_or_works():
    refused, works = Pair(("a", "b"), "both own the step"), Pair(("a", "c"))
    page = combinations.page([refused, works])
    assert page.endswith("| a + b | refused | both own the step |\n| a + c | works |  |\n")


def greedy(*names: str, vision: bool = False) -> list[int]:
    from vllm import SamplingParams

    limits = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "max_model_len": 1024}
    plugins = engine_args(*map(trials.flag_word, names))
    arguments = {**plugins, **trials.exact_with(names), **limits}
    # KVShare's default check layer needs more layers than the smallest model has.
    vision = vision or trials.needs_vision(names)
    model = tiny_llava(layers=4) if vision else tiny_llama(layers=4)
    with make_engine(model, **arguments) as llm:
        for kind, owner, attribute in (
            (SchedulerPlugin, scheduler_of(llm), "plugin_policies"),
            (WorkerPlugin, worker_of(llm), "plugin_listeners"),
        ):
            wanted = sum(isinstance(load(name), kind) for name in names)
            if kind is SchedulerPlugin and not hosted(llm):
                # A plug-in with a policy may need none with the options that it is tried with.
                wanted = 0
            assert len(getattr(owner, attribute, ())) == wanted
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        (result,) = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
        return list(result.outputs[0].token_ids)


def hosted(llm) -> bool:
    return llm.llm_engine.vllm_config.scheduler_config.scheduler_cls == SCHEDULER_HOST


@pytest.fixture(scope="module")
def stock() -> dict[bool, list[int]]:
    """Stock vLLM's answers of the model that reads text, and of that which reads images too."""
    return {vision: greedy(vision=vision) for vision in (False, True)}


@pytest.mark.engine
@pytest.mark.parametrize("pair", ALLOWED, ids=lambda pair: pair.key)
def test_every_pair_that_is_not_refused_works(pair, stock):
    assert greedy(*pair.names) == stock[trials.needs_vision(pair.names)]
