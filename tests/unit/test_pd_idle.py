"""Steps that compute nothing leave the core to the threads that move KV."""

from types import SimpleNamespace

import pytest

from vllm_plugins.kv_connectors.pd import worker


@pytest.mark.parametrize(
    ("pulling", "rests"),
    [(SimpleNamespace(is_busy=True), 1), (SimpleNamespace(is_busy=False), 0), (None, 0)],
)
def test_it_rests_only_while_a_prompt_is_pulled(monkeypatch, pulling, rests):
    slept = []
    monkeypatch.setattr(worker.time, "sleep", slept.append)
    made = object.__new__(worker.Worker)
    made._pulling = pulling
    made.rest()
    assert slept == [worker.IDLE_STEP_S] * rests
