"""Checkpoints of a training run: safetensors for tensors, JSON for counters, each whole or absent.

A checkpoint is a folder ``checkpoint-STEP`` with ``weights.safetensors`` (what is trained),
``optimizer.safetensors`` and ``state.json``. It is written under another name and renamed, so that
a run that is killed while saving leaves the one before.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vllm_plugins.errors import PluginError

FORMAT = 1
MAX_STATE_BYTES = 1 << 20
NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class State:
    """What besides tensors a run continues from.

    The random numbers of a micro-batch are seeded by its number, so the counters are also the
    state of every random number generator.

    Attributes:
        step: Steps of the optimiser that are done.
        batches: Micro-batches that are done, over all processes.
        settings: What must not change when a run continues, such as seed and batch size.
    """

    step: int
    batches: int
    settings: dict[str, Any]


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run, or None."""
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := NAME.fullmatch(p.name))]
    return max(found)[1] if found else None


def save(
    folder: Path, weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, Any], state: State
) -> Path:
    """Write a checkpoint and remove the ones before it, and what killed runs have not finished.

    Args:
        folder: The run's.
        weights: What is trained, by name.
        optimizer: Its state by the parameter's name, as :func:`optimizer_state` returns it.
        state: Counters and settings.
    """
    path = folder / f"checkpoint-{state.step}"
    fresh = folder / f".{path.name}.new"
    for unfinished in folder.glob(".checkpoint-*.new"):
        shutil.rmtree(unfinished, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(_plain(weights), fresh / "weights.safetensors")
    save_file(_plain(optimizer), fresh / "optimizer.safetensors")
    (fresh / "state.json").write_text(json.dumps({"format": FORMAT, **asdict(state)}, indent=1))
    _flush(fresh)
    if path.exists():
        shutil.rmtree(path)
    fresh.rename(path)
    for old in folder.glob("checkpoint-*"):
        if old != path and NAME.fullmatch(old.name):
            shutil.rmtree(old)
    return path


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def _flush(folder: Path) -> None:
    """Have the files on the disk before the name that promises them."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def read_state(path: Path) -> State:
    """Read a checkpoint's counters.

    Raises:
        PluginError: They are not of this format.
    """
    file = path / "state.json"
    try:
        if file.stat().st_size > MAX_STATE_BYTES:
            raise ValueError("too large")
        read = json.loads(file.read_text())
        if read.pop("format") != FORMAT:
            raise ValueError("another format")
        return State(int(read["step"]), int(read["batches"]), dict(read["settings"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PluginError(str(file), f"cannot be read ({error})", "train anew") from None


def load_tensors(path: Path, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read a file of tensors that must have the names and shapes of others.

    Raises:
        PluginError: It cannot be read, or its tensors are others.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PluginError(str(path), f"cannot be read ({error})", "train anew") from None
    here, there = _shapes(expected), _shapes(tensors)
    if here != there:
        name = min(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        raise PluginError(
            str(path),
            f"{name} has shape {there.get(name)}, not {here.get(name)}",
            "resume with the model and options of that run",
        )
    return tensors


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]
) -> dict[str, torch.Tensor]:
    """Return AdamW's state as ``PARAMETER/ENTRY``; parameters never stepped have none."""
    return {
        f"{names[parameter]}/{entry}": torch.as_tensor(value)
        for parameter, entries in optimizer.state.items()
        for entry, value in entries.items()
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], path: Path
) -> None:
    """Give an optimiser the state that :func:`optimizer_state` returned.

    Raises:
        PluginError: It cannot be read, or is of other parameters.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PluginError(str(path), f"cannot be read ({error})", "train anew") from None
    for full, tensor in tensors.items():
        name, _, entry = full.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or (tensor.dim() and tensor.shape != parameter.shape):
            raise PluginError(
                str(path), f"{full} fits no parameter", "resume with the options of that run"
            )
        # The count of steps stays on the host, as AdamW keeps it.
        device = parameter.device if tensor.dim() else "cpu"
        optimizer.state[parameter][entry] = tensor.to(device)
