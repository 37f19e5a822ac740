"""Steps that compute nothing leave the core to the threads that move KV, and to the API server."""

import time
from types import SimpleNamespace

import pytest

from tests.pd_problem import ALL_HEADS, MODEL, OLD, PROMPT, Reader, Writer, part
from vllm_plugins.kv_connectors.pd import worker


class Pulling(SimpleNamespace):
    def await_one(self, seconds):
        self.rests.append(seconds)


@pytest.mark.parametrize(
    ("pulls", "keeps", "rests"),
    [(True, 0, 1), (True, 1, 1), (False, 1, 1), (None, 1, 1), (False, 0, 0), (None, 0, 0),
     (True, None, 1), (False, None, 0)],
)  # fmt: skip
def test_it_rests_only_while_a_prompt_is_pulled_or_kept(monkeypatch, pulls, keeps, rests):
    """None: the instance does not pull, or does not keep any, at all."""
    rested = []
    monkeypatch.setattr(worker.time, "sleep", rested.append)
    made = object.__new__(worker.Worker)
    made._pulling = None if pulls is None else Pulling(is_busy=pulls, rests=rested)
    made._serving = None if keeps is None else SimpleNamespace(outbox=[None] * keeps)
    made.rest()
    assert rested == [worker.IDLE_STEP_S] * rests


def test_the_end_of_a_pull_ends_the_rest(ends):
    writer, reader = Writer(part(MODEL, ALL_HEADS)), Reader(part(OLD, ALL_HEADS))
    ends += [writer, reader]
    writer.hold(PROMPT)
    reader.pull(PROMPT, peers=[writer.peer()])
    start = time.monotonic()
    reader.worker.await_one(60.0)
    assert time.monotonic() - start < 30
    assert reader.wait(1) == set()
    # What was returned does not keep a later step from resting.
    start = time.monotonic()
    reader.worker.await_one(0.05)
    assert time.monotonic() - start >= 0.05
