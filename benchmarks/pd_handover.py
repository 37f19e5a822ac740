"""What handing a prompt's KV over costs, on one machine.

    python benchmarks/pd_handover.py MODEL [--ways shm tcp stream example nixl] [--out FILE.json]

A prefill and a decode instance of the same model run side by side, each on a core of its own. For
every length, way and round, in random order and with fresh prompts, one token is asked for

- of one engine alone (`colocated`),
- of the prefill instance, and then with its reference of the decode instance (`prefill`,
  `decode`),
- of the decode instance again, whose prefix cache has the prompt's whole blocks by then (`cached`);
  what is behind the last of them it computes, while a pull brings that too.

`decode` is what the hand-over adds to the first token, the computation of one token included; its
slope over lengths is what 1000 tokens add. `stream` asks both instances at once, so that layers
leave while the prompt is computed; its `decode` is the whole time. `nixl` is vLLM's NixlConnector
with the same requests, if its package is installed. `example` is vLLM's ExampleConnector, which
writes and reads a file per layer in a folder; it keeps only prompts that ran whole, so that its
instances have a budget of the longest one for a step, and each of them saves what it computes. MB/s
are bytes over the pull's own time in the decode instance's worker.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from one_core import one_core_each

from vllm_plugins.bench.machine import describe_machine
from vllm_plugins.bench.server import Server, free_port, serve

KEY = "vllm_plugins_pd"
LENGTHS = (250, 1000, 2000)
# An instance of NIXL's spins while the other starts.
START_S = 600.0
# What counts the bytes that the decode instance pulled, and the seconds that it took: pd's, NIXL's.
BYTES = ("vllm_plugins:pd_received_bytes_total", "vllm:nixl_bytes_transferred_sum")
SECONDS = ("vllm_plugins:pd_pull_seconds_sum", "vllm:nixl_xfer_time_seconds_sum")


@dataclass(frozen=True)
class Way:
    """One way from the prefill to the decode instance.

    Attributes:
        prefill: Arguments of the prefill instance.
        decode: Arguments of the decode instance.
        streams: Whether both instances are asked at once.
    """

    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    streams: bool = False

    @classmethod
    def named(cls, name: str, folder: Path, longest: int) -> Way:
        """Return the way of a name.

        Args:
            name: One of those of ``--ways``.
            folder: For what goes through files.
            longest: Tokens of the longest prompt.
        """
        if name == "example":
            storage = {"shared_storage_path": str(folder)}
            config = {"kv_connector": "ExampleConnector", "kv_role": "kv_both",
                      "kv_connector_extra_config": storage}  # fmt: skip
            words: tuple[str, ...] = (
                "--kv-transfer-config", json.dumps(config),
                "--max-num-batched-tokens", str(longest),
            )  # fmt: skip
            return cls(words, words)
        if name == "nixl":
            config = {"kv_connector": "NixlConnector", "kv_role": "kv_both",
                      "kv_buffer_device": "cpu"}  # fmt: skip
            words = ("--kv-transfer-config", json.dumps(config))
            return cls(words, words)
        transport = "shm" if name == "stream" else name
        options = f"transport={transport},min_pull_tokens=1"
        more = ",stream_layers=true" if name == "stream" else ""
        return cls(
            ("--plugin", f"pd:role=prefill,{options}{more}"),
            ("--plugin", f"pd:role=decode,{options}"),
            name == "stream",
        )


class Pair:
    """A prefill and a decode instance."""

    def __init__(self, prefill: Server, decode: Server, way: Way) -> None:
        self.prefill, self.decode, self.way = prefill, decode, way
        self.peers: Any = None

    def ask(self, server: Server, prompt: list[int], params: Any = None) -> tuple[float, Any]:
        """Ask for one token; return the seconds that it took, and the answer."""
        body = {"model": server.model, "prompt": prompt, "max_tokens": 1, "temperature": 0,
                "ignore_eos": True, "kv_transfer_params": params}  # fmt: skip
        request = urllib.request.Request(
            f"{server.url}/v1/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        start = time.perf_counter()
        with urllib.request.urlopen(request, timeout=300) as answer:
            found = json.load(answer)
        return time.perf_counter() - start, found

    def hand_over(self, prompt: list[int]) -> dict[str, float]:
        """Prefill here, decode there; return seconds, and text for the check."""
        wanted: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
        if self.way.streams and self.peers:
            return self._stream(prompt, wanted)
        prefill_s, answer = self.ask(self.prefill, prompt, wanted)
        params = answer.get("kv_transfer_params")
        self.peers = (params or {}).get(KEY, {}).get("peers")
        before = self.pulled()
        decode_s, answer = self.ask(self.decode, prompt, params)
        pulled, seconds = (a - b for a, b in zip(self.pulled(), before, strict=True))
        speed = pulled / seconds / 1e6 if seconds else 0.0
        return {"prefill": prefill_s, "decode": decode_s, "MB/s": speed, "MB": pulled / 1e6}

    def _stream(self, prompt: list[int], wanted: dict[str, Any]) -> dict[str, float]:
        name = uuid.uuid4().hex
        wanted[KEY] = {"transfer_id": name, "stream": True}
        reference = {"version": 1, "transfer_id": name, "peers": self.peers}
        with ThreadPoolExecutor(1) as pool:
            prefilled = pool.submit(self.ask, self.prefill, prompt, wanted)
            params = {"do_remote_prefill": True, KEY: reference}
            decode_s, _ = self.ask(self.decode, prompt, params)
            prefilled.result()
        return {"prefill": 0.0, "decode": decode_s}

    def pulled(self) -> tuple[float, float]:
        """Return the bytes pulled so far and the seconds that it took."""
        found = {"bytes": 0.0, "seconds": 0.0}
        with urllib.request.urlopen(f"{self.decode.url}/metrics", timeout=30) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith(BYTES):
                    found["bytes"] += float(line.rsplit(" ", 1)[1])
                elif line.startswith(SECONDS):
                    found["seconds"] += float(line.rsplit(" ", 1)[1])
        return found["bytes"], found["seconds"]

    def sample(self, length: int, draw: random.Random) -> dict[str, float]:
        """Measure one round of one length."""
        alone, handed = ([draw.randrange(5, 400) for _ in range(length)] for _ in range(2))
        colocated, _ = self.ask(self.decode, alone)
        times = self.hand_over(handed)
        cached, _ = self.ask(self.decode, handed)
        return {"colocated": colocated, **times, "cached": cached}


@contextmanager
def pair(model: Path, name: str, arguments: Sequence[str], longest: int) -> Iterator[Pair]:
    """Run a prefill and a decode instance."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        way = Way.named(name, Path(folder) / "kv", longest)
        sides = []
        for side, words in (("prefill", way.prefill), ("decode", way.decode)):
            # Both would listen on the same port.
            os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(free_port())
            log = Path(folder) / side
            words = [*arguments, *words]
            sides.append(stack.enter_context(serve(str(model), words, side, log, START_S)))
        yield Pair(sides[0], sides[1], way)


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--ways", nargs="+", default=["shm", "tcp", "stream", "example", "nixl"])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    one_core_each()
    arguments = ["--max-model-len", str(max(args.lengths) + 64), "--enforce-eager",
                 "--max-num-batched-tokens", "1024", "--dtype", "bfloat16"]  # fmt: skip
    draw = random.Random(args.seed)
    results: dict[str, Any] = {}
    for name in args.ways:
        if name == "nixl" and importlib.util.find_spec("nixl") is None:
            results[name] = "the nixl package is not installed"
            continue
        with pair(args.model, name, arguments, max(args.lengths)) as instances:
            for length in args.lengths:
                instances.sample(length, draw)
            order = [length for length in args.lengths for _ in range(args.rounds)]
            draw.shuffle(order)
            samples = [(length, instances.sample(length, draw)) for length in order]
        results[name] = summary(samples)
        show(name, results[name])
    if args.out is not None:
        command = shlex.join(["python", *sys.argv])
        result = {"command": command, "machine": describe_machine(), "results": results}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def summary(samples: Sequence[tuple[int, dict[str, float]]]) -> dict[str, Any]:
    """Return median and spread of every value by length, and what 1000 tokens add."""
    found: dict[str, Any] = {}
    for length in sorted({length for length, _ in samples}):
        rows = [row for at, row in samples if at == length]
        for row in rows:
            row["over one engine"] = row["prefill"] + row["decode"] - row["colocated"]
        found[str(length)] = {key: spread([row[key] for row in rows]) for key in rows[0]}
    if len(found) > 1:
        points = zip(*((length / 1000, row["decode"]) for length, row in samples), strict=True)
        found["added per 1000 tokens, s"] = statistics.linear_regression(*points)[0]
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return least, median and most."""
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


def show(name: str, found: dict[str, Any]) -> None:
    """Print one way's results."""
    for length, values in found.items():
        if isinstance(values, dict):
            cells = ", ".join(f"{key} {value['median']:.3f}" for key, value in values.items())
            print(f"{name} {length}: {cells}", flush=True)
        else:
            print(f"{name}: {length} {values:.4f}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
