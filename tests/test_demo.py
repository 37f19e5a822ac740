"""The demo runs as it stands, on both servers, and shows what it claims to show."""

import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo" / "demo.py"


@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.needs_smollm2
@pytest.mark.timeout(900)
def test_demo_answers_and_reports(smollm2):
    command = [sys.executable, str(DEMO), "--document", "3000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=840, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "A: The capital of France is Paris." in done.stdout
    assert "sarathi_step_token_budget" in done.stdout
    assert "6 of 6 answers are the same text" in done.stdout
