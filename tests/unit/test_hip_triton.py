"""HiP's Triton kernels, without a GPU: what they compute, and that they compile for one.

They run in Triton's interpreter, which is chosen when Triton is imported: so in another process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def run(interpret, *arguments):
    """Run Python with or without Triton's interpreter, whatever this process has chosen."""
    pytest.importorskip("triton", reason="Triton, the language of the kernels, is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    ran = subprocess.run(
        [sys.executable, *arguments], cwd=FOLDER.parent.parent, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("cases", ["scan decode prefill ops", "backend"])
def test_cases(cases):
    files = (str(FOLDER / f"hip_triton_{name}.py") for name in cases.split())
    run(True, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)


def test_kernels_compile_for_hopper_without_spilling():
    run(False, "-m", "tests.unit.hip_triton_compile")
