"""What a run leaves behind while it goes: a line of JSON for each step, and a progress bar."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vllm_plugins.errors import PluginError

LOG = "log.jsonl"
# Lines between those that a log file shows, where there is no terminal to draw a bar on.
PLAIN_EVERY = 50


class Journal:
    """Log file and progress bar of one run.

    A line is ``{"step", "seconds", ...}`` with the means over the step's weight, that weight and
    how many samples were cut to the limit of tokens, or ``{"step",
    "evaluation": {...}}``. Lines of steps that a resumed run does again are dropped.

    Args:
        folder: The run's.
        step: Steps done before.
        steps: Steps in all.
        speaks: Whether this process writes and draws at all.
    """

    def __init__(self, folder: Path, step: int, steps: int, speaks: bool) -> None:
        self._speaks, self._steps = speaks, steps
        self._console = Console(quiet=not speaks, stderr=True)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not speaks or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=step, text="")
        self._path = folder / LOG
        if speaks:
            kept = [line for line in read_log(folder) if line["step"] <= step] if step else []
            self._path.write_text("".join(f"{json.dumps(line)}\n" for line in kept))

    def __enter__(self) -> Journal:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def step(self, step: int, figures: Mapping[str, float], seconds: float) -> None:
        """Note a step.

        Args:
            step: Its number, from 1.
            figures: Means over the step's weight; ``loss`` and ``lr`` among them.
            seconds: It took.
        """
        self._write({"step": step, "seconds": round(seconds, 4), **figures})
        text = f"loss {figures['loss']:.4f}  lr {figures['lr']:.2e}  {seconds:.2f} s/step"
        self._bar.update(self._task, completed=step, text=text)
        if self._bar.disable and (step % PLAIN_EVERY == 0 or step == self._steps):
            self._console.print(
                f"step {step}/{self._steps}  {text}", highlight=False, soft_wrap=True
            )

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Note figures on held-out data after a step."""
        self._write({"step": step, "evaluation": dict(figures)})
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self._console.print(
            f"step {step}/{self._steps}  held out: {text}", highlight=False, soft_wrap=True
        )

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._speaks:
            # Opened anew for each line, so that a run that is killed has lost none.
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line)}\n")


def read_log(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's log, without one that a killed run left unfinished.

    Raises:
        PluginError: A line before the last is not JSON.
    """
    path = folder / LOG
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError:
            if number < len(lines):
                raise PluginError(
                    str(path), f"line {number} is not JSON", "remove the line"
                ) from None
