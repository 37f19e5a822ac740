"""What can go wrong in a benchmark, each with a message for the person who started it."""

from __future__ import annotations

from pathlib import Path

TAIL_LINES = 25


class BenchError(RuntimeError):
    """The benchmark cannot go on; the message says what to change."""


class ProcessFailedError(BenchError):
    """A server or a load generator died, hung or never got ready.

    Args:
        what: The process and what happened to it, in one line.
        log: Its log file; the last lines become part of the message.
    """

    def __init__(self, what: str, log: Path) -> None:
        super().__init__(f"{what}\nlast lines of {log}:\n{tail(log)}")
        self.log = log


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """Return the last lines of a log, indented, or a note that it is empty."""
    text = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(f"  | {line}" for line in text[-lines:]) or "  | (empty)"
