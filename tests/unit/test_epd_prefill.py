"""EPD's prefill side: what is fetched, who waits, what is let go."""

import dataclasses
import random

import pytest

from tests.epd_sides import Counts, Fetching, arena_of, params_of, request, shape_of, source
from vllm_plugins.kv_connectors.epd.media import KEY, Shape
from vllm_plugins.kv_connectors.epd.prefill_side import PrefillRules, PrefillSide


class Bench:
    def __init__(self, blocks=8, has_medium=True, **rules):
        self.arena = arena_of(blocks)
        self.fetching, self.counts = Fetching(), Counts()
        self.has_medium = has_medium
        defaults = {
            "fetch_timeout_s": 20.0,
            "lease_s": 30.0,
            "encode_locally": False,
            "early": True,
            "lookahead": 0,
            "allow_remote": False,
        }
        self.side = PrefillSide(
            self.arena,
            self.fetching,
            PrefillRules(**defaults | rules),
            shape_of,
            lambda feature: self.has_medium,
            self.counts,
        )

    def arrive(self, name, *media, params=None, **kwargs):
        params = params_of(*dict.fromkeys(media)) if params is None else params
        made = request(name, list(media), params=params, **kwargs)
        self.side.arrived(made)
        return made

    def assert_idle(self):
        self.arena.check()
        assert self.arena.available_blocks == self.arena.num_blocks
        assert not self.side._requests
        assert not self.side._fetching
        assert not self.side._failed


def test_a_request_starts_its_fetches_when_it_arrives_and_each_once():
    bench = Bench()
    made = bench.arrive("r", "a", "b", "a")
    assert bench.fetching.fetched == ["a", "b"]
    bench.side.arrived(made)
    assert bench.fetching.fetched == ["a", "b"]


def test_text_before_a_missing_item_goes_on_and_the_item_itself_waits():
    bench = Bench()
    made = bench.arrive("r", "a", "b")
    assert bench.side.can_go_on(made, 0)
    assert not bench.side.can_go_on(made, 2)
    bench.fetching.end("b")
    assert not bench.side.can_go_on(made, 2)
    assert not bench.side.is_missing(made, 1)
    assert bench.side.is_missing(made, 0)
    bench.fetching.end("a")
    assert bench.side.can_go_on(made, 2)
    assert not bench.side.misses_some("r")


def test_without_early_prefill_all_items_ahead_are_waited_for():
    bench = Bench(early=False)
    made = bench.arrive("r", "a", "b")
    assert not bench.side.can_go_on(made, 0)
    bench.fetching.end("a")
    assert not bench.side.can_go_on(made, 0)
    # What lies behind the computed tokens is no longer needed.
    assert bench.side.can_go_on(made, 14)


def test_a_drafter_that_reads_ahead_needs_an_item_one_token_earlier():
    bench = Bench(lookahead=1)
    made = bench.arrive("r", "a")
    assert bench.side.can_go_on(made, 0)
    assert not bench.side.can_go_on(made, 1)


def test_an_item_serves_all_requests_that_show_it():
    bench = Bench()
    one, two = bench.arrive("one", "a"), bench.arrive("two", "a")
    assert bench.fetching.fetched == ["a"]
    bench.fetching.end("a")
    three = bench.arrive("three", "a")
    assert bench.fetching.fetched == ["a"]
    assert all(bench.side.can_go_on(made, 2) for made in (one, two, three))
    assert bench.counts["reused_items_total"] == 2
    # Every request's lease ends, also of those for which nothing was fetched.
    assert [media for _, media in bench.fetching.released] == ["a"] * 3
    for name in ("one", "two", "three"):
        bench.side.ended(name)
    bench.assert_idle()
    assert bench.arena.find("a") is not None


def test_a_missing_item_fails_all_requests_that_wait_for_it_and_no_other():
    bench = Bench()
    one, two, other = bench.arrive("1", "a"), bench.arrive("2", "a"), bench.arrive("3", "b")
    bench.fetching.end("a", "gone")
    assert bench.side.take_failed() == {"1", "2"}
    assert not bench.side.can_go_on(one, 0)
    assert not bench.side.can_go_on(two, 0)
    assert bench.side.can_go_on(other, 0)
    assert bench.counts.values["epd_missing_items_total", "gone"] == 1
    for name in "123":
        bench.side.ended(name)
    bench.fetching.end("b")
    bench.assert_idle()
    # It is not remembered as missing.
    bench.arrive("4", "a")
    assert bench.fetching.fetched == ["a", "b", "a"]


