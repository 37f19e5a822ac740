"""EPD's encode side: room before encoding, a lease after it, nothing lost in between."""

import random

import pytest
from vllm.v1.request import RequestStatus

from tests.epd_sides import Counts, arena_of, memory_of, request, shape_of
from vllm_plugins.kv_connectors.epd.encode_side import EncodeSide
from vllm_plugins.kv_connectors.epd.media import KEY, sources_of
from vllm_plugins.wire.address import Address

ADDRESS = Address("127.0.0.1", 4000)


class Bench:
    def __init__(self, blocks=4, always=True):
        self.now, self.step = 0.0, 0
        self.arena = arena_of(blocks, lambda: self.now)
        self.memory, self.counts = memory_of(blocks), Counts()
        self.side = EncodeSide(
            self.arena,
            self.memory,
            shape_of,
            ADDRESS,
            "a" * 32,
            30.0,
            lambda made: {f.identifier: {"item_indices": [0]} for f in made.mm_features},
            always,
            self.counts,
        )

    def run_step(self, *media, writes=True):
        """Order items and, unless the worker fails, have them written."""
        self.step += 1
        for name in media:
            if self.side.must_write(name):
                self.side.order(name)
        orders = self.side.take_orders(self.step)
        if writes:
            self.write(orders)
        self.memory.report(0, self.step)
        return orders

    def write(self, orders):
        for copy in orders:
            self.memory.stamp(copy.blocks[0], copy.sequence, "cd" * 16)

    def end(self, made, status=RequestStatus.FINISHED_STOPPED):
        made.status = status
        return self.side.ended(made)


def test_a_request_s_items_are_leased_and_its_answer_says_where_they_are():
    bench = Bench()
    made = request("r", ["a", "b", "a"])
    assert bench.side.admit(made)
    assert [copy.media for copy in bench.run_step("a", "b", "a")] == ["a", "b"]
    answer = bench.end(made)
    sources = sources_of(answer, False)
    assert set(sources) == {"a", "b"}
    assert sources["a"].address == ADDRESS
    assert sources["a"].digest == "cd" * 16
    assert sources["a"].shape == shape_of(4, "image")
    assert sources["a"].lease == sources["b"].lease
    assert answer["a"]["item_indices"] == [0]
    assert bench.counts["published_items_total"] == 2
    assert bench.arena.available_blocks == 2
    bench.now = 30.0
    assert bench.arena.available_blocks == 4


def test_requests_wait_until_there_is_room_for_all_their_items():
    bench = Bench()
    one, two, three = request("1", ["a", "b"]), request("2", ["c", "d", "e"]), request("3", ["a"])
    assert bench.side.admit(one)
    assert not bench.side.admit(two)
    assert not bench.side.admit(two)
    assert bench.counts["deferred_requests_total"] == 1
    # Nothing is held for who waits, and what is shared costs no room.
    assert bench.arena.available_blocks == 2
    assert bench.side.admit(three)
    bench.run_step("a", "b")
    answer = bench.end(one)
    bench.end(three)
    assert not bench.side.admit(two)
    for lease in {sources.lease for sources in sources_of(answer, False).values()}:
        bench.arena.end_lease(lease, "b")
        bench.arena.end_lease(lease, "a")
    # The other request's lease still keeps a.
    assert bench.side.admit(two)
    assert bench.arena.find("a") is not None
    assert bench.arena.find("b") is None


def test_a_leased_item_is_never_lost_to_make_room():
    bench = Bench(blocks=2)
    one, two = request("1", ["a", "b"]), request("2", ["c"])
    bench.side.admit(one)
    bench.run_step("a", "b")
    bench.end(one)
    assert not bench.side.admit(two)
    bench.now = 29.9
    assert not bench.side.admit(two)
    bench.now = 30.0
    assert bench.side.admit(two)


