"""EPD with the engine that prefills on model runner V2.

The one that encodes stays on V1: V2 has a runner of its own for it, which vLLM's GPU worker makes
and its CPU worker does not.
"""

from contextlib import ExitStack

import pytest

from tests.engine.test_epd import (
    CASES,
    colocated,
    idle,
    prefill,
    test_a_lost_item_fails_its_request_and_leaves_the_engine_alive,
    test_a_preempted_request_finds_its_items_again,
)
from tests.epd_engine import encode_engine

assert colocated and idle and prefill
assert test_a_lost_item_fails_its_request_and_leaves_the_engine_alive
assert test_a_preempted_request_finds_its_items_again


@pytest.fixture(scope="module")
def encoder():
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
            started = stack.enter_context(encode_engine())
        yield started


def test_tokens_are_those_of_one_engine(idle, encoder, colocated):
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from tests.models import worker_of

    assert isinstance(worker_of(idle.llm).model_runner, GPUModelRunner)
    for case in CASES:
        assert idle.greedy(case, encoder.encode(case)) == colocated[tuple(case)], case
    assert idle.counter.items == 0
