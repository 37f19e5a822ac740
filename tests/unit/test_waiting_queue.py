"""The keyed queue and shortest prefill first, against sorting everything again at every tick."""

import random
from dataclasses import dataclass

import pytest

from vllm_plugins.engine.policy import prefill_left
from vllm_plugins.engine.waiting_queue import KeyedRequestQueue
from vllm_plugins.schedulers.spf.policy import SpfPolicy


@dataclass(eq=False)
class Waiting:
    """As much of a request as the queue and the policy look at."""

    request_id: str
    num_tokens: int
    num_computed_tokens: int = 0


def by_tokens(*tokens):
    queue = KeyedRequestQueue(lambda request: request.num_tokens)
    requests = [Waiting(f"{i}", n) for i, n in enumerate(tokens)]
    for request in requests:
        queue.add_request(request)
    return queue, requests


@pytest.mark.parametrize("gamma", [0.0, 15.0, 200.0])
def test_spf_equals_sorting_again_at_every_tick(gamma):
    source = random.Random(7)
    policy = SpfPolicy(gamma)
    key = policy.waiting_key()
    queue = KeyedRequestQueue(lambda request: key(request, prefill_left(request)))
    waiting, arrived = [], {}
    for tick in range(10_000):
        # Sixty-fourths of a second and whole tokens keep both sums exact.
        now = tick / 64
        request = Waiting(f"{tick}", source.randrange(1, 4000))
        arrived[request] = now - source.randrange(64) / 64
        policy.added(request, arrived[request])
        queue.add_request(request)
        waiting.append(request)
        fate = source.random()
        if fate < 0.1:
            gone = source.sample(waiting, min(3, len(waiting)))
            queue.remove_requests(gone)
            waiting = [r for r in waiting if r not in gone]
        elif fate < 0.2:
            # A request that could not start in this step is taken out and put back.
            queue.prepend_requests([queue.pop_request()])
        while len(waiting) > (80 if fate < 0.95 else 5):
            first = min(waiting, key=lambda r: r.num_tokens - gamma * (now - arrived[r]))
            score = first.num_tokens - gamma * (now - arrived[first])
            popped = queue.pop_request()
            assert popped.num_tokens - gamma * (now - arrived[popped]) == score
            waiting.remove(popped)
        assert len(queue) == len(waiting)
        if waiting and tick % 50 == 0:
            scores = [r.num_tokens - gamma * (now - arrived[r]) for r in queue]
            assert scores == sorted(r.num_tokens - gamma * (now - arrived[r]) for r in waiting)


def test_equal_keys_keep_their_order():
    queue, requests = by_tokens(5, 3, 3, 5, 3)
    assert list(queue) == [requests[i] for i in (1, 2, 4, 0, 3)]


def test_skipped_requests_come_back_in_order():
    queue, requests = by_tokens(3, 3, 3)
    # vLLM collects what it skips in reverse and puts it back in one call.
    skipped = [queue.pop_request(), queue.pop_request()][::-1]
    queue.prepend_requests(skipped)
    assert [queue.pop_request() for _ in range(3)] == [requests[i] for i in (2, 0, 1)]


def test_removed_requests_leave_nothing_behind():
    queue, requests = by_tokens(*range(1000))
    queue.remove_requests(requests[:990])
    assert list(queue) == requests[990:]
    assert len(queue._heap) < 100
    queue.remove_request(requests[990])
    assert queue.peek_request() is requests[991]


def test_request_may_leave_and_enter_with_another_key():
    queue, requests = by_tokens(1, 2)
    queue.remove_request(requests[0])
    requests[0].num_tokens = 9
    queue.add_request(requests[0])
    assert [queue.pop_request(), queue.pop_request()] == requests[::-1]
    assert not queue


def test_empty_queue_is_an_error():
    queue, (request,) = by_tokens(1)
    queue.remove_request(request)
    for method in (queue.peek_request, queue.pop_request):
        with pytest.raises(IndexError):
            method()
    with pytest.raises(KeyError):
        queue.remove_request(request)
