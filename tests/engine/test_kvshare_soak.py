"""Many requests with preemption and aborts: no block, reference or memory is lost.

    KVSHARE_SOAK_REQUESTS=2000 KVSHARE_SOAK_OUT=FILE.json pytest tests/engine/test_kvshare_soak.py

runs it for as long as one likes, and writes what was found; by default it is short.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.engine.kvshare_engine import NEUTRAL
from tests.engine.kvshare_soak import ENVIRONMENT
from vllm_plugins.bench.machine import describe_machine

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parent.parent.parent
REQUESTS = int(os.environ.get("KVSHARE_SOAK_REQUESTS", "150"))
OUT = os.environ.get("KVSHARE_SOAK_OUT")
BLEND = "kvshare:decode_interval=4,fix_tokens_per_step=150"
# In one the queue is vLLM's own; in the other what is stored puts it in another order at each step.
SPECS = {
    "neutral": NEUTRAL,
    "reordered": f"spf:gamma=0 sarathi:token_budget=150 {BLEND},order=hit_rate",
}
# What is stored, and which prompts were blended, differs from idle time to idle time.
STORED = {"Segment", "Anchors", "Root"}
# Over the second half. It was 1.7 at most in 2,000 requests and up to 4.3 in 150 beside other work.
MOST_GROWN_MIB = 10.0


def keep(found):
    """Add a result to the file that was asked for."""
    if OUT is None:
        return
    path = Path(OUT)
    results = json.loads(path.read_text())["runs"] if path.exists() else []
    runs = [run for run in results if run["spec"] != found["spec"]] + [found]
    command = f"KVSHARE_SOAK_REQUESTS={REQUESTS} pytest tests/engine/test_kvshare_soak.py"
    whole = {"command": command, "machine": describe_machine(), "runs": runs}
    path.write_text(json.dumps(whole, indent=1) + "\n")


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_nothing_is_lost_in_a_long_run(spec, tmp_path):
    out = tmp_path / "soak.json"
    command = [sys.executable, "-m", "tests.engine.kvshare_soak", spec, str(REQUESTS), str(out)]
    environment = ENVIRONMENT | os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads(out.read_text())
    requests, mib = np.array(found["memory"]).T
    late = requests >= REQUESTS / 2
    found["grown_mib"] = float(mib[late][-1] - mib[late][0])
    slope = np.polyfit(requests[late], mib[late], 1)[0]
    found["slope_mib_per_100_requests"] = float(100 * slope)
    keep(found)
    assert found["preempted"] and found["aborted"]
    assert found["answered"] + found["aborted"] == REQUESTS
    assert bool(found["overtaken"]) == ("order=hit_rate" in spec)
    assert not found["wrong"]
    half, end = found["idle"]
    assert half["blocks_leaked"] == end["blocks_leaked"] == 0
    assert half["references"] == end["references"] == 0
    assert half["segments"] and end["segments"]
    assert half["remembered"] == end["remembered"]
    kinds = (half["objects"].keys() | end["objects"].keys()) - STORED
    assert {k: end["objects"].get(k) for k in kinds} == {k: half["objects"].get(k) for k in kinds}
    assert found["grown_mib"] < MOST_GROWN_MIB
    assert slope * REQUESTS / 2 < MOST_GROWN_MIB
