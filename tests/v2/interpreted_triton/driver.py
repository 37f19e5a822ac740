"""The driver of the backend: the host is the device."""

import os

import torch
from triton.backends.driver import DriverBase


class InterpretedDriver(DriverBase):
    """Active wherever kernels are interpreted."""

    @classmethod
    def is_active(cls):
        return os.environ.get("TRITON_INTERPRET") == "1"

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_target(self):
        raise RuntimeError("kernels are interpreted, and something asked to compile one")

    map_python_to_cpp_type = get_benchmarker = get_current_target
