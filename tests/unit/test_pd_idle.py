"""Steps that compute nothing leave the cores to others, and idle connections are closed."""

import time
from types import SimpleNamespace

import pytest

from tests.pd_problem import ALL_HEADS, MODEL, OLD, PROMPT, TIMEOUT_S, Reader, Writer, part
from tests.unit.wire_ends import SECRET, wait_until
from vllm_plugins.kv_connectors.pd import peers, worker
from vllm_plugins.kv_connectors.pd.peers import PeerConnections
from vllm_plugins.kv_connectors.pd.protocol import Kind


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


def test_idle_connections_are_closed_although_nobody_asks_again(ends, monkeypatch):
    monkeypatch.setattr(peers, "IDLE_S", 1.0)
    writer, connections = Writer(part(MODEL, ALL_HEADS)), PeerConnections(SECRET, 0.5, TIMEOUT_S)
    ends += [writer, connections]
    named = {"generation": writer.peer().generation}
    with connections.to(writer.peer()) as one, connections.to(writer.peer()) as other:
        one.request(Kind.DESCRIBE, named)
        other.request(Kind.DESCRIBE, named)
    assert writer.left == 0
    wait_until(lambda: writer.left == 2)
    wait_until(lambda: not connections._idle and connections._sweeper is None)
