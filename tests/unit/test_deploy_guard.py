"""A server ends with its owner, however the owner ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from vllm_plugins.deploy.guarded import GuardedServer

# A server with a child in its group, which ignores SIGTERM. Both write their process ids.
SERVER = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN) if "stubborn" in sys.argv else None
if "child" not in sys.argv:
    subprocess.Popen([sys.executable, sys.argv[0], sys.argv[1], "child", "stubborn"])
folder = sys.argv[1]
open(os.path.join(folder, str(os.getpid())), "w").close()
print("line of", os.getpid(), flush=True)
while "end" not in sys.argv:
    time.sleep(60)
while len(os.listdir(folder)) < 2:
    time.sleep(0.01)
sys.exit(3)
"""
OWNER = """
import sys, time
from vllm_plugins.deploy.guarded import GuardedServer
server = GuardedServer(sys.argv[1:], {}, 0.2)
print("owner", flush=True)
time.sleep(60)
"""


def wait_for(condition: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def command(folder: Path, *words: str) -> list[str]:
    script = folder.with_suffix(".py")
    folder.mkdir()
    script.write_text(SERVER)
    return [sys.executable, str(script), str(folder), *words]


def pids(folder: Path) -> list[int]:
    """Return the process ids of the server and its child, once both run."""
    wait_for(lambda: len(list(folder.iterdir())) == 2)
    return [int(path.name) for path in folder.iterdir()]


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def guard_of(pid: int) -> psutil.Process:
    """Return the guard, which is the parent of the first process of the server's group."""
    return psutil.Process(os.getpgid(pid)).parent()


def test_a_server_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    server = GuardedServer(command(tmp_path / "s"), {}, 0.2)
    running = pids(tmp_path / "s")
    assert not server.ended.is_set()
    server.stop()
    assert server.ended.is_set()
    assert all(map(gone, running))
    assert server.reason().startswith("ended with signal")
    server.stop()


def test_a_server_that_ends_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    server = GuardedServer(command(tmp_path / "s", "end"), {}, 0.2)
    assert server.ended.wait(15)
    assert all(map(gone, pids(tmp_path / "s")))
    assert server.reason().startswith("ended with exit code 3\n")
    assert "line of" in server.tail[-1]


def test_the_environment_is_the_servers(tmp_path: Path) -> None:
    show = "import os; print(os.environ['KEY'])"
    server = GuardedServer([sys.executable, "-c", show], {"KEY": "value"}, 0.2)
    assert server.ended.wait(15)
    assert server.tail == ["value"]


def test_a_program_that_does_not_exist() -> None:
    server = GuardedServer(["/no/such/program"], {}, 0.2)
    assert server.ended.wait(15)
    assert "No such file" in server.reason()


def test_a_guard_that_is_killed_takes_the_server_with_it(tmp_path: Path) -> None:
    server = GuardedServer(command(tmp_path / "s"), {}, 0.2)
    running = pids(tmp_path / "s")
    guard_of(running[0]).kill()
    assert server.ended.wait(15)
    wait_for(lambda: all(map(gone, running)))
    assert "guard was killed" in server.reason()


def test_a_server_ends_with_an_owner_that_is_killed(tmp_path: Path) -> None:
    words = [sys.executable, "-c", OWNER, *command(tmp_path / "s")]
    owner = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    running = pids(tmp_path / "s")
    guard = guard_of(running[0])
    # As Ray ends a worker: its direct children die with it, and the guard is none.
    assert guard.pid not in [child.pid for child in psutil.Process(owner.pid).children()]
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    wait_for(lambda: all(map(gone, [*running, guard.pid])))


def test_polite_signals_do_not_end_the_guard(tmp_path: Path) -> None:
    server = GuardedServer(command(tmp_path / "s"), {}, 0.2)
    running = pids(tmp_path / "s")
    guard = guard_of(running[0])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        guard.send_signal(number)
    server.stop()
    assert server.reason().startswith("ended with signal")
    assert all(map(gone, running))
