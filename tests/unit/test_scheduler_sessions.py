"""Streaming sessions, whose turns come under one name: what schedulers measure of them."""

from types import SimpleNamespace

import pytest

from vllm_plugins.schedulers.sarathi.latency import LatencyLedger
from vllm_plugins.schedulers.sarathi.targets import Targets
from vllm_plugins.schedulers.spf.policy import BYPASSES, SpfPolicy


def turn(name="session", **targets):
    params = SimpleNamespace(extra_args=targets or None)
    return SimpleNamespace(request_id=name, sampling_params=params, resumable=True)


class Ledger(LatencyLedger):
    """A ledger of one session, with what vLLM does to its request."""

    def __init__(self):
        super().__init__(Targets(ttft=0.5, tbt=0.1))
        self.request, self.updates = turn(), []
        self.add(self.request, 0.0)

    def send(self, arrived, **targets):
        self.updates.append(turn(**targets))
        self.add(self.updates[-1], arrived)
        self.follow_sessions()

    def begin(self):
        self.request.sampling_params = self.updates.pop(0).sampling_params
        self.follow_sessions()


def test_the_pause_between_two_turns_is_no_miss():
    ledger = Ledger()
    assert ledger.emitted(["session"], 0.25) == (0, 0)
    ledger.send(10.0)
    ledger.begin()
    assert ledger.least_slack([turn()], 10.25) == pytest.approx(0.1)
    assert ledger.emitted(["session"], 10.25) == (0, 0)
    assert ledger.emitted(["session"], 10.5) == (0, 1)


def test_each_turn_has_a_first_token_and_waits_from_its_own_arrival():
    ledger = Ledger()
    # It does not make the turn before it younger, which waits still.
    ledger.send(0.75)
    assert ledger.emitted(["session"], 1.0) == (1, 0)
    ledger.begin()
    assert ledger.emitted(["session"], 1.5) == (1, 0)


def test_each_turn_has_its_own_targets():
    ledger = Ledger()
    ledger.send(1.0, tbt_slo_ms=1000)
    ledger.send(2.0)
    seen = [ledger.targets("session").tbt]
    for _ in range(2):
        ledger.begin()
        seen.append(ledger.targets("session").tbt)
    assert seen == [0.1, 1.0, 0.1]
    ledger.forget(["session"])
    ledger.add(turn(), 3.0)
    assert ledger.arrived("session") == 3.0


def test_a_turn_that_is_queued_is_not_passed_by():
    counted = []
    policy = SpfPolicy(gamma=15.0)
    policy.bind(None, SimpleNamespace(inc=counted.append))

    def schedule(name):
        output = SimpleNamespace(scheduled_new_reqs=[SimpleNamespace(req_id=name)])
        policy.scheduled(SimpleNamespace(output=output))

    policy.added(turn(), 0.0)
    schedule("session")
    policy.added(turn(), 1.0)
    policy.added(turn("other"), 2.0)
    schedule("other")
    assert counted == []
    for name, arrived in (("long", 3.0), ("short", 4.0)):
        policy.added(turn(name), arrived)
    schedule("short")
    assert counted == [BYPASSES.name]
