"""Make `import torchvision` work beside a CPU build of torch whose torchvision is a CUDA build.

`setup_env.py` copies this file into the development environment and starts it from a `.pth` file.
It repairs that environment only and is not a part of the package. The compiled half of the CUDA
build cannot load without CUDA; the Python half then fails on import because it describes two
operators (`nms`, `qnms`) that the compiled half would have declared. Declaring them, without
any implementation, is enough: image processors and vision models never call them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TRIGGER = "torchvision._meta_registrations"
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
# A torch Library withdraws its operators when it is collected, so it has to live here.
_declared: list[Any] = []


class DeclareMissingOperators:
    """A finder that finds nothing; it only acts just before torchvision describes its operators."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Declare the operators when torchvision is about to need them; never find a module."""
        if name == _TRIGGER and not _declared and not _compiled_half_loaded():
            _declare()
        return None


def _compiled_half_loaded() -> bool:
    """Say whether torchvision's own operators exist, in which case nothing is to be repaired."""
    return bool(sys.modules["torchvision.extension"]._has_ops())  # type: ignore[attr-defined]  # noqa: SLF001


def _declare() -> None:
    """Declare `torchvision::nms` and `torchvision::qnms` without an implementation."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(operator + _SCHEMA)
    _declared.append(library)


def install() -> None:
    """Put the finder first, so that it sees the import before the module is loaded."""
    sys.meta_path.insert(0, DeclareMissingOperators)
