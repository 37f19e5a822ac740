"""Tests of other files in another process, where model runner V2 runs (see `rig.py`)."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent


def run_on_v2(file, *arguments):
    """Run a file of tests on model runner V2; fail with what it says, if it does.

    Args:
        file: Below `tests/`.
        *arguments: Of pytest, such as those that choose among the tests.
    """
    pytest.importorskip("triton", reason="Triton, whose kernels V2 has, is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.v2.rig", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*command, str(TESTS / file), *arguments],
        cwd=TESTS.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    # What is chosen runs there if it runs here.
    assert " skipped" not in ran.stdout, ran.stdout
