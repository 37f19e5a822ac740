"""A pytest plug-in that runs the Triton kernels of the interpreter's tests on a GPU.

    python -m pytest -p tests.native_triton tests/unit/hip_triton_decode.py ...

The tests keep their tensors on the host, where the interpreter and the references read them. Here
every launch gets copies on the device, storage by storage, so that views that overlap still do,
and what it wrote comes back. What is seen of a kernel's memory is then the same as in the
interpreter; what is compiled, and how it runs, is the GPU's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

DEVICE = "cuda"


class Mirror:
    """Copies of host storages on a device, for one launch."""

    def __init__(self) -> None:
        self._storages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def place(self, value: Any) -> Any:
        """Return a value of a launch with its tensors on the device."""
        if isinstance(value, (tuple, list)):
            return type(value)(map(self.place, value))
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in self._storages:
            host = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._storages[storage.data_ptr()] = host, host.to(DEVICE, copy=True)
        copy = self._storages[storage.data_ptr()][1].untyped_storage()
        empty = torch.empty(0, dtype=value.dtype, device=DEVICE)
        return empty.set_(copy, value.storage_offset(), value.shape, value.stride())

    def bring_back(self) -> None:
        """Copy everything back to the host."""
        for host, copy in self._storages.values():
            host.copy_(copy)


def pytest_configure() -> None:
    """Let every launch go to the device."""
    from triton.runtime.jit import JITFunction

    if not torch.cuda.is_available():
        pytest.exit("there is no GPU", 2)
    launch = JITFunction.run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        mirror = Mirror()
        placed = [mirror.place(value) for value in args]
        found = launch(self, *placed, **{k: mirror.place(v) for k, v in options.items()})
        mirror.bring_back()
        return found

    JITFunction.run = run
