"""Segments on disk: they come back bit for bit, also to another server, or not at all."""

import os
import stat
import threading
import weakref
from pathlib import Path

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


def test_what_cannot_be_removed_does_not_end_the_writer(tier):
    tier._folder.joinpath("7.safetensors").mkdir()
    tier._folder.joinpath("1.tmp").mkdir()
    tier._sizes[7] = 1
    tier.keep_only([])
    tier.write(9, some_label(16), random_kv(16), None)
    written(tier)
    assert 9 in tier


def test_the_writer_keeps_no_memory(tier):
    kv = random_kv(16)
    alive = weakref.ref(kv)
    tier.write(9, some_label(16), kv, None)
    del kv
    fence = threading.Event()
    tier._jobs.put(fence.set)
    assert fence.wait(20)
    assert alive() is None


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
