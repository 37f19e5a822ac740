"""Sends a workload to a server with vLLM's own load generator, ``vllm bench serve``.

Its ``timed_trace`` dataset replays arrival times, lengths and contents exactly, in every supported
vLLM, so that traces, stalls and batch jobs are all expressed with it.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vllm_plugins.bench.errors import BenchError, ProcessFailedError
from vllm_plugins.bench.metrics import Trial, read_trial
from vllm_plugins.bench.process import logged_process
from vllm_plugins.bench.server import Server
from vllm_plugins.bench.workloads import Request, trace_lines

# One content identity covers a whole prompt: the dataset cuts prompts into pieces of this size.
WHOLE_PROMPT = 1 << 24
CLIENT_ENVIRONMENT = {
    # Contents are drawn from a generator seeded with the hash of a string.
    "PYTHONHASHSEED": "0",
    # The other load generator of vLLM replaces the process that runs it.
    "VLLM_USE_RUST_BENCH": "0",
}
POLL_S = 0.2


def client_arguments(server: Server, trace: Path, count: int, result: Path) -> list[str]:
    """Arguments of ``vllm bench serve`` that replay a trace file greedily."""
    return [
        *("bench", "serve", "--backend", "openai", "--base-url", server.url),
        *("--model", server.model, "--dataset-name", "timed_trace"),
        *("--dataset-path", str(trace), "--num-prompts", str(count)),
        *("--timed-trace-chunk-hash-size", str(WHOLE_PROMPT), "--temperature", "0"),
        *("--save-result", "--save-detailed", "--result-dir", str(result.parent)),
        *("--result-filename", result.name, "--disable-tqdm"),
        # The server is healthy already, and a test request would warm its prefix cache.
        *("--ready-check-timeout-sec", "0"),
    ]


@dataclass(frozen=True)
class Client:
    """A process that runs ``vllm bench serve`` whenever it is told to.

    Attributes:
        process: The process, with pipes to its standard input and output.
        log: Its log file, over all trials.
    """

    process: subprocess.Popen[bytes]
    log: Path

    def run(self, arguments: Sequence[str], server: Server, timeout_s: float) -> None:
        """Run one command to its end.

        Raises:
            ProcessFailedError: The server or the load generator died, or time ran out.
        """
        assert self.process.stdin
        assert self.process.stdout
        if self.process.poll() is None:
            self.process.stdin.write(json.dumps(list(arguments)).encode() + b"\n")
            self.process.stdin.flush()
        self._wait(self.process.stdout, server, timeout_s)
        reply = self.process.stdout.readline().decode().strip()
        # The load generator reports failed requests and ends well when the server is gone.
        server.check()
        if reply != "0":
            ended = f"failed with exit code {reply}" if reply else "died"
            raise ProcessFailedError(f"vLLM's load generator {ended}", self.log)

    def _wait(self, replies: IO[bytes], server: Server, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        # A pipe whose other end has gone is readable too, so a dead client ends the wait.
        while not select.select([replies], [], [], POLL_S)[0]:
            server.check()
            if time.monotonic() > deadline:
                raise ProcessFailedError(
                    f"a trial took over {timeout_s:.0f} s (--trial-timeout)", self.log
                )


@contextmanager
def load_client(log: Path) -> Iterator[Client]:
    """Keep a load generator ready until the block ends."""
    command = [sys.executable, "-m", "vllm_plugins.bench.client_loop"]
    with logged_process(command, log, CLIENT_ENVIRONMENT, talks=True) as process:
        yield Client(process, log)


def run_load(
    client: Client,
    server: Server,
    requests: Sequence[Request],
    seed: int,
    trial: int,
    stem: Path,
    timeout_s: float,
    tokenizer: str | None = None,
) -> Trial:
    """Run one trial and read its token times.

    Args:
        client: Load generator.
        server: Server to load.
        requests: Workload, in order of arrival.
        seed: Seed of the benchmark.
        trial: Decides the contents of the prompts together with the seed.
        stem: Path of the trial's files without their suffix.
        timeout_s: Longest duration of the trial.
        tokenizer: Tokenizer path or name where it is not the model's own.

    Raises:
        ProcessFailedError: The server or the load generator died, or time ran out.
        BenchError: No request got an answer.
    """
    trace, result = stem.with_suffix(".trace.jsonl"), stem.with_suffix(".client.json")
    trace.write_text("".join(f"{line}\n" for line in trace_lines(requests, seed, trial)))
    arguments = client_arguments(server, trace, len(requests), result)
    if tokenizer:
        arguments += ["--tokenizer", tokenizer]
    client.run(arguments, server, timeout_s)
    return _read(result, server)


def _read(result: Path, server: Server) -> Trial:
    raw: dict[str, Any] = json.loads(result.read_text())
    trial = read_trial(raw)
    if trial.failed.all():
        error = next((e for e in raw["errors"] if e), "no error text")
        raise BenchError(
            f"every request to the server of '{server.label}' failed, the first with: "
            f"{error.strip().splitlines()[-1]} (see {server.log})"
        )
    return trial
