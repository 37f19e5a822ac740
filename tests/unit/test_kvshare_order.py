"""Order of waiting requests by how much of their prompt is stored."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.v1.core.sched.request_queue import FCFSRequestQueue

from vllm_plugins.engine.policy import SchedulerFacts, Step, StepPlan
from vllm_plugins.kv_connectors.kvshare import hit_rate_order as ordering
from vllm_plugins.kv_connectors.kvshare.hit_rate_order import (
    HitRatePolicy,
    Waiting,
    hit_rate_order,
)
from vllm_plugins.kv_connectors.kvshare.request_state import Hit
from vllm_plugins.schedulers.spf.policy import SpfPolicy

FULL_HIT = 5.0


def order(*waiting, most=8):
    return hit_rate_order(waiting, most)


def waiting(arrived=100.0, hit=0.0, bypassed=0, started=False):
    blind = arrived / FULL_HIT
    return Waiting(arrived, blind, blind, blind - hit, bypassed, started)


def test_who_has_most_stored_goes_first_and_equals_keep_their_order():
    assert order(waiting(hit=0.2), waiting(hit=0.9), waiting(hit=0.2)) == [1, 0, 2]


def test_waiting_weighs_up_a_hit():
    assert order(waiting(arrived=94.0), waiting(hit=1.0)) == [0, 1]
    assert order(waiting(arrived=96.0), waiting(hit=1.0)) == [1, 0]


def test_whoever_was_overtaken_often_goes_before_all_others():
    assert order(waiting(arrived=99.0, bypassed=8), waiting(hit=1.0)) == [0, 1]
    assert order(waiting(arrived=99.0, bypassed=7), waiting(hit=1.0)) == [1, 0]


def test_no_more_go_before_in_one_step_than_may():
    late = [waiting(hit=1.0) for _ in range(5)]
    assert order(waiting(arrived=99.0, bypassed=6), *late) == [1, 2, 0, 3, 4, 5]


def test_a_preempted_answer_goes_first():
    requests = waiting(arrived=90.0, bypassed=9), waiting(hit=1.0), waiting(started=True)
    assert order(*requests) == [2, 0, 1]


WAITING = st.builds(
    Waiting,
    st.floats(0, 100),
    st.floats(0, 100),
    st.floats(0, 100),
    st.floats(-100, 100),
    st.integers(0, 12),
    st.booleans(),
    st.sampled_from([None, b"one", b"two"]),
)


@given(st.lists(WAITING, max_size=12), st.lists(st.floats(0, 1), min_size=12, max_size=12))
def test_what_one_domain_has_stored_does_not_move_anothers_requests(requests, scores):
    changed = [
        replace(request, score=score) if request.domain == b"one" else request
        for request, score in zip(requests, scores, strict=False)
    ]
    before, after = (hit_rate_order(some, 8) for some in (requests, changed))
    for place, index in enumerate(before):
        if requests[index].domain != b"one":
            assert after[place] == index


@given(st.lists(WAITING, max_size=20))
def test_nobody_is_left_out(requests):
    assert sorted(hit_rate_order(requests, 8)) == list(range(len(requests)))


@dataclass(eq=False)
class Request:
    request_id: str
    domain: bytes | None
    hit: float
    num_tokens: int = 100
    num_output_tokens: int = 0
    num_computed_tokens: int = 0
    num_preemptions: int = 0


class Queue:
    """The policy over vLLM's own waiting queue, and admissions from its head.

    Args:
        requests: Domain, stored share and perhaps tokens of each, in order of arrival, one a
            second.
        max_bypass: See the policy.
        gamma: Of spf, where that orders the queue; None where it does not.
    """

    def __init__(self, requests, max_bypass=8, gamma=None):
        self.bypasses, self.now = 0, 0.0
        self.spf = None if gamma is None else SpfPolicy(gamma)
        self.policy = HitRatePolicy(1e6, max_bypass)
        side = SimpleNamespace(domain=lambda request: request.domain, hits=self.hits)
        key = None if self.spf is None else self.spf.waiting_key()
        facts = SchedulerFacts(
            1000, 1, 1, lambda: self.now, SimpleNamespace(scheduler=side), waiting_key=key
        )
        self.policy.bind(facts, SimpleNamespace(inc=self.count))
        self.waiting = FCFSRequestQueue()
        for number, request in enumerate(requests):
            self.arrive(str(number), *request)

    def hits(self, requests, most):
        return [Hit(r.hit, r.hit * r.num_tokens) for r in requests]

    def count(self, name):
        self.bypasses += 1

    def arrive(self, name, domain, hit, tokens=100):
        self.now += 1.0
        request = Request(name, domain, hit, tokens)
        # As the scheduler does, whichever of the two was named first.
        for policy in (self.policy, self.spf):
            if policy is not None:
                policy.added(request, self.now)
        self.waiting.add_request(request)

    def step(self, admitted):
        """Admit so many; those with something stored are loaded first, and run in no step yet."""
        plan = StepPlan(self.now, [], self.waiting, len(self.waiting), 1000, lambda request: True)
        self.policy.plan(plan)
        gone = [self.waiting.pop_request() for _ in range(min(admitted, len(self.waiting)))]
        new = [SimpleNamespace(req_id=r.request_id) for r in gone if not r.hit]
        self.policy.scheduled(Step(plan, SimpleNamespace(scheduled_new_reqs=new), self.now))
        return [request.request_id for request in gone]

    def run(self, steps):
        admitted = [self.step(count) for count in steps]
        while self.waiting:
            admitted.append(self.step(1))
        return admitted


REQUEST = st.tuples(
    st.sampled_from([b"one", b"two"]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([30, 100, 1000]),
)
HITS = st.lists(REQUEST, min_size=2, max_size=10)
GAMMA = st.sampled_from([None, 0.0, 15.0, 1e4])


@pytest.fixture(scope="module", params=[3, ordering.RANKED_PER_STEP])
def ranked(request):
    """How many places a step gives by rank: fewer than there are requests, and as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordering, "RANKED_PER_STEP", request.param)
        yield


