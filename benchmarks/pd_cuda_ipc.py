"""How fast a prompt's KV moves between two processes on one GPU, and what it does to decoding.

    python benchmarks/pd_cuda_ipc.py [--tokens 1000 4000 16000] [--rounds 9] [--out FILE.json]

Needs CUDA. A child process has a prefill worker's KV cache (by default of Llama-3.1-8B's form), and
this one pulls prompts out of it as a decode worker does, through the real workers and wire:

- `cuda_ipc`: out of the mapped cache, from device to device;
- `shared_memory`: through host memory, which is what `auto` falls back to;
- `gather`: no hand-over, the same blocks from one cache to another within this process, as one
  copy per layer, which is what a pull cannot beat with these kernels;
- `memcpy`: as many contiguous bytes within this process.

GB/s are bytes of KV over the pull's own time (10⁹ bytes; a copy reads and writes each once). Every
round measures every way at every length, in random order; medians, and the best behind them.

Then a stream of decode-like steps runs (a CUDA graph of matrix products that read as many bytes of
weights as `--weights-gb` says), alone and while prompts are pulled without a break: medians and
99th percentiles of the steps' times on the device.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import secrets
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import torch

from vllm_plugins.bench.machine import describe_machine
from vllm_plugins.kv_connectors.pd.decode_worker import DecodeWorker
from vllm_plugins.kv_connectors.pd.direct import export_caches
from vllm_plugins.kv_connectors.pd.direct_cuda import CudaCaches
from vllm_plugins.kv_connectors.pd.direct_peers import DirectPeers
from vllm_plugins.kv_connectors.pd.geometry import Heads
from vllm_plugins.kv_connectors.pd.orders import Load
from vllm_plugins.kv_connectors.pd.pages import Pages
from vllm_plugins.kv_connectors.pd.peers import PeerConnections
from vllm_plugins.kv_connectors.pd.prefill_worker import PrefillWorker
from vllm_plugins.kv_connectors.pd.protocol import Span
from vllm_plugins.kv_connectors.pd.reference import Peer, Reference
from vllm_plugins.wire.server import Server

LAYERS, HEADS, SLOTS, WIDTH = 32, 8, 16, 256
DEVICE = torch.device("cuda", 0)
GENERATION, DIGEST = "0" * 16, "0" * 32
TIMEOUT_S = 60.0
# Of the matrices of a decode-like step, and its batch.
SIDE, BATCH = 8192, 32


def pages(blocks: int) -> Pages:
    """Return a worker's cache on the device, of random numbers."""
    shape = (blocks, HEADS, SLOTS, WIDTH)
    caches = {
        f"model.layers.{i}.attn": torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)
        for i in range(LAYERS)
    }
    return Pages(caches, blocks, SLOTS, Heads(0, HEADS), "same")


def child(secret: bytes, blocks: int, parent: Pipe) -> None:
    """Serve prompts until the parent closes its end of the pipe."""
    own = pages(blocks)
    groups = dict.fromkeys(own.caches, 0)
    handles = export_caches(own, CudaCaches(DEVICE))
    worker = PrefillWorker(own, groups, GENERATION, 600.0, handles)
    torch.cuda.synchronize()
    with Server(worker.serve, secret, timeout_s=TIMEOUT_S, name="pd") as server:
        parent.send(server.address)
        try:
            while True:
                name, ids = parent.recv()
                worker.outbox.take_freed()
                worker.outbox.hold(name, name, DIGEST, (ids,))
                parent.send(name)
        except EOFError:
            return


