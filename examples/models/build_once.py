"""Make a model folder once: complete or not at all, by one process at a time, with a stamp."""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CACHE = Path(__file__).resolve().parent.parent.parent / ".cache" / "models"
_STAMP_FILE = "made_from.json"


def build_once(out: Path, made_from: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """Return `out`, made by `build` unless it was already made from the same.

    Args:
        out: the folder wanted.
        made_from: everything that its contents depend on; plain JSON.
        build: fills the empty folder it is given; may put scratch files beside that folder.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_made_from(out, made_from):
            _build(out, made_from, build)
    return out


def _is_made_from(folder: Path, made_from: dict[str, Any]) -> bool:
    stamp = folder / _STAMP_FILE
    return stamp.exists() and json.loads(stamp.read_text()) == made_from


def _build(out: Path, made_from: dict[str, Any], build: Callable[[Path], None]) -> None:
    # Beside `out`, because a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        model = Path(scratch) / "model"
        model.mkdir()
        build(model)
        (model / _STAMP_FILE).write_text(json.dumps(made_from, indent=1))
        if out.exists():
            shutil.rmtree(out)
        model.rename(out)