def test_what_cannot_be_had_is_encoded_here_if_its_pixels_are():
    bench = Bench(encode_locally=True)
    made = bench.arrive("r", "a", "b")
    bench.fetching.end("a", "timeout")
    assert bench.side.take_failed() == set()
    assert not bench.side.is_missing(made, 0)
    assert bench.side.can_go_on(made, 2)
    assert not bench.side.can_go_on(made, 8)
    bench.has_medium = False
    bench.fetching.end("b", "timeout")
    assert bench.side.take_failed() == {"r"}


def test_items_with_neither_pixels_nor_source_refuse_their_request_once():
    bench = Bench(has_medium=False)
    bench.arrive("r", "a", "b", params={})
    assert bench.side.take_failed() == {"r"}
    assert bench.counts["refused_requests_total"] == 1


def test_an_item_with_pixels_and_no_source_is_vllm_s_own():
    bench = Bench()
    made = bench.arrive("r", "a", params={})
    assert bench.side.can_go_on(made, 0)
    assert not bench.side.is_missing(made, 0)
    assert bench.fetching.fetched == []


@pytest.mark.parametrize("shape", [Shape(5, 4, "float32"), Shape(4, 8, "float32"),
                                   Shape(4, 4, "bfloat16")])  # fmt: skip
def test_an_item_of_another_shape_is_not_fetched(shape):
    bench = Bench()
    bench.arrive("r", "a", params=params_of("a", shape=shape))
    assert bench.fetching.fetched == []
    assert bench.side.take_failed() == {"r"}
    assert bench.counts.values["epd_missing_items_total", "mismatch"] == 1


def test_an_awaited_item_gets_room_for_what_the_prompt_has_a_place_for():
    bench = Bench()
    where = source()
    awaited = {KEY: {**where.to_json(), "awaited": True}}
    made = bench.arrive("r", "a", params={"a": awaited}, tokens=7)
    assert bench.fetching.fetched == ["a"]
    assert bench.arena.available_blocks == 6
    assert bench.side.can_go_on(made, 0)
    assert not bench.side.can_go_on(made, 2)
    bench.fetching.end("a")
    assert bench.side.can_go_on(made, 2)
    # There was no lease to end.
    assert bench.fetching.released == [("", "a")]


def test_one_id_for_items_of_two_sizes_fails_the_second():
    bench = Bench(encode_locally=True)
    bench.arrive("1", "a")
    waiting = request("0", ["a"], tokens=3)
    bench.side.arrived(waiting)
    bench.fetching.end("a")
    bench.arrive("2", "a", tokens=3, params={})
    # A request that came before the item meets it when it is scheduled.
    assert bench.side.is_missing(waiting, 0)
    assert bench.side.take_failed() == {"0", "2"}


def test_an_id_in_two_sizes_in_a_request_that_joined_a_fetch_hurts_nobody_else():
    bench = Bench()
    one = bench.arrive("1", "a")
    bench.side.arrived(two_sizes("2", "a"))
    assert bench.side.take_failed() == {"2"}
    bench.fetching.end("a")
    assert bench.side.can_go_on(one, 2)
    for name in "12":
        bench.side.ended(name)
    bench.assert_idle()


def two_sizes(name, media):
    made = request(name, [media, media], params=params_of(media))
    place = made.mm_features[1].mm_position
    made.mm_features[1].mm_position = dataclasses.replace(place, length=place.length - 1)
    return made


PULLED = {"do_remote_prefill": True}


def test_of_a_prompt_whose_kv_is_pulled_nothing_is_fetched():
    bench = Bench(has_medium=False)
    made = bench.arrive("r", "a", "b", kv=PULLED)
    # Items are at 2 to 6 and 8 to 12 of 14 tokens.
    for computed in (12, 13, 14):
        assert bench.side.can_go_on(made, computed)
    assert not bench.side.misses_some("r")
    assert bench.fetching.fetched == []
    bench.side.ended("r")
    bench.assert_idle()


def test_what_a_pull_leaves_to_compute_is_fetched_then():
    bench = Bench()
    made = bench.arrive("r", "a", "b", kv=PULLED)
    assert not bench.side.can_go_on(made, 11)
    # All of them at once: a later failure must not ask for room beside what is held.
    assert bench.fetching.fetched == ["a", "b"]
    # A connector may take note of the pull in the request itself.
    made.kv_transfer_params = None
    bench.fetching.end("b")
    assert bench.side.can_go_on(made, 11)
    assert not bench.side.can_go_on(made, 2)
    bench.fetching.end("a")
    assert bench.side.can_go_on(made, 2)