@pytest.mark.usefixtures("ranked")
@given(HITS, st.lists(st.integers(0, 3), max_size=6), st.integers(0, 3), GAMMA)
# A hit of the first domain goes first, and the second domain's request is overtaken.
@example([(b"one", 0.0), (b"two", 0.0), (b"two", 1.0), (b"one", 1.0)], [1], 1, None)
def test_what_one_domain_has_stored_moves_no_other_in_any_step(requests, steps, max_bypass, gamma):
    def others(found):
        names = [[n for n in step if requests[int(n)][0] == b"two"] for step in found]
        return names, [len(step) for step in found]

    empty = [(domain, 0.0 if domain == b"one" else hit, *n) for domain, hit, *n in requests]
    runs = [Queue(some, max_bypass, gamma).run(steps) for some in (requests, empty)]
    assert others(runs[0]) == others(runs[1])


@pytest.mark.usefixtures("ranked")
@given(HITS, st.lists(st.integers(0, 3), max_size=6), st.integers(0, 3), GAMMA)
def test_domains_take_turns_as_if_nothing_were_stored(requests, steps, max_bypass, gamma):
    def turns(some):
        admitted = Queue(some, max_bypass, gamma).run(steps)
        return [[requests[int(name)][0] for name in names] for names in admitted]

    assert turns(requests) == turns([(domain, 0.0, *n) for domain, _, *n in requests])


@pytest.mark.parametrize(("stored", "first", "last"), [(0.98, "1", "0"), (0.0, "0", "1")])
def test_beside_spf_who_is_overtaken_waits_in_the_place_of_who_overtook_it(stored, first, last):
    """With gamma=0 behind another domain's shorter ones, for as long as they come."""
    queue = Queue([(b"one", 0.0, 30), (b"one", stored, 1000)], gamma=0.0)
    admitted = []
    for number in range(2, 22):
        queue.arrive(str(number), b"two", 0.0, 500)
        admitted += queue.step(1)
    assert admitted == [first, *map(str, range(2, 21))]
    assert queue.step(2) == ["21", last]


