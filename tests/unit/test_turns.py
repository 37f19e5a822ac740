"""Whose turn it is: files that share the machine, and one that has it alone."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tests import turns

HOLDER = """
import sys
from pathlib import Path
from tests import turns
turns.LOCKS = Path(sys.argv[1])
with turns.turn(alone=sys.argv[2] == "alone"):
    print("in", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.delenv(turns.TAKEN)
    running = []

    def started(how):
        words = [sys.executable, "-c", HOLDER, str(tmp_path), how]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        running.append(subprocess.Popen(words, cwd=turns.FOLDER.parent, **pipes))
        os.set_blocking(running[-1].stdout.fileno(), False)
        return running[-1]

    yield started
    for process in running:
        process.kill()
        process.wait()


def is_in(process, seconds=20.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.stdout.read():
            return True
        time.sleep(0.01)
    return False


def leave(process):
    process.stdin.close()
    process.wait()


def test_who_waits_to_be_alone_is_not_overtaken(start):
    first, second = start("shared"), start("shared")
    assert is_in(first)
    assert is_in(second)
    alone = start("alone")
    assert not is_in(alone, 1.0)
    late = start("shared")
    assert not is_in(late, 1.0)
    leave(first)
    leave(second)
    assert is_in(alone)
    assert not is_in(late, 0.2)
    leave(alone)
    assert is_in(late)


def test_what_a_test_starts_shares_its_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "LOCKS", tmp_path)
    monkeypatch.delenv(turns.TAKEN)
    with turns.turn(alone=True), turns.turn(alone=True):
        pass
    assert turns.TAKEN not in os.environ


def test_servers_go_after_who_is_alone_and_the_engine_comes_last():
    def item(path, *marks):
        marked = {name: name for name in marks}
        return SimpleNamespace(path=turns.FOLDER / path, get_closest_marker=marked.get)

    items = [
        item("test_a.py"),
        item("engine/test_a.py"),
        item("compat/test_a.py"),
        item("serve/test_a.py"),
        item("serve/test_b.py", "alone"),
        item("unit/test_a.py"),
    ]
    order = [str(i.path.relative_to(turns.FOLDER)) for i in sorted(items, key=turns.place)]
    # The same place keeps the order of collection.
    assert order == [
        "unit/test_a.py",
        "serve/test_b.py",
        "serve/test_a.py",
        "test_a.py",
        "compat/test_a.py",
        "engine/test_a.py",
    ]
