"""Another life of a server finds what the one before it stored, under keys that stay unique."""

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.unit.kvshare_kv import SHAPE, bits, random_kv, some_label, written
from tests.unit.kvshare_texts import DOMAIN, OTHER, Server, joined, random_text
from vllm_plugins.kv_connectors.kvshare.disk import (
    Catalogue,
    DiskTier,
    rank_folder,
    segment_path,
)
from vllm_plugins.kv_connectors.kvshare.index import SegmentIndex
from vllm_plugins.kv_connectors.kvshare.planner import Planner
from vllm_plugins.kv_connectors.kvshare.transfer import Label

CPU = torch.device("cpu")
PRINT = "0123456789abcdef"


def test_keys_do_not_come_back_in_another_life(tmp_path, monkeypatch):
    now = [10**18]
    monkeypatch.setattr("time.time_ns", lambda: now[0])
    used = set()
    # The clock also stands still and goes back, and what was stored is gone each time.
    for time in (10**18, 10**18, 10**18 + 5, 10**17, 10**18 + 10**15):
        now[0] = time
        catalogue = Catalogue(tmp_path, PRINT)
        index = SegmentIndex(10_000)
        index.restore(catalogue.labels(), catalogue.first_key)
        for i in range(3):
            text = random_text(np.random.default_rng(i), 100)
            drafts = Planner(index).new_segments(DOMAIN, text, None, 0, 100)
            keys = {s.key for s in index.store(DOMAIN, drafts).segments}
            assert keys.isdisjoint(used)
            used |= keys
        catalogue.close()


def test_keys_are_new_where_only_another_ranks_folder_was_left(tmp_path):
    first = Catalogue(tmp_path / "node", PRINT)
    first.close()
    again = Catalogue(tmp_path / "emptied", PRINT)
    assert again.first_key > first.first_key
    again.close()


class Life:
    """A server's index over a folder, from its start to its end."""

    def __init__(self, folder, capacity=100_000):
        self.catalogue = Catalogue(folder, PRINT)
        self.tier = DiskTier(rank_folder(folder / PRINT, 0), SHAPE, CPU)
        self.server = Server(capacity)
        self.index = self.server.index
        self.index.restore(self.catalogue.labels(), self.catalogue.first_key)

    def serve(self, text, domain=DOMAIN):
        before = set(self.index)
        self.server.serve(text, domain)
        for key in set(self.index) - before:
            segment = self.index.get(key)
            kv = random_kv(len(segment), seed=key % 2**31)
            self.tier.write(key, Label.of(segment), kv, None)
        for key in self.server.evicted:
            self.tier.forget(key)
        written(self.tier)

    def end(self):
        self.tier.close()
        self.catalogue.close()


def described(index):
    """All that is to survive, by key."""
    found = {}
    for key in index:
        segment = index.get(key)
        links = [None if s is None else s.key for s in (segment.previous, segment.following)]
        found[key] = (
            segment.domain, segment.tokens.tobytes(), segment.position, segment.context,
            segment.generation, segment.content, segment.source, links,
            segment.anchors.hashes.tobytes(), segment.anchors.offsets.tobytes(),
        )  # fmt: skip
    return found


def runs(plan):
    return [(r.start, r.length, r.segment.key, r.offset, r.exact, r.shift) for r in plan.runs]


@pytest.mark.parametrize("seed", range(4))
def test_another_life_finds_and_plans_the_same(tmp_path, seed):
    rng = np.random.default_rng(seed)
    documents = [random_text(rng, int(rng.integers(50, 900))) for _ in range(6)]
    prompts = [joined(*(documents[i] for i in rng.permutation(6)[:3])) for _ in range(6)]
    one = Life(tmp_path)
    for number, prompt in enumerate(prompts):
        one.serve(joined(prompt, random_text(rng, 20)), (DOMAIN, OTHER)[number % 2])
    plans = [runs(one.server.plan(p, d)) for p in prompts for d in (DOMAIN, OTHER)]
    before = described(one.index)
    one.end()
    two = Life(tmp_path)
    assert described(two.index) == before
    assert any(links != [None, None] for *_, links, _, _ in before.values())
    assert list(two.index) == sorted(before)
    assert two.index.used == one.index.used
    assert [runs(two.server.plan(p, d)) for p in prompts for d in (DOMAIN, OTHER)] == plans
    assert all(plans)
    for key in before:
        kv = two.tier.read(key).result(timeout=20)
        assert bits(kv) == bits(random_kv(kv.shape[2], seed=key % 2**31))
    two.serve(random_text(rng, 300))
    assert min(set(two.index) - set(before)) > max(before)
    two.end()


def test_a_smaller_store_takes_back_the_newest(tmp_path):
    rng = np.random.default_rng(9)
    one = Life(tmp_path)
    for _ in range(10):
        one.serve(random_text(rng, 100))
    keys = sorted(one.index)
    one.end()
    two = Life(tmp_path, capacity=350)
    assert sorted(two.index) == keys[-3:]
    assert two.index.used == 300
    two.serve(random_text(rng, 100))
    assert two.index.used <= 350
    two.end()


def test_a_neighbour_that_is_gone_breaks_the_link_and_nothing_else(tmp_path):
    one = Life(tmp_path)
    one.serve(random_text(np.random.default_rng(3), 3000))
    keys = sorted(one.index)
    assert len(keys) > 3
    one.end()
    segment_path(rank_folder(tmp_path / PRINT, 0), keys[1]).unlink()
    two = Life(tmp_path)
    assert sorted(two.index) == [keys[0], *keys[2:]]
    assert two.index.get(keys[0]).following is two.index.get(keys[2]).previous is None
    assert two.index.get(keys[2]).following is two.index.get(keys[3])
    two.end()


@pytest.mark.parametrize("lie", ["domain", "source", "position"])
def test_a_link_to_what_is_no_neighbour_is_not_taken(lie):
    left = some_label(16, position=0)
    facts = {
        "domain": left.domain, "source": left.source, "position": 16, "previous": 10,
    }  # fmt: skip
    honest = some_label(16, seed=1)
    honest = Label(**{**vars(honest), **facts})
    index = SegmentIndex(1000)
    index.restore({10: left, 11: honest}, 0)
    assert index.get(11).previous is index.get(10)
    wrong = {"domain": b"x" * 32, "source": 99, "position": 17}[lie]
    index = SegmentIndex(1000)
    index.restore({10: left, 11: Label(**{**vars(honest), lie: wrong})}, 0)
    assert index.get(11).previous is None
    assert index.get(10).following is None


def test_two_do_not_get_the_same_left_neighbour():
    left = some_label(16, position=0)
    facts = {"domain": left.domain, "source": left.source, "position": 16, "previous": 10}
    twins = {
        key: Label(**{**vars(some_label(16, seed=key)), **facts}) for key in (11, 12)
    }  # fmt: skip
    index = SegmentIndex(1000)
    index.restore({10: left, **twins}, 0)
    assert index.get(10).following is index.get(11)
    assert index.get(12).previous is None
