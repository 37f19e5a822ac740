"""The whole ``vllm-plugins bench`` on a tiny model: servers, load, files, failures, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.serving import ONE_PROCESS

pytestmark = [pytest.mark.serve]

BENCH = [sys.executable, "-m", "vllm_plugins.cli.main", "bench"]
SERVE = "--enforce-eager --dtype float32 --max-model-len 2048"


def command(model, out, *words):
    return [*BENCH, *words, "--model", str(model), "--out", str(out), "--serve-args", SERVE]


def run(model, out, *words):
    words, env = command(model, out, *words), os.environ | ONE_PROCESS
    return subprocess.run(words, capture_output=True, text=True, timeout=900, check=False, env=env)


def processes_of(out):
    """Logs in the result folder that a running process still writes to."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        # A load generator and an engine name neither: their log file gives them away.
        try:
            streams = {str((entry / "fd" / number).readlink()) for number in ("1", "2")}
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
        found += [stream for stream in streams if stream.startswith(f"{out}/")]
    return found


@pytest.mark.slow
def test_sweep_pairs_capacity_accuracy_and_files(tiny_llama, tmp_path):
    done = run(
        tiny_llama,
        tmp_path,
        *("none", "--variant", "wide=--max-num-batched-tokens 1024"),
        *("--budgets", "64", "--repeats", "1", "--requests", "6", "--rates", "4,8"),
        *("--length-scale", "0.1", "--max-output", "12", "--accuracy-prompts", "2"),
        *("--find-capacity", "--capacity-trials", "2"),
    )
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["outcome"] == "complete"
    trials = [(t["phase"], t["variant"], t["point"]["label"]) for t in result["trials"]]
    best = result["best_static"]
    assert trials[:2] == [("sweep", "stock", "4 req/s"), ("sweep", "stock-64", "4 req/s")]
    assert sorted(trials[2:]) == sorted(
        ("pair", name, point) for name in (best, "wide") for point in ("4 req/s", "8 req/s")
    )
    for trial in result["trials"]:
        summary = trial["summary"]
        assert (summary["requests"], summary["failed"]) == (6, 0)
        assert 0 < summary["ttft_p50_ms"] <= summary["ttft_p99_ms"]
        assert 0 < summary["tbt_p99_ms"] <= summary["tbt_max_ms"]
        assert summary["output_tokens_per_s"] > 0
        # What the server counted is what the trace says: nothing is cut, padded or re-tokenised.
        files = tmp_path / trial["files"]
        lines = files.with_suffix(".trace.jsonl").read_text().splitlines()
        client = json.loads(files.with_suffix(".client.json").read_text())
        assert client["input_lens"] == [json.loads(line)["input_length"] for line in lines]
        assert client["output_lens"] == [json.loads(line)["output_length"] for line in lines]
    paired = [t for t in result["trials"] if t["point"]["label"] == "4 req/s"][2:]
    assert all(len(t["capacity"]["measured"]) == 2 for t in paired)
    assert {c["challenger"] for c in result["comparisons"]} == {"wide"}
    # One tiny float32 model, the same prompts: any budget gives the same greedy tokens.
    assert result["accuracy"] == {f"wide = {best}": 1.0}
    assert (tmp_path / "result.png").stat().st_size > 10_000
    assert list((tmp_path / "logs").glob("*-server.log"))
    assert "95 % interval" in done.stdout
    assert not processes_of(tmp_path)


@pytest.mark.slow
def test_the_plugin_serves_a_stall_beside_stock(tiny_llama, tmp_path):
    done = run(
        tiny_llama,
        tmp_path,
        *("sarathi:tbt_slo_ms=100", "--static", "512", "--workload", "stall", "--repeats", "1"),
        *("--decodes", "3", "--decode-tokens", "1800", "--long-prompt", "1000", "--stalls", "1"),
        *("--stall-start", "1", "--accuracy-prompts", "0"),
    )
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert [t["variant"] for t in result["trials"]] == ["stock-512", "sarathi"]
    for trial in result["trials"]:
        summary = trial["summary"]
        assert (summary["requests"], summary["failed"]) == (4, 0)
        assert summary["stall_tbt_max_ms"] > 0
        assert summary["stall_ttft_p50_ms"] > 0
    # How many decodes cover the prefill is up to the machine; that a shortfall is said is not.
    covered = all(trial["summary"]["stall_decodes"] == 3 for trial in result["trials"])
    assert covered != any("not every decode" in note for note in result["notes"])


def test_a_server_that_cannot_start_ends_the_run_with_its_log(tiny_llama, tmp_path):
    done = run(
        tiny_llama,
        tmp_path,
        *("none", "--variant", "x=--seed 1", "--static", "8", "--no-plot"),
    )
    assert done.returncode == 2
    assert "the server of 'stock-8' did not start" in done.stderr
    assert "max_num_batched_tokens (8) must be greater than or equal to max_num_seqs" in done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["outcome"] == "failed"
    assert not processes_of(tmp_path)


def test_an_interrupt_stops_servers_and_keeps_the_result_file(tiny_llama, tmp_path):
    short = ("--max-input", "256", "--max-output", "64")
    words = command(tiny_llama, tmp_path, "none", "--variant", "x=--seed 1", "--no-plot", *short)
    bench = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "logs" / "sweep-stock-server.log"
    deadline = time.monotonic() + 300
    while not (log.exists() and "EngineCore" in log.read_text()):
        assert bench.poll() is None, bench.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert processes_of(tmp_path), "the check for left-over processes sees them"
    bench.send_signal(signal.SIGINT)
    output, _ = bench.communicate(timeout=120)
    assert bench.returncode == 130, output
    assert json.loads((tmp_path / "result.json").read_text())["outcome"] == "interrupted"
    assert not processes_of(tmp_path)
