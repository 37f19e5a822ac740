"""Finding the compiled CPU kernels of a plug-in.

They are plain shared libraries without Python or torch in them, built when the package is installed
where there is a compiler, once for each instruction set (``setup.py``). Where there are none, a
plug-in does the same in torch.
"""

from __future__ import annotations

import ctypes
import importlib.util

import torch

# What torch calls the instruction sets, and the libraries that they can run, the best first.
LIBRARIES = {"AVX512": ("_cpu_avx512", "_cpu_avx2"), "AVX2": ("_cpu_avx2",)}


def load_cpu_library(package: str, size_function: str, size: int) -> ctypes.CDLL | None:
    """Return a package's kernels for this machine's instructions, or None where none were built.

    Args:
        package: Where they lie.
        size_function: Function that returns the bytes of what they are called with.
        size: Those bytes as Python sees them.

    Raises:
        ImportError: They were built from another version of the source.
    """
    for name in LIBRARIES.get(torch.backends.cpu.get_cpu_capability(), ("_cpu",)):
        spec = importlib.util.find_spec(f"{package}.{name}")
        if spec is None or spec.origin is None:
            continue
        library = ctypes.CDLL(spec.origin)
        if getattr(library, size_function)() != size:
            raise ImportError(f"{spec.origin} is of another version; reinstall vllm-plugins")
        return library
    return None
