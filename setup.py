"""The parts of the package that a compiler makes; everything else is in ``pyproject.toml``."""

import platform
from pathlib import Path

from setuptools import Extension, setup

FLAGS = ["-std=c++17", "-O3", "-g0", "-fopenmp", "-Wno-psabi"]
SOURCES = {
    "hip": "attention_backends/hip/csrc/hip_cpu.cpp",
    "zipcache": "attention_backends/zipcache/csrc/zipcache_cpu.cpp",
}
# One library for each instruction set, chosen where it runs. vLLM's CPU build needs AVX2 itself.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86 = platform.machine() in ("x86_64", "AMD64")
VARIANTS = {"_avx2": AVX2, "_avx512": AVX512} if X86 else {"": []}

setup(
    ext_modules=[
        Extension(
            f"vllm_plugins.attention_backends.{name}._cpu{suffix}",
            [source],
            depends=[str(header) for header in Path("attention_backends").glob("*/csrc/*.h")],
            extra_compile_args=FLAGS + flags,
            extra_link_args=["-fopenmp"],
            language="c++",
            # Without a compiler the package installs all the same, and computes in torch.
            optional=True,
        )
        for name, source in SOURCES.items()
        for suffix, flags in VARIANTS.items()
    ]
)
