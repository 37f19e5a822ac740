"""Segments on disk: they come back bit for bit, also to another server, or not at all."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.unit.kvshare_kv import (
    PLANTS,
    SHAPE,
    bits,
    plant,
    put_file,
    random_kv,
    same_label,
    some_label,
    written,
)
from tests.unit.kvshare_texts import DOMAIN, OTHER, Server, joined, random_text
from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.kvshare import segment_file
from vllm_plugins.kv_connectors.kvshare.disk import (
    SECRET_BYTES,
    Catalogue,
    DiskTier,
    private_folder,
    rank_folder,
    segment_path,
)
from vllm_plugins.kv_connectors.kvshare.index import SegmentIndex
from vllm_plugins.kv_connectors.kvshare.planner import Planner
from vllm_plugins.kv_connectors.kvshare.transfer import Label

CPU = torch.device("cpu")
LARGE = 1 << 30
PRINT = "0123456789abcdef"


@pytest.mark.parametrize("kind", PLANTS)
def test_the_catalogue_goes_on_without_what_is_no_file_of_ours(tmp_path, kind):
    catalogue = Catalogue(tmp_path / "kv", PRINT)
    folder = rank_folder(tmp_path / "kv" / PRINT, 0)
    label, _ = put_file(segment_path(folder, 4), key=4)
    plant(kind, segment_path(folder, 5), tmp_path / "elsewhere")
    for name in ("notes.txt", "7.safetensors.bak", "x.safetensors", "07.safetensors"):
        (folder / name).write_text("another's")
    found = catalogue.labels()
    assert list(found) == [4]
    assert same_label(found[4], label)
    left = {path.name for path in folder.iterdir()}
    # Nothing but our own names is touched; a folder cannot be removed like a file.
    kept = {"4.safetensors", "notes.txt", "7.safetensors.bak", "x.safetensors", "07.safetensors"}
    assert left == kept | ({"5.safetensors"} if kind == "folder" else set())
    if kind == "link":
        assert (tmp_path / "elsewhere").exists()
    catalogue.close()


def test_the_catalogue_reads_no_kv(tmp_path, monkeypatch):
    catalogue = Catalogue(tmp_path / "kv", PRINT)
    path = segment_path(rank_folder(tmp_path / "kv" / PRINT, 0), 5)
    put_file(path, label=some_label(2000))
    total = []
    real = segment_file._read_bytes

    def counted(file, size):
        total.append(size)
        return real(file, size)

    monkeypatch.setattr(segment_file, "_read_bytes", counted)
    monkeypatch.setattr(segment_file, "_bytes_of", None)
    assert list(catalogue.labels()) == [5]
    assert sum(total) < 16_000 < path.stat().st_size / 10
    catalogue.close()


def refusal(path):
    with pytest.raises(PluginError) as caught:
        Catalogue(path, PRINT)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path, mode):
    folder = tmp_path / "kv"
    folder.mkdir()
    folder.chmod(mode)
    assert refusal(folder) == (
        f"--plugin kvshare: disk_path={folder}: can be written to by others; chmod go-w {folder}"
    )


@pytest.mark.parametrize("name", [PRINT, f"{PRINT}/rank0"])
def test_so_is_one_below_it(tmp_path, name):
    folder = tmp_path / "kv"
    Catalogue(folder, PRINT).close()
    (folder / name).chmod(0o770)
    assert "can be written to by others" in refusal(folder)


def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert "belongs to another user" in refusal(tmp_path)


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "kv").write_text("")
    assert "cannot be used" in refusal(tmp_path / "kv")
    assert "cannot be used" in refusal(tmp_path / "kv" / "below")


def test_everything_is_for_the_owners_eyes(tmp_path):
    before = os.umask(0)
    try:
        catalogue = Catalogue(tmp_path / "kv", PRINT)
        tier = DiskTier(rank_folder(tmp_path / "kv" / PRINT, 1), SHAPE, CPU)
        tier.write(5, some_label(16), random_kv(16), None)
        written(tier)
    finally:
        os.umask(before)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "kv").rglob("*")}
    found[tmp_path / "kv"] = stat.S_IMODE((tmp_path / "kv").stat().st_mode)
    assert len(found) == 8
    for path, mode in found.items():
        assert mode == (0o700 if path.is_dir() else 0o600), path
    tier.close()
    catalogue.close()


def test_a_second_server_is_refused_until_the_first_ends(tmp_path):
    first = Catalogue(tmp_path, PRINT)
    assert refusal(tmp_path) == (
        f"--plugin kvshare: disk_path={tmp_path}: another server with this model uses it; "
        "give each server a folder of its own"
    )
    # Another model's server has its own folder and the same secret.
    other = Catalogue(tmp_path, "f" * 16)
    assert other.domain_key == first.domain_key
    first.close()
    Catalogue(tmp_path, PRINT).close()
    other.close()


def test_the_secret_is_random_and_lasts(tmp_path):
    keys = []
    for folder in ("a", "a", "b"):
        catalogue = Catalogue(tmp_path / folder, PRINT)
        keys.append(catalogue.domain_key)
        catalogue.close()
    assert keys[0] == keys[1] != keys[2]
    assert len(keys[0]) == SECRET_BYTES
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("fault", ["short", "long", "open", "link"])
def test_a_secret_that_is_damaged_or_open_is_refused(tmp_path, fault):
    Catalogue(tmp_path, PRINT).close()
    key = tmp_path / "domain.key"
    if fault == "open":
        key.chmod(0o640)
    elif fault == "link":
        key.rename(tmp_path / "elsewhere")
        key.symlink_to(tmp_path / "elsewhere")
    else:
        key.write_bytes(b"x" * (SECRET_BYTES + (1 if fault == "long" else -1)))
    assert "domain.key" in refusal(tmp_path) or fault == "link"


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


@pytest.fixture
def tier(tmp_path):
    made = DiskTier(tmp_path / "rank0", SHAPE, CPU)
    yield made
    made.close()


def full(*args):
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_told_once_and_leaves_no_half_file(tier, monkeypatch, caplog):
    monkeypatch.setattr("vllm_plugins.kv_connectors.kvshare.disk.logger.propagate", True)
    monkeypatch.setattr(segment_file, "_write_all", full)
    with caplog.at_level("WARNING"):
        for key in range(3):
            tier.write(key, some_label(16), random_kv(16), None)
        written(tier)
    assert not any(tier.is_writing(key) or key in tier for key in range(3))
    assert list(tier._folder.iterdir()) == []
    assert [r.message for r in caplog.records if "cannot write" in r.message] == [
        "kvshare: cannot write to disk, nothing is kept there: [Errno 28] No space left on device"
    ]
    monkeypatch.undo()
    tier.write(9, some_label(16), random_kv(16), None)
    written(tier)
    assert bits(tier.read(9).result(timeout=20)) == bits(random_kv(16))


def test_files_that_are_not_known_go_and_what_is_missing_is_told(tier):
    for key in (1, 2, 3):
        tier.write(key, some_label(16), random_kv(16), None)
    written(tier)
    (tier._folder / "9.123.tmp").write_text("half a segment of an earlier life")
    assert tier.keep_only([2, 3, 4]) == {4}
    written(tier)
    assert sorted(p.name for p in tier._folder.iterdir()) == ["2.safetensors", "3.safetensors"]
    assert 1 not in tier


def test_closing_writes_what_is_left(tmp_path):
    one = DiskTier(tmp_path / "rank0", SHAPE, CPU)
    for key in range(20):
        one.write(key, some_label(16), random_kv(16), None)
    one.close()
    two = DiskTier(tmp_path / "rank0", SHAPE, CPU)
    assert two.keep_only(range(20)) == set()
    two.close()


def test_a_folder_is_made_with_those_above_it(tmp_path):
    assert private_folder(tmp_path / "a" / "b") == Path(tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
