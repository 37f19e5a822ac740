"""The arena of EPD: no block is lost or shared, what is needed stays, what is not goes in order."""

import random
import threading

import pytest

from vllm_plugins.kv_connectors.epd.arena import Arena
from vllm_plugins.kv_connectors.epd.media import Shape

# Four rows in a block of 64 bytes.
WIDTH, BLOCK = 4, 64


def rows(count):
    return Shape(count, WIDTH, "float32")


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def arena(clock):
    return Arena(8, BLOCK, clock)


def put(arena, media, count, holder="me"):
    entry = arena.reserve(media, rows(count), holder)
    if entry is not None:
        arena.complete(entry, "00" * 16)
    return entry


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (4, 1), (5, 2), (32, 8), (33, 9)])
def test_rows_are_never_split_over_two_blocks(arena, tokens, blocks):
    assert arena.blocks_for(rows(tokens)) == blocks
    # Two rows of 24 bytes fill no more than 48 of the 64.
    assert arena.blocks_for(Shape(3, 6, "float32")) == 2


def test_a_row_longer_than_a_block_never_fits(arena):
    assert not arena.fits([Shape(1, 100, "float32")])
    assert arena.reserve("a", Shape(1, 100, "float32"), "me") is None


def test_what_somebody_holds_is_not_evicted(arena):
    put(arena, "a", 16, "one")
    put(arena, "b", 16, "two")
    assert arena.reserve("c", rows(4), "three") is None
    arena.release_all("one")
    assert arena.reserve("c", rows(4), "three") is not None
    assert arena.find("a") is None
    assert arena.find("b") is not None
    arena.check()


def test_what_is_not_complete_is_not_evicted_though_nobody_holds_it(arena):
    entry = arena.reserve("a", rows(32), "one")
    arena.release_all("one")
    assert arena.find("a") is None
    assert arena.reserve("b", rows(4), "two") is None
    arena.discard(entry)
    assert arena.available_blocks == 8


def test_the_least_recently_used_goes_first(arena):
    for media in "abcd":
        put(arena, media, 8)
    arena.release_all("me")
    arena.find("a")
    put(arena, "e", 16)
    assert [media for media in "abcde" if arena.find(media)] == ["a", "d", "e"]


def test_a_lease_keeps_an_item_until_it_ends(arena, clock):
    put(arena, "a", 32)
    arena.lease(["a"], "lease", 10.0)
    arena.release_all("me")
    clock.now = 9.9
    assert arena.reserve("b", rows(4), "me") is None
    assert arena.renew("lease", 10.0)
    clock.now = 19.8
    assert arena.reserve("b", rows(4), "me") is None
    clock.now = 20.0
    assert not arena.renew("lease", 10.0)
    assert arena.reserve("b", rows(4), "me") is not None
    arena.check()


def test_a_renewal_never_shortens_a_lease(arena, clock):
    put(arena, "a", 32)
    arena.lease(["a"], "lease", 10.0)
    arena.release_all("me")
    assert arena.renew("lease", 1.0)
    clock.now = 9.0
    assert arena.reserve("b", rows(4), "me") is None


def test_each_lease_is_one_request_s_own(arena, clock):
    put(arena, "a", 32)
    arena.lease(["a"], "one", 10.0)
    arena.lease(["a"], "two", 10.0)
    arena.release_all("me")
    arena.end_lease("one", "a")
    arena.end_lease("one", "a")
    arena.end_lease("nobody's", "a")
    assert arena.reserve("b", rows(4), "me") is None
    arena.end_lease("two", "a")
    assert arena.reserve("b", rows(4), "me") is not None


def test_leases_that_nobody_ends_do_not_pile_up(arena, clock):
    put(arena, "a", 4)
    for number in range(100):
        arena.lease(["a"], f"lease {number}", 10.0)
        clock.now += 6.0
    assert len(arena.find("a").leases) == 2
    arena.check()


def test_what_is_forgotten_is_gone_unless_somebody_holds_it(arena):
    put(arena, "a", 4, "one")
    put(arena, "b", 4, "two")
    arena.lease(["b"], "lease", 10.0)
    arena.reserve("c", rows(4), "three")
    for holder in ("two", "three"):
        arena.release_all(holder)
    arena.forget()
    assert arena.find("a") is not None
    assert arena.find("b") is None
    assert arena.is_writing("c")
    arena.check()


