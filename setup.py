"""The parts of the package that a compiler makes; everything else is in ``pyproject.toml``."""

import platform

from setuptools import Extension, setup

FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-Wno-psabi"]
HIP = "attention_backends/hip/csrc"
# One library for each instruction set, chosen where it runs.
VARIANTS = {"": []}
if platform.machine() in ("x86_64", "AMD64"):
    VARIANTS["_avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    VARIANTS["_avx512"] = [
        *VARIANTS["_avx2"],
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
    ]

setup(
    ext_modules=[
        Extension(
            f"vllm_plugins.attention_backends.hip._cpu{suffix}",
            [f"{HIP}/hip_cpu.cpp"],
            depends=[f"{HIP}/{name}.h" for name in ("call", "keys", "kernels", "vec")],
            extra_compile_args=FLAGS + flags,
            extra_link_args=["-fopenmp"],
            language="c++",
            # Without a compiler the package installs all the same, and computes in torch.
            optional=True,
        )
        for suffix, flags in VARIANTS.items()
    ]
)
