"""The kernel of direct pulls, without a GPU: in Triton's interpreter, so in another process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_cases():
    pytest.importorskip("triton", reason="Triton, the language of the kernel, is not installed")
    cases = Path(__file__).with_name("pd_direct_kernel.py")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        cwd=cases.parent.parent.parent, env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