class Bench:
    """Both ends.

    Args:
        blocks: Of each pool.
        seed: Of the choice of blocks.
    """

    def __init__(self, blocks: int, seed: int) -> None:
        self.blocks, self.draw = blocks, random.Random(seed)
        secret = secrets.token_bytes(32)
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=child, args=(secret, blocks, theirs))
        self.process.start()
        theirs.close()
        self.own = pages(blocks)
        self.peer = Peer(self.pipe.recv(), GENERATION)
        groups = dict.fromkeys(self.own.caches, 0)
        self.workers: dict[str, DecodeWorker] = {}
        for way in ("cuda_ipc", "shared_memory"):
            links = PeerConnections(secret, TIMEOUT_S, TIMEOUT_S)
            direct = DirectPeers(CudaCaches(DEVICE), self.own, links, required=True)
            self.workers[way] = DecodeWorker(
                self.own, groups, 0, links, share_memory=True,
                direct=direct if way == "cuda_ipc" else None,
            )  # fmt: skip

    def close(self) -> None:
        """End both."""
        for worker in self.workers.values():
            worker.close()
        self.pipe.close()
        self.process.join()

    def bytes_of(self, count: int) -> int:
        """Return the bytes of so many blocks in all layers."""
        return sum(
            count * self.own.block_bytes(layer, Heads(0, HEADS)) for layer in self.own.caches
        )

    def ids(self, count: int) -> list[int]:
        """Return random blocks; block 0 is no prompt's."""
        return self.draw.sample(range(1, self.blocks), count)

    def pull(self, way: str, count: int) -> float:
        """Pull a prompt of so many blocks; return its seconds."""
        name = f"t{self.draw.getrandbits(64):x}"
        self.pipe.send((name, self.ids(count)))
        self.pipe.recv()
        reference = Reference(name, count * SLOTS, DIGEST, (self.peer,))
        load = Load(name, reference, DIGEST, (Span(0, count),), (self.ids(count),))
        worker = self.workers[way]
        worker.start(load)
        while not (results := worker.take_finished(set()))[0]:
            time.sleep(2e-4)
        if results[1]:
            raise RuntimeError(f"a pull through {way} failed: {worker.take_counts()[1]}")
        received, _, seconds = worker.take_counts()
        if set(received) != {way}:
            raise RuntimeError(f"a pull went through {set(received)} instead of {way}")
        return seconds[0]

    def gather(self, count: int) -> float:
        """Copy as many blocks within this process; return the seconds."""
        sources, targets = self.ids(count), self.ids(count)
        start = time.perf_counter()
        self.own.copy(self.own, list(self.own.caches), sources, targets, Heads(0, HEADS))
        return time.perf_counter() - start

    def memcpy(self, count: int) -> float:
        """Copy as many contiguous bytes; return the seconds."""
        source = torch.empty(self.bytes_of(count), dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def measure(self, way: str, count: int) -> float:
        """Return the GB/s of one copy."""
        own: dict[str, Callable[[int], float]] = {"gather": self.gather, "memcpy": self.memcpy}
        seconds = own[way](count) if way in own else self.pull(way, count)
        return self.bytes_of(count) / seconds / 1e9


WAYS = ("cuda_ipc", "shared_memory", "gather", "memcpy")


def speeds(bench: Bench, lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """Measure all ways at all lengths; print and return medians and bests in GB/s."""
    cases = [(way, tokens) for way in WAYS for tokens in lengths]
    found: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for attempt in range(rounds + 1):
        bench.draw.shuffle(cases)
        for way, tokens in cases:
            value = bench.measure(way, -(-tokens // SLOTS))
            # The first round maps the cache and loads kernels.
            if attempt:
                found[way, tokens].append(value)
    rows = []
    print(f"{'way':14} {'tokens':>7} {'MB':>7} {'GB/s':>8} {'best':>8}")
    for (way, tokens), values in found.items():
        size = bench.bytes_of(-(-tokens // SLOTS)) / 1e6
        row = {"way": way, "tokens": tokens, "MB": size, "median_gb_s": statistics.median(values),
               "best_gb_s": max(values)}  # fmt: skip
        rows.append(row)
        print(f"{way:14} {tokens:7} {size:7.0f} {row['median_gb_s']:8.1f} {row['best_gb_s']:8.1f}")
    return rows


class DecodeSteps:
    """Decode-like steps on a stream of their own.

    Args:
        weights_gb: 10⁹ bytes that a step reads.
    """

    def __init__(self, weights_gb: float) -> None:
        count = max(1, round(weights_gb * 1e9 / (2 * SIDE * SIDE)))
        kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": DEVICE}
        weights = [torch.randn(SIDE, SIDE, **kind) / SIDE**0.5 for _ in range(count)]
        state = torch.randn(BATCH, SIDE, **kind)
        self.stream, self.graph = torch.cuda.Stream(DEVICE), torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for weight in weights:
                state = state @ weight
            self.stream.synchronize()
            with torch.cuda.graph(self.graph, stream=self.stream):
                for weight in weights:
                    state = state @ weight
        self._kept = weights, state

    def times(self, steps: int) -> list[float]:
        """Return the milliseconds of each of so many steps."""
        found = []
        with torch.cuda.stream(self.stream):
            for _ in range(steps):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                self.graph.replay()
                end.record()
                end.synchronize()
                found.append(begin.elapsed_time(end))
        return found


@contextmanager
def pulling(bench: Bench, way: str | None, count: int) -> Iterator[list[float]]:
    """Pull one prompt after another meanwhile; collects the GB/s of each."""
    stop, found = threading.Event(), list[float]()

    def run() -> None:
        while way is not None and not stop.is_set():
            found.append(bench.measure(way, count))

    thread = threading.Thread(target=run)
    thread.start()
    yield found
    stop.set()
    thread.join()


def disturbance(bench: Bench, tokens: int, weights_gb: float, steps: int) -> list[dict[str, Any]]:
    """Measure decode-like steps alone and under pulls; print and return them."""
    decode = DecodeSteps(weights_gb)
    decode.times(steps // 4)
    rows = []
    for way in (None, "cuda_ipc", "shared_memory", None):
        with pulling(bench, way, -(-tokens // SLOTS)) as pulls:
            times = sorted(decode.times(steps))
        row = {"pulls": way or "none", "median_ms": statistics.median(times),
               "p99_ms": times[int(0.99 * len(times))],
               "pull_gb_s": statistics.median(pulls) if pulls else None}  # fmt: skip
        rows.append(row)
        print(f"decode steps, pulls: {row['pulls']:14} median {row['median_ms']:.3f} ms, "
              f"p99 {row['p99_ms']:.3f} ms, pulls at {row['pull_gb_s'] or 0:.1f} GB/s")  # fmt: skip
    return rows


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1000, 4000, 16000])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--weights-gb", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    bench = Bench(2 * -(-max(args.tokens) // SLOTS), args.seed)
    try:
        copies = speeds(bench, args.tokens, args.rounds)
        steps = disturbance(bench, max(args.tokens), args.weights_gb, args.steps)
    finally:
        bench.close()
    if args.out is not None:
        result = {"command": shlex.join(["python", *sys.argv]), "machine": describe_machine(),
                  "copies": copies, "decode_steps": steps}  # fmt: skip
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
