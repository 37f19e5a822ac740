"""Bringing results of the device to the host without a step waiting for them."""

from __future__ import annotations

import numpy as np
import torch


class HostCopy:
    """Tensors on their way to the host, for which no step waits.

    Args:
        tensors: All on one device.

    Attributes:
        comes_later: Whether it is certainly not here yet when it was just begun; the same on every
            rank, which `is_here` need not be.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.comes_later = tensors[0].device.type != "cpu"
        self._copies = [
            torch.empty_like(tensor, device="cpu", pin_memory=self.comes_later).copy_(
                tensor, non_blocking=True
            )
            for tensor in tensors
        ]
        self._done = torch.cuda.Event() if self.comes_later else None
        if self._done is not None:
            self._done.record()

    def is_here(self) -> bool:
        """Whether the copies are complete."""
        return self._done is None or self._done.query()

    def wait(self) -> None:
        """Wait until the copies are complete."""
        if self._done is not None:
            self._done.synchronize()

    def arrays(self) -> list[np.ndarray]:
        """Return the copies, once they are here."""
        return [copy.numpy() for copy in self._copies]