@pytest.mark.usefixtures("ranked")
@given(HITS, st.lists(st.integers(0, 3), max_size=6), st.integers(0, 3), GAMMA)
def test_no_request_is_overtaken_more_often_than_allowed(requests, steps, max_bypass, gamma):
    """Overtaken by those that would come after it if nothing were stored."""
    queue = Queue(requests, max_bypass, gamma)
    admitted = [(step, int(n)) for step, names in enumerate(queue.run(steps)) for n in names]

    def blind(number):
        return (0 if gamma is None else requests[number][2] + gamma * (number + 1.0), number)

    def overtaken(place):
        step, number = admitted[place]
        later = [(s, n) for s, n in admitted[place:] if requests[n][0] == requests[number][0]]
        return [s > step for s, n in later if blind(n) < blind(number)]

    for place, (_, number) in enumerate(admitted):
        before = [n for _, n in admitted[:place] if requests[n][0] == requests[number][0]]
        assert sum(blind(n) > blind(number) for n in before) <= max_bypass
    # Who goes in the same step does not wait any longer.
    assert queue.bypasses == sum(any(overtaken(place)) for place in range(len(admitted)))


def test_behind_the_first_places_of_a_long_queue_nothing_is_ranked():
    most = ordering.RANKED_PER_STEP
    queue = [waiting(arrived=100.0 + i / 1e3, hit=i % 2) for i in range(4 * most)]
    found = hit_rate_order(queue, 10**6)
    assert found[:most] == list(range(1, 2 * most, 2))
    assert found[most:] == [i for i in range(4 * most) if i not in found[:most]]


def test_a_stream_of_hits_lets_who_has_none_through():
    queue = Queue([(None, 0.0)])
    for number in range(1, 10):
        queue.arrive(str(number), None, 1.0)
        admitted = queue.step(1)
    assert admitted == ["0"]
    assert queue.bypasses == 8


def test_who_was_preempted_before_its_answer_goes_first():
    queue = Queue([(None, 0.0, 1000)], gamma=0.0)
    (preempted,) = queue.waiting
    assert queue.step(1) == ["0"]
    preempted.num_preemptions = 1
    queue.waiting.prepend_request(preempted)
    queue.arrive("1", None, 1.0, 30)
    assert queue.run([]) == [["0"], ["1"]]


def test_who_is_being_loaded_is_not_overtaken():
    queue = Queue([(None, 1.0), (None, 0.0), (None, 0.0)])
    assert queue.run([]) == [["0"], ["1"], ["2"]]
    assert queue.bypasses == 0


@given(
    st.lists(REQUEST, min_size=2, max_size=30), st.lists(st.integers(0, 3), max_size=6),
    st.floats(0, 100),
)  # fmt: skip
# More of them are shorter than may overtake by what is stored.
@example([(None, 0.0, 1000)] * 10 + [(None, 0.0, 30)] * 10, [], 0.0)
def test_beside_spf_a_domain_with_nothing_stored_is_in_spfs_order(requests, steps, gamma):
    empty = [(domain, 0.0, tokens) for domain, _, tokens in requests]
    found = [int(name) for names in Queue(empty, 8, gamma).run(steps) for name in names]
    # They arrived one a second, and all were there before the first step.
    spf = sorted(range(len(empty)), key=lambda i: empty[i][2] + gamma * (i + 1.0))
    assert found == spf


def test_beside_spf_what_is_left_after_reuse_orders():
    queue = Queue([(None, 0.0, 300), (None, 0.9, 1000), (None, 0.5, 500)], gamma=0.0)
    assert queue.run([]) == [["1"], ["2"], ["0"]]


@pytest.mark.parametrize(("gamma", "max_bypass", "at_most"), [(0.0, 8, 8), (50.0, 99, 17)])
def test_beside_spf_a_stream_of_hits_lets_who_has_none_through(gamma, max_bypass, at_most):
    """With either limit alone: the bound on overtaking, and spf's ageing."""
    queue = Queue([(None, 0.0, 1000)], max_bypass, gamma)
    for number in range(1, 40):
        queue.arrive(str(number), None, 0.9, 1000)
        if queue.step(1) == ["0"]:
            break
    assert number == at_most + 1