def test_a_request_that_can_never_fit_is_refused():
    bench = Bench(blocks=2)
    made = request("1", ["a", "b", "c"])
    assert not bench.side.admit(made)
    assert not bench.side.admit(made)
    assert bench.side.take_refused() == {"1"}
    assert bench.end(made, RequestStatus.FINISHED_ERROR) is None
    assert bench.arena.available_blocks == 2


def test_one_id_for_items_of_two_sizes_is_refused():
    bench = Bench()
    assert bench.side.admit(request("1", ["a"]))
    assert not bench.side.admit(request("2", ["a"], tokens=3))
    assert bench.side.take_refused() == {"2"}


def test_an_item_that_is_here_is_not_written_again():
    bench = Bench()
    one, two = request("1", ["a"]), request("2", ["a"])
    bench.side.admit(one)
    bench.run_step("a")
    bench.end(one)
    assert bench.side.admit(two)
    assert not bench.side.must_write("a")
    assert set(bench.end(two)) == {"a"}


def test_what_a_worker_may_still_write_is_not_given_to_another():
    bench = Bench(blocks=1)
    one, two = request("1", ["a"]), request("2", ["b"])
    bench.side.admit(one)
    bench.side.order("a")
    orders = bench.side.take_orders(1)
    assert bench.end(one, RequestStatus.FINISHED_ABORTED) is None
    assert not bench.side.admit(two)
    bench.write(orders)
    assert bench.side.admit(two)


def test_an_aborted_request_gives_back_what_nobody_was_told_to_write():
    bench = Bench(blocks=1)
    one, two = request("1", ["a"]), request("2", ["b"])
    bench.side.admit(one)
    bench.end(one, RequestStatus.FINISHED_ABORTED)
    assert bench.side.admit(two)


def test_an_item_that_no_worker_wrote_is_not_published():
    bench = Bench(blocks=2)
    made = request("1", ["a", "b"])
    bench.side.admit(made)
    bench.run_step("a")
    bench.run_step("b", writes=False)
    answer = bench.end(made)
    assert KEY in answer["a"]
    assert KEY not in answer["b"]
    bench.now = 30.0
    assert bench.arena.available_blocks == 2


def test_only_requests_that_ask_publish_where_the_server_also_prefills():
    bench = Bench(always=False)
    assert not bench.side.wants(request("1", ["a"]))
    assert not bench.side.wants(request("2", ["a"], params={KEY: True}))
    assert not bench.side.wants(request("3", ["a"], params={KEY: {"publish": "yes"}}))
    assert bench.side.wants(request("4", ["a"], params={KEY: {"publish": True}}))


@pytest.mark.parametrize("seed", range(10))
def test_conservation_under_random_requests_and_aborts(seed):
    rng = random.Random(seed)
    bench = Bench(blocks=8)
    alive, waiting, late = {}, {}, []
    for number in range(400):
        bench.now += rng.random() * 4
        media = list(dict.fromkeys(f"m{rng.randrange(10)}" for _ in range(rng.randint(1, 4))))
        made = request(f"r{number}", media)
        (alive if bench.side.admit(made) else waiting)[made.request_id] = made
        wanted = [m for made in alive.values() for m in made.mm_features if rng.random() < 0.5]
        orders = bench.run_step(*(m.identifier for m in wanted), writes=False)
        late += orders
        rng.shuffle(late)
        for _ in range(rng.randint(0, len(late))):
            bench.write([late.pop()])
        for name in [n for n in [*alive, *waiting] if rng.random() < 0.3]:
            ended = alive.pop(name, None) or waiting.pop(name)
            bench.end(ended, RequestStatus.FINISHED_ABORTED)
        for name, made in list(alive.items()):
            if all(bench.arena.find(f.identifier) for f in made.mm_features):
                answer = bench.end(alive.pop(name))
                assert all(KEY in answer[f.identifier] for f in made.mm_features)
        bench.arena.check()
    for made in [*alive.values(), *waiting.values()]:
        bench.end(made, RequestStatus.FINISHED_ABORTED)
    bench.write(late)
    bench.side.settle()
    bench.now += 1000
    assert bench.arena.available_blocks == 8
