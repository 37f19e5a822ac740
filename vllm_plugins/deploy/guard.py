"""Runs a server for a parent, and ends it with all its processes when the parent is gone.

    python -m vllm_plugins.deploy.guard GRACE_S PROGRAM ARGUMENT...

Ray ends a worker by SIGKILL where it must, and its direct children with it, so that nothing of the
worker's could end a server's engine processes. The guard is therefore no child of the worker: it
detaches itself and watches its standard input, which the kernel closes when the worker has gone
however that came. On standard output it writes JSON lines: ``{"pid": ...}``, and at the end
``{"exit": ..., "tail": [...]}`` with the server's last lines.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from vllm_plugins.bench.process import stop_group

TAIL_LINES, LINE_BYTES = 40, 500


def main(arguments: Sequence[str] | None = None) -> int:
    """Detach, run the command and return when it and all its processes have ended."""
    grace, *command = sys.argv[1:] if arguments is None else arguments
    if os.fork():
        os._exit(0)
    os.setsid()
    return _run(command, float(grace))


def _run(command: Sequence[str], grace_s: float) -> int:
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        _say({"exit": 127, "tail": [f"{command[0]}: {error.strerror}"]})
        return 1
    # After the start, as a new program would ignore them too. The end comes by standard input.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _say({"pid": process.pid})
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    pump = threading.Thread(target=_pump, args=(process, tail), daemon=True)
    pump.start()
    _wait_for_either(process)
    # Also where the server has ended by itself: it may have left an engine process behind.
    stop_group(process, grace_s)
    pump.join(timeout=1.0)
    _say({"exit": process.returncode, "tail": list(tail)})
    return 0


def _pump(process: subprocess.Popen[bytes], tail: deque[str]) -> None:
    """Pass the server's output on to standard error, and keep the last lines."""
    assert process.stdout is not None
    while line := process.stdout.readline(LINE_BYTES):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
        tail.append(line.decode(errors="replace").rstrip())


def _wait_for_either(process: subprocess.Popen[bytes]) -> None:
    """Wait until the server has ended or the parent has closed standard input."""
    descriptor = os.pidfd_open(process.pid)
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        selector.select()
    os.close(descriptor)


def _say(message: dict[str, Any]) -> None:
    # Where the parent is gone there is nobody to tell, and the server ends all the same.
    with suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    raise SystemExit(main())
