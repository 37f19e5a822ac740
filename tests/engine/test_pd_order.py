"""Who starts when on both sides of a hand-over: in order of arrival, and nobody starves."""

import random

import pytest

from tests.pd_virtual import BLOCK, Handover
from vllm_plugins.simulator.records import SimulatedRequest

# At most 19 blocks, of prompts that started or wait to be pulled.
CAP = 0.3
SHORT, LONG, BEYOND = 3 * BLOCK, 19 * BLOCK, 25 * BLOCK


def made(name: str, at_s: float, length: int, output_tokens: int = 4) -> SimulatedRequest:
    draw = random.Random(name)
    prompt = [draw.randrange(1, 400) for _ in range(length)]
    return SimulatedRequest(name, at_s, prompt, output_tokens)


def stream(long: int) -> list[SimulatedRequest]:
    """A long prompt among short ones that come faster than they are pulled."""
    wanted = [made(f"short{i}", 0.01 * i, SHORT) for i in range(60)]
    return [*wanted[:5], made("long", 0.045, long), *wanted[5:]]


@pytest.fixture
def handover(tmp_path):
    return Handover(tmp_path, pull_s=0.1, threshold=0.05, held=CAP)


@pytest.mark.parametrize("long", [LONG, BEYOND], ids=["fits the cap", "exceeds it"])
def test_a_long_prompt_is_not_overtaken(handover, long):
    wanted = stream(long)
    for request in wanted:
        handover.add(request)
    handover.run()
    handover.check_empty()
    assert handover.arrived == [request.request_id for request in wanted]


def test_a_waiting_head_that_is_given_up_holds_nobody_up(handover):
    wanted = stream(BEYOND)
    for request in wanted:
        handover.add(request)
    handover.prefill.abort("long", 0.2)
    handover.run()
    handover.check_empty()
    assert handover.arrived == [r.request_id for r in wanted if r.request_id != "long"]


def test_a_preempted_prompt_starts_again(handover, tmp_path):
    """Its own blocks do not stand against it, though twice as many exceed the cap."""
    handover = Handover(tmp_path, pull_s=0.0, threshold=1.0, held=0.8)
    # Ten answers take a block more each while the long prompt is in the middle.
    handover.prefill.add([made(f"answer{i}", 0.0, BLOCK, 60) for i in range(10)])
    handover.add(made("long", 0.06, 40 * BLOCK))
    handover.add(made("short", 0.07, SHORT))
    handover.run()
    handover.check_empty()
    record = handover.prefill.records["long"]
    assert len(record.admissions) > 1, "it was not preempted"
    assert sorted(handover.arrived) == ["long", "short"]


def test_what_is_not_handed_over_does_not_wait(handover):
    for request in stream(LONG):
        handover.add(request)
    handover.prefill.add([made("plain", 0.05, SHORT)])
    handover.run()
    handover.check_empty()
    plain, long = (handover.prefill.records[name] for name in ("plain", "long"))
    assert plain.first_token_s < long.first_token_s


def test_a_batch_counts_the_prompts_that_may_start(tmp_path):
    """What waits for room is not in the batch, and brings no other prompts into it.

    The other instance has both roles and forms batches too: what it pulled starts nevertheless.
    """
    batch = 8 * BLOCK
    handover = Handover(tmp_path, pull_s=0.2, threshold=0.05, held=CAP, batch=batch)
    for request in stream(LONG):
        handover.add(request)
    handover.prefill.add([made(f"plain{i}", 0.1, 6 * BLOCK, 1) for i in range(6)])
    handover.run()
    handover.check_empty()
    assert sorted(handover.accepted) == sorted(request.request_id for request in stream(LONG))
    for step in handover.prefill.steps:
        assert step.rows <= batch or len(step.num_scheduled_tokens) == 1


def test_a_prompt_that_is_computed_in_any_case_holds_no_pull_up(tmp_path):
    """As with prompt_logprobs, for which vLLM takes nothing from a connector."""
    handover = Handover(tmp_path, pull_s=0.01, threshold=1.0)
    handover.decode.uncached.add("whole")
    handover.add(made("whole", 0.0, LONG, 300))
    behind = [made(f"behind{i}", 0.01 + 0.01 * i, LONG) for i in range(4)]
    for request in behind:
        handover.add(request)
    handover.run()
    handover.check_empty()
    assert handover.accepted == [request.request_id for request in behind]
    records = handover.decode.records
    assert all(records[r.request_id].finished_s < records["whole"].finished_s for r in behind)
