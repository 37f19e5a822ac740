"""Child processes that never outlive the benchmark: each one leads a process group."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

GRACE_S = 10.0


@contextmanager
def logged_process(
    command: Sequence[str],
    log: Path,
    env: Mapping[str, str] | None = None,
    *,
    talks: bool = False,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in a process group of its own and end the group on the way out.

    Args:
        command: Program and arguments.
        log: File that receives standard output and standard error, after the command itself.
        env: Variables added to this process's environment.
        talks: Connect standard input and output to pipes; only standard error is logged then.
    """
    with log.open("wb") as stream:
        stream.write((" ".join(command) + "\n\n").encode())
        stream.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
            stdout=subprocess.PIPE if talks else stream,
            stderr=stream,
            env={**os.environ, **(env or {})},
            # The group also keeps a terminal's Ctrl-C away: it is this process that stops them.
            start_new_session=True,
        )
        try:
            yield process
        finally:
            stop_group(process)


def stop_group(process: subprocess.Popen[bytes], grace_s: float = GRACE_S) -> None:
    """Ask a process group to end, and kill what is left of it after a grace time."""
    deadline = time.monotonic() + grace_s
    _signal_group(process.pid, signal.SIGTERM)
    # A leader that has ended may leave an engine process behind, so the group is what is awaited.
    while _signal_group(process.pid, 0) and time.monotonic() < deadline:
        process.poll()
        time.sleep(0.05)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _signal_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def interrupt_on_termination() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that servers are stopped then too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