def test_a_pull_that_failed_needs_the_items_after_all():
    bench = Bench()
    made = bench.arrive("r", "a", kv=PULLED)
    assert bench.side.can_go_on(made, 7)
    assert bench.fetching.fetched == []
    assert bench.side.can_go_on(made, 0)
    assert bench.fetching.fetched == ["a"]
    assert bench.side.is_missing(made, 0)
    bench.fetching.end("a", "gone")
    assert bench.side.take_failed() == {"r"}


def test_malformed_parameters_refuse_their_request():
    bench = Bench()
    bench.arrive("r", "a", params={"a": {"vllm_plugins_epd": {"address": 1}}})
    assert bench.side.take_failed() == {"r"}
    bench.side.ended("r")
    assert bench.side.take_failed() == set()
    bench.assert_idle()


def test_room_is_given_in_order_and_for_a_whole_request():
    bench = Bench(blocks=3)
    bench.arrive("1", "a", "b")
    bench.arrive("2", "c", "d")
    bench.arrive("3", "e")
    # There is room for e alone, but 2 came first.
    assert bench.fetching.fetched == ["a", "b"]
    bench.fetching.end("a")
    bench.fetching.end("b")
    bench.side.tick()
    assert bench.fetching.fetched == ["a", "b"]
    bench.side.ended("1")
    assert bench.fetching.fetched == ["a", "b", "c", "d", "e"]


def test_leases_are_renewed_while_a_request_waits_for_room():
    bench = Bench(blocks=1, lease_s=1e-9)
    bench.arrive("1", "a")
    bench.arrive("2", "b", "b")
    assert bench.fetching.renewed == []
    bench.side.tick()
    assert bench.fetching.renewed == ["c" * 32]
    bench.side.ended("2")
    assert bench.fetching.released == [("c" * 32, "b")]


def test_an_item_that_another_request_brought_meanwhile_is_not_fetched_again():
    bench = Bench(blocks=2)
    bench.arrive("1", "a")
    bench.arrive("2", "b", "c")
    bench.arrive("3", "b")
    bench.fetching.end("a")
    bench.side.ended("1")
    assert bench.fetching.fetched == ["a", "b", "c"]
    bench.fetching.end("b")
    bench.side.tick()
    assert not bench.side.misses_some("3")
    assert bench.fetching.fetched == ["a", "b", "c"]


def test_a_request_larger_than_the_arena_is_refused():
    bench = Bench(blocks=2)
    bench.arrive("1", "a", "b", "c")
    assert bench.side.take_failed() == {"1"}
    bench.side.ended("1")
    bench.assert_idle()


def test_a_fetch_for_a_request_that_has_ended_becomes_cache():
    bench = Bench()
    bench.arrive("1", "a")
    bench.side.ended("1")
    assert bench.arena.available_blocks == 7
    bench.fetching.end("a")
    bench.assert_idle()
    made = bench.arrive("2", "a")
    assert bench.side.can_go_on(made, 2)


@pytest.mark.parametrize("seed", range(10))
def test_conservation_under_random_arrivals_ends_and_failures(seed):
    rng = random.Random(seed)
    bench = Bench(blocks=6, encode_locally=bool(seed % 2))
    alive, number = {}, 0
    for _ in range(250):
        match rng.randrange(5):
            case 0 | 1:
                number += 1
                media = [f"m{rng.randrange(9)}" for _ in range(rng.randint(1, 4))]
                alive[f"r{number}"] = bench.arrive(f"r{number}", *media)
            case 2:
                if bench.fetching.jobs:
                    missing = rng.choice(["", "", "gone"])
                    bench.fetching.end(rng.choice(list(bench.fetching.jobs)), missing)
            case 3:
                if alive:
                    name = rng.choice(list(alive))
                    del alive[name]
                    bench.side.ended(name)
            case 4:
                bench.side.tick()
                for name in bench.side.take_failed():
                    del alive[name]
                    bench.side.ended(name)
        bench.arena.check()
        for name, made in alive.items():
            for index, feature in enumerate(made.mm_features):
                missing = bench.side.is_missing(made, index)
                held = bench.arena.find(feature.identifier)
                failed = name in bench.side._failed
                assert failed or missing or seed % 2 or name in held.holders
    while alive:
        bench.side.ended(alive.popitem()[0])
    for media in list(bench.fetching.jobs):
        bench.fetching.end(media)
    bench.assert_idle()