def test_who_waits_hears_when_an_item_is_complete(arena):
    entry = arena.reserve("a", rows(4), "me")
    arena.wait_for("a", 0.01)
    waiting = threading.Thread(target=arena.wait_for, args=("a", 60.0))
    waiting.start()
    arena.complete(entry, "00" * 16)
    waiting.join(30)
    assert not waiting.is_alive()


def test_one_run_of_blocks_is_taken_where_there_is_one(arena):
    for media in "abcd":
        put(arena, media, 8)
    for media in "bd":
        arena.discard(arena.find(media))
    assert put(arena, "e", 8).blocks == (2, 3)
    arena.discard(arena.find("c"))
    assert put(arena, "f", 16).blocks == (4, 5, 6, 7)
    for media in "ef":
        arena.discard(arena.find(media))
    put(arena, "g", 4)
    assert put(arena, "h", 20).blocks == (3, 4, 5, 6, 7)
    arena.discard(arena.find("a"))
    assert put(arena, "i", 12) is None or arena.find("i").blocks == (0, 1)


def test_a_name_has_one_entry(arena):
    put(arena, "a", 4)
    with pytest.raises(ValueError, match="'a' has an entry"):
        arena.reserve("a", rows(4), "me")


def test_an_entry_discarded_twice_frees_its_blocks_once(arena):
    entry = put(arena, "a", 8)
    arena.discard(entry)
    other = put(arena, "a", 8)
    arena.discard(entry)
    assert arena.find("a") is other
    arena.check()


@pytest.mark.parametrize("seed", range(20))
def test_conservation_under_random_operations(seed):
    rng, clock = random.Random(seed), Clock()
    arena = Arena(16, BLOCK, clock)
    names = [f"m{i}" for i in range(12)]
    holders = [f"r{i}" for i in range(5)]
    held = {holder: set() for holder in holders}
    leased = {}
    for step in range(1500):
        media, holder = rng.choice(names), rng.choice(holders)
        match rng.randrange(8):
            case 0 | 1:
                if arena.share(media, holder) is not None:
                    held[holder].add(media)
                else:
                    entry = arena.reserve(media, rows(rng.randint(1, 24)), holder)
                    if entry is not None:
                        held[holder].add(media)
                        if rng.random() < 0.8:
                            arena.complete(entry, "00" * 16)
            case 2:
                arena.release_all(holder)
                held[holder].clear()
            case 3:
                arena.release(media, holder)
                held[holder].discard(media)
            case 4:
                if arena.find(media) is not None:
                    leased[f"l{step}"] = (media, clock.now + 5)
                    arena.lease([media], f"l{step}", 5)
            case 5:
                clock.now += rng.random() * 3
            case 6:
                if leased:
                    name = rng.choice(list(leased))
                    arena.end_lease(name, leased.pop(name)[0])
            case 7:
                entry = arena.share(media, "look")
                arena.release_all("look")
                if entry is not None and not entry.is_complete:
                    arena.discard(entry)
                    for one in held.values():
                        one.discard(media)
        arena.check()
        for needed in held.values():
            for kept in needed:
                assert arena.share(kept, "look") is not None
        arena.release_all("look")
        for kept, until in leased.values():
            assert until <= clock.now or arena.find(kept) is not None
    for holder in holders:
        arena.release_all(holder)
    for name in names:
        if arena.is_writing(name):
            entry = arena.share(name, "end")
            arena.discard(entry)
    clock.now += 100
    assert arena.available_blocks == 16
    assert arena.fits([rows(64)])


def test_threads_may_use_it_at_once():
    arena = Arena(16, BLOCK)
    failures = []

    def work(number):
        rng = random.Random(number)
        try:
            for step in range(300):
                holder, media = f"{number}-{step}", f"m{rng.randrange(6)}"
                if arena.hold(media, holder) is None:
                    try:
                        entry = arena.reserve(media, rows(rng.randint(1, 12)), holder)
                    except ValueError:
                        continue
                    if entry is not None:
                        arena.complete(entry, "00" * 16)
                arena.release_all(holder)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    arena.check()
    assert arena.available_blocks == 16
