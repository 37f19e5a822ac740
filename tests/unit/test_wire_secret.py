"""The secret's file, and addresses that come from elsewhere."""

import json
import multiprocessing
import os
import stat

import pytest

from vllm_plugins.errors import PluginError
from vllm_plugins.wire.address import Address, host_id
from vllm_plugins.wire.errors import WireDamagedError
from vllm_plugins.wire.secret import load_secret


def written(path, data: bytes, mode: int = 0o600):
    path.write_bytes(data)
    path.chmod(mode)
    return path


def test_a_file_holds_the_secret_without_white_space_around_it(tmp_path):
    assert load_secret(written(tmp_path / "a", b"x" * 32 + b"\n")) == b"x" * 32
    assert load_secret(written(tmp_path / "b", b"y" * 4096, 0o400)) == b"y" * 4096


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o644, 0o777])
def test_files_that_others_can_reach_are_refused(tmp_path, mode):
    path = written(tmp_path / "secret", b"x" * 32, mode)
    with pytest.raises(PluginError, match=rf"mode {mode:04o}\); set its mode to 0600") as caught:
        load_secret(path)
    assert str(path) in caught.value.where


@pytest.mark.parametrize("data", [b"", b"x" * 31, b"x" * 31 + b"\n" * 10, b"x" * 4097])
def test_secrets_of_the_wrong_length_are_refused(tmp_path, data):
    with pytest.raises(PluginError, match="does not hold 32 to 4096 bytes; make one with"):
        load_secret(written(tmp_path / "secret", data))


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, reason in (
        ("pipe", "not a regular file"),
        (".", "Is a directory"),
        ("none", "No suc"),
    ):
        with pytest.raises(PluginError, match=reason):
            load_secret(tmp_path / name)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_users_servers_share_a_secret_that_is_made_once(home):
    first = load_secret(None)
    path = home / ".config" / "vllm-plugins" / "wire.secret"
    assert len(first) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert load_secret(None) == load_secret(path) == first
    assert [entry.name for entry in path.parent.iterdir()] == ["wire.secret"]


def test_a_users_own_secret_is_refused_too_when_others_can_reach_it(home):
    load_secret(None)
    (home / ".config" / "vllm-plugins" / "wire.secret").chmod(0o644)
    with pytest.raises(PluginError, match="others may read"):
        load_secret(None)


def test_a_home_that_cannot_be_written_to_is_refused(home):
    (home / ".config").write_text("a file where a folder should be")
    with pytest.raises(PluginError, match=r"none can be made: .*; name a file that holds one"):
        load_secret(None)


def _load(start, secrets):
    start.wait()
    secrets.put(load_secret(None))


def test_processes_that_start_together_get_one_secret(home):
    context = multiprocessing.get_context("fork")
    start, secrets = context.Event(), context.Queue()
    processes = [context.Process(target=_load, args=(start, secrets)) for _ in range(8)]
    for process in processes:
        process.start()
    start.set()
    found = {secrets.get(timeout=20) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1


def test_addresses_travel_as_json():
    address = Address("10.0.0.7", 4001, "vllm-plugins-" + "a" * 32, host_id())
    assert Address.from_json(json.loads(json.dumps(address.to_json()))) == address
    assert Address.from_json({"host": "node-1.example", "port": 1}) == Address("node-1.example", 1)
    assert str(Address("::1", 80)) == "[::1]:80"


def test_a_host_knows_itself():
    assert host_id() == host_id()
    assert len(host_id()) == 32


GOOD = {"host": "h", "port": 1, "unix": "vllm-plugins-" + "a" * 32, "host_id": "0" * 32}


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "127.0.0.1:80",
        {},
        {"host": "h"},
        {**GOOD, "more": 1},
        {**GOOD, "host": ""},
        {**GOOD, "host": 7},
        {**GOOD, "host": "h" * 254},
        {**GOOD, "host": "a b"},
        {**GOOD, "host": "a\0"},
        {**GOOD, "host": "a\n"},
        {**GOOD, "port": 0},
        {**GOOD, "port": 65536},
        {**GOOD, "port": True},
        {**GOOD, "port": "80"},
        {**GOOD, "port": 80.0},
        {**GOOD, "unix": "/run/docker.sock"},
        {**GOOD, "unix": "vllm-plugins-x"},
        {**GOOD, "unix": None},
        {**GOOD, "host_id": "x"},
        {**GOOD, "host_id": ["0"]},
    ],
)
def test_addresses_from_elsewhere_are_checked(value):
    Address.from_json(GOOD)
    with pytest.raises(WireDamagedError, match="an address has"):
        Address.from_json(value)
