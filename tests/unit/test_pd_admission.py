"""DistServe's acceptance rule against the paper's words, over random traces."""

import random

import pytest

from vllm_plugins.kv_connectors.pd.admission import Admission, Stage

TOTAL = 100


class Oracle:
    """The rule as the paper's code has it: plain lists, everything counted anew each time."""

    def __init__(self, threshold):
        self.threshold = threshold
        self.queue, self.accepted = [], {}

    def may_accept(self, name, blocks, free):
        waiting = sum(self.accepted.values())
        head = self.queue and self.queue[0] == name
        return bool(head and waiting < self.threshold * TOTAL and blocks <= free)


class Trace:
    """Drives both through the same random events, and compares them after each."""

    def __init__(self, seed, threshold):
        self.rng = random.Random(seed)
        self.rule, self.oracle = Admission(threshold, TOTAL), Oracle(threshold)
        self.most = threshold * TOTAL
        self.arrived, self.taken = [], []

    def arrive(self):
        name = f"r{len(self.arrived)}"
        self.rule.arrive(name)
        self.oracle.queue.append(name)
        self.arrived.append(name)

    def ask(self):
        """Ask about a request, perhaps not the head, and twice, as vLLM may."""
        if not self.oracle.queue:
            return
        name = self.rng.choice([self.oracle.queue[0], self.rng.choice(self.oracle.queue)])
        blocks, free = self.rng.randint(1, 30), self.rng.randint(0, TOTAL)
        expected = self.oracle.may_accept(name, blocks, free)
        for _ in range(2):
            assert self.rule.may_accept(name, blocks, free) is expected
        if expected:
            self.rule.accept(name, blocks)
            self.oracle.queue.remove(name)
            self.oracle.accepted[name] = blocks
            self.taken.append(name)
            assert self.rule.accepted_blocks < self.most + blocks

    def load(self):
        if self.oracle.accepted:
            self.rule.loaded(self.rng.choice(list(self.oracle.accepted)))

    def run_or_end(self):
        if self.oracle.accepted:
            self.leave(self.rng.choice(list(self.oracle.accepted)))

    def abort(self):
        if self.oracle.queue:
            self.leave(self.rng.choice(self.oracle.queue))

    def leave(self, name):
        self.rule.leave(name)
        self.oracle.queue = [queued for queued in self.oracle.queue if queued != name]
        self.oracle.accepted.pop(name, None)

    def run(self, events):
        actions = [self.arrive, self.ask, self.load, self.run_or_end, self.abort]
        for action in self.rng.choices(actions, weights=[20, 50, 10, 15, 5], k=events):
            action()
            assert self.rule.queued == self.oracle.queue
            assert self.rule.accepted == list(self.oracle.accepted)
            assert self.rule.accepted_blocks == sum(self.oracle.accepted.values())


@pytest.mark.parametrize("threshold", [0.01, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_random_traces_follow_the_rule_first_come_first_served(seed, threshold):
    trace = Trace(seed, threshold)
    trace.run(1000)
    assert trace.taken == [name for name in trace.arrived if name in trace.taken]
    assert len(trace.taken) > 30
    for name in [*trace.rule.queued, *trace.rule.accepted]:
        trace.leave(name)
    assert (trace.rule.queued, trace.rule.accepted, trace.rule.accepted_blocks) == ([], [], 0)


def test_the_head_blocks_those_behind_it():
    rule = Admission(1.0, TOTAL)
    rule.arrive("large")
    rule.arrive("small")
    assert not rule.may_accept("large", 50, 49)
    assert not rule.may_accept("small", 1, 49)
    assert rule.may_accept("large", 50, 50)


def test_the_sum_is_compared_before_the_head_is_added():
    rule = Admission(0.05, TOTAL)
    for name in "abc":
        rule.arrive(name)
    assert rule.may_accept("a", 90, 100)
    rule.accept("a", 4)
    assert rule.may_accept("b", 30, 100)
    rule.accept("b", 1)
    assert not rule.may_accept("c", 1, 100)
    rule.leave("b")
    assert rule.may_accept("c", 1, 100)


def test_at_the_neutral_threshold_only_free_blocks_count():
    rule, free = Admission(1.0, TOTAL), TOTAL
    for i in range(20):
        rule.arrive(str(i))
        fits = free >= 7
        assert rule.may_accept(str(i), 7, free) is fits
        if fits:
            rule.accept(str(i), 7)
            free -= 7
    assert rule.accepted_blocks == 98


@pytest.mark.parametrize("stage", [Stage.QUEUED, Stage.LOADING, Stage.READY])
def test_who_leaves_at_any_stage_leaves_nothing_behind(stage):
    rule = Admission(0.05, TOTAL)
    rule.arrive("a")
    if stage is not Stage.QUEUED:
        rule.accept("a", 9)
    if stage is Stage.READY:
        rule.loaded("a")
    assert rule.stage("a") is stage
    assert rule.ready == (stage is Stage.READY)
    for _ in range(2):
        rule.leave("a")
    assert rule.stage("a") is None
    assert (rule.queued, rule.accepted, rule.accepted_blocks) == ([], [], 0)


def test_what_is_loaded_for_nobody_is_nothing():
    rule = Admission(0.05, TOTAL)
    rule.arrive("queued")
    rule.loaded("queued")
    rule.loaded("unknown")
    assert rule.stage("queued") is Stage.QUEUED
    assert rule.stage("unknown") is None
