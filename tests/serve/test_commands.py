"""The stock commands with `--plugin`, as a user types them: they run, or refuse in one line."""

import json
import subprocess
import sys

import pytest

from tests.serving import SERVE_DEFAULTS

pytestmark = pytest.mark.serve

VLLM = (sys.executable, "-m", "vllm_plugins.bench.vllm_command")
IS_ON = "vllm-plugins: sarathi is on (SchedulerHost)"


def vllm(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*VLLM, *words], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "serve MODEL --plugin sarathi:tbt_slo=40",
            "--plugin sarathi: tbt_slo: unknown option; did you mean 'tbt_slo_ms'? options: ",
        ),
        (
            "serve MODEL --plugin sarathi --runner pooling",
            "--plugin sarathi: a pooling model has no decode steps; drop --plugin sarathi",
        ),
        (
            "serve MODEL --api-server-count 2 --plugin spf --scheduling-policy priority",
            "--plugin spf: orders the waiting queue, and so does --scheduling-policy priority; "
            "drop --scheduling-policy or --plugin spf",
        ),
        *(
            (
                f"bench {command} --model MODEL --plugin sarathi --no-enable-chunked-prefill",
                "--plugin sarathi: needs chunked prefill; drop --no-enable-chunked-prefill",
            )
            for command in ("latency", "throughput --dataset-name random")
        ),
    ],
    ids=["option", "model", "api-servers", "latency", "throughput"],
)
def test_refusals_are_one_line_without_a_trace(tiny_llama, words, message):
    done = vllm(*words.replace("MODEL", str(tiny_llama)).split(), *SERVE_DEFAULTS)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.rstrip().splitlines()[-1].startswith(f"vllm: error: {message}")


PROGRAM = """
import sys, vllm_plugins
from vllm import LLM
if __name__ == "__main__":
    LLM(sys.argv[1], enable_chunked_prefill=False, **vllm_plugins.engine_args("sarathi"))
"""


@pytest.mark.parametrize("processes", ["0", "1"])
@pytest.mark.parametrize("allowed", [None, ""], ids=["entry point", "no entry point"])
def test_a_program_gets_one_exception_that_says_why(tiny_llama, monkeypatch, processes, allowed):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", processes)
    if allowed is not None:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    command = [sys.executable, "-c", PROGRAM, str(tiny_llama)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    message = "--plugin sarathi: needs chunked prefill; drop --no-enable-chunked-prefill"
    last = done.stderr.rstrip().splitlines()[-1]
    assert last == f"vllm_plugins.errors.PluginError: {message}"
    shown = done.stderr + done.stdout
    assert shown.count("Traceback") == 1
    assert "Engine core" not in shown


def test_bench_throughput_runs_with_plugins(tiny_llama, tmp_path):
    result = tmp_path / "result.json"
    done = vllm(
        *("bench", "throughput", "--model", str(tiny_llama), *SERVE_DEFAULTS),
        *("--dataset-name", "random", "--random-input-len", "100", "--random-output-len", "4"),
        *("--num-prompts", "6", "--output-json", str(result)),
        *("--plugin", "sarathi:token_budget=64", "--plugin", "spf"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(result.read_text())["num_requests"] == 6
    assert IS_ON in done.stdout + done.stderr


def test_run_batch_runs_with_a_plugin_from_a_file(tiny_llama, tmp_path):
    bodies = [
        {
            "model": str(tiny_llama),
            "messages": [{"role": "user", "content": f"t{i} t{2 * i}"}],
            "max_tokens": 5,
        }
        for i in range(4)
    ]
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for i, body in enumerate(bodies)
    ]
    source, target, config = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "c.yaml"))
    source.write_text("\n".join(map(json.dumps, lines)))
    config.write_text("plugin:\n  sarathi:\n    tbt_slo_ms: 500\n")
    done = vllm(
        *("run-batch", "-i", str(source), "-o", str(target), "--model", str(tiny_llama)),
        *(*SERVE_DEFAULTS, "--config", str(config)),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert {a["custom_id"] for a in answers} == {f"r{i}" for i in range(4)}
    assert all(a["response"]["status_code"] == 200 for a in answers)
    assert IS_ON in done.stdout + done.stderr
