"""A server that a replica owns, through the guard that ends it with the replica."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

MAX_LINE_BYTES = 1 << 20
# Beyond the grace time: for the guard itself to end what is left and to say so.
MARGIN_S = 5.0


class GuardedServer:
    """A running server.

    Attributes:
        ended: Set once the server and all its processes have ended.
        tail: Its last lines, once it has ended.

    Args:
        command: Program and arguments.
        environment: Variables beside those of this process.
        grace_s: Time to end by itself when told to, in s; then it is killed.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], grace_s: float
    ) -> None:
        self.ended = threading.Event()
        self.tail: list[str] = []
        self._grace_s = grace_s
        self._pid = 0
        self._exit: int | None = None
        guard = [sys.executable, "-m", "vllm_plugins.deploy.guard", f"{grace_s:g}", *command]
        self._guard = subprocess.Popen(
            guard,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
        )
        # What was started here has handed over to the guard proper and is gone.
        self._guard.wait()
        threading.Thread(target=self._listen, daemon=True).start()

    def stop(self) -> None:
        """Tell the server to end, and wait for it."""
        assert self._guard.stdin is not None
        with suppress(BrokenPipeError):
            self._guard.stdin.close()
        self.ended.wait(self._grace_s + MARGIN_S)

    def reason(self) -> str:
        """Return why the server has ended, with its last lines."""
        said = "\n".join(self.tail)
        if self._exit is None:
            return "its guard was killed, and the server with it"
        how = f"signal {-self._exit}" if self._exit < 0 else f"exit code {self._exit}"
        return f"ended with {how}\n{said}"

    def _listen(self) -> None:
        assert self._guard.stdout is not None
        while line := self._guard.stdout.readline(MAX_LINE_BYTES):
            message = json.loads(line)
            self._pid = message.get("pid", self._pid)
            self._exit = message.get("exit")
            self.tail = message.get("tail", [])
        if self._exit is None and self._pid:
            # The guard itself was killed, so its duty falls to its parent.
            with suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
        self.ended.set()
