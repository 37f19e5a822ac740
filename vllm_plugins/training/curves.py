"""The picture of a run: the loss and its terms, and figures on held-out data, by step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_plugins.cli.pictures import pyplot
from vllm_plugins.errors import PluginError
from vllm_plugins.training.journal import LOG, read_log

# Okabe and Ito's colours, told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
NOT_DRAWN = {"step", "seconds", "lr", "weight", "gradient_norm", "cut"}
# Steps over which what is drawn strongly is averaged; every step is drawn faintly.
SMOOTHING = 25

Line = dict[str, float]


def draw_curves(folder: Path, title: str) -> Path:
    """Draw ``curves.png`` from a run's log and return its path.

    Figures whose names share a first word, such as ``pick_pool`` and ``pick_conv``, get a panel of
    their own; the others of a kind share one.

    Raises:
        PluginError: matplotlib is not installed, or the log is broken or empty.
    """
    plt = pyplot()
    lines = list(read_log(folder))
    steps: list[Line] = [line for line in lines if "evaluation" not in line]
    evaluations: list[Line] = [
        {"step": line["step"], **line["evaluation"]} for line in lines if "evaluation" in line
    ]
    kinds = (("training", steps), ("held out", evaluations))
    panels = [
        (f"{kind}{': ' + word if word else ''}", names, of_kind)
        for kind, of_kind in kinds
        for word, names in _panels(of_kind).items()
    ]
    if not panels:
        raise PluginError(str(folder / LOG), "has nothing to draw", "train a step")
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 3.6), layout="constrained", squeeze=False
    )
    for axis, (name, names, of_kind) in zip(axes[0], panels, strict=True):
        _draw(axis, names, of_kind)
        axis.set(title=name, xlabel="step")
    figure.suptitle(title)
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _panels(lines: Sequence[Line]) -> dict[str, list[str]]:
    """Return the names to draw, by the first word that several share, "" for the others."""
    names = dict.fromkeys(name for line in lines for name in line if name not in NOT_DRAWN)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[name.partition("_")[0]].append(name)
    panels: dict[str, list[str]] = defaultdict(list)
    for word, members in groups.items():
        panels[word if len(members) > 1 else ""] += members
    return dict(sorted(panels.items()))


def _draw(axis: Any, names: Sequence[str], lines: Sequence[Line]) -> None:
    for index, name in enumerate(names):
        points = [(line["step"], line[name]) for line in lines if name in line]
        x, y = np.asarray(points, float).T
        colour = COLOURS[index % len(COLOURS)]
        if len(y) > 4 * SMOOTHING:
            axis.plot(x, y, color=colour, alpha=0.15, linewidth=0.6)
            padded = np.pad(y, (SMOOTHING - 1, 0), mode="edge")
            y = np.convolve(padded, np.full(SMOOTHING, 1 / SMOOTHING), "valid")
        mark = "o" if len(y) < SMOOTHING else None
        axis.plot(x, y, color=colour, label=name, marker=mark, markersize=3)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    if "loss" in names:
        # Terms of a loss may lie far apart.
        axis.set_yscale("log")
