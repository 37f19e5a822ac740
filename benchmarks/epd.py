r"""What handing over an image costs against encoding it again, and what early prefill gains.

    OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
        python benchmarks/epd.py [--repeats 20] [--out benchmarks/results/epd.json]

Hand-off: a store in a process of its own publishes items of several models' shapes; this process
fetches each again and again, over the Unix socket and over TCP, into an arena of its own. Writing
an item with its checksum, fetching and checking it, and copying it out are timed apart. Beside them
stands one pass of a vision tower of that size with random weights, on one thread.

Early prefill: an engine with a tiny LLaVA of random weights serves one prompt, a long text before
an image, whose embeddings are held back for a time. Early prefill is on and off in turn, in the
same engine, and the figure is the time from the request to its first token.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "models"))

import numpy as np
from in_process import engine, write

from vllm_plugins.kv_connectors.epd.arena import Arena
from vllm_plugins.kv_connectors.epd.fetcher import Fetcher
from vllm_plugins.kv_connectors.epd.media import Shape, Source
from vllm_plugins.kv_connectors.epd.metrics import Ledger
from vllm_plugins.kv_connectors.epd.protocol import SERVER_LIMITS
from vllm_plugins.kv_connectors.epd.publisher import Publisher
from vllm_plugins.kv_connectors.epd.shared_memory import SharedMemory
from vllm_plugins.metrics import Metrics
from vllm_plugins.wire.address import Address
from vllm_plugins.wire.server import Server

SHAPES = {
    "tiny LLaVA": Shape(16, 128, "float32"),
    "MiniCPM-V slice": Shape(64, 3584, "bfloat16"),
    "LLaVA-1.5-7B image": Shape(576, 4096, "bfloat16"),
    "Qwen2-VL-7B, 1 megapixel": Shape(1280, 3584, "bfloat16"),
}
TOWER_OF = "LLaVA-1.5-7B image"
BLOCK_BYTES, BLOCKS = 1 << 19, 64
SECRET = secrets.token_hex(32)
GENERATION = "0" * 32
DELAYS_S = (0.0, 0.1, 0.2, 0.4, 0.8)


def spread(seconds: list[float]) -> dict[str, float]:
    """Return median and quartiles in milliseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {name: round(1e3 * value, 3) for name, value in
            (("ms", middle), ("ms_low", low), ("ms_high", high))}  # fmt: skip


def publish(secret: str) -> None:
    """Publish one item of each shape until standard input ends; say where they are."""
    from vllm_plugins.kv_connectors.epd.metrics import ALL

    arena = Arena(BLOCKS, BLOCK_BYTES)
    memory = SharedMemory.create(1, BLOCKS, BLOCK_BYTES)
    ledger = Ledger(Metrics(ALL, {}))
    publisher = Publisher(arena, memory, GENERATION, 3600.0, ledger)
    server = Server(publisher.serve, secret.encode(), limits=SERVER_LIMITS)
    server.start()
    items = {}
    for name, shape in SHAPES.items():
        entry = arena.reserve(name, shape, "benchmark")
        assert entry is not None
        for _, _, piece in memory.runs(entry.blocks, shape):
            piece[:] = os.urandom(len(piece))
        digest = memory.digest(entry.blocks, shape)
        arena.complete(entry, digest)
        items[name] = Source(server.address, GENERATION, shape, digest, "0" * 32, 0.0).to_json()
    sys.stdout.write(json.dumps(items) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    server.stop()


class HandOff:
    """This end: an arena, a fetcher, and what is published at the other end."""

    def __init__(self, items: dict[str, Any]) -> None:
        self.items = {name: Source.from_json(item) for name, item in items.items()}
        self.arena = Arena(BLOCKS, BLOCK_BYTES)
        self.memory = SharedMemory.create(1, BLOCKS, BLOCK_BYTES)
        self.fetcher = Fetcher(self.memory, SECRET.encode())

    def fetch(self, name: str, tcp: bool) -> float:
        """Fetch and check an item; return the seconds that it took."""
        source = self.items[name]
        if tcp:
            address = Address(source.address.host, source.address.port)
            source = dataclasses.replace(source, address=address)
        entry = self.arena.reserve(name, source.shape, "benchmark")
        assert entry is not None
        outcome: list[str] = []
        heard = threading.Event()

        def done(missing: str, digest: str) -> None:
            outcome.append(missing)
            heard.set()

        began = time.perf_counter()
        self.fetcher.fetch(entry, source, time.monotonic() + 60, done)
        heard.wait()
        spent = time.perf_counter() - began
        assert outcome == [""], outcome
        self.arena.discard(entry)
        return spent

    def copies(self, name: str) -> tuple[float, float]:
        """Return the seconds of writing an item with its checksum, and of reading it."""
        import torch

        from vllm_plugins.kv_connectors.epd.orders import Copy
        from vllm_plugins.kv_connectors.epd.worker_side import read_rows, write_rows

        shape = self.items[name].shape
        entry = self.arena.reserve(name, shape, "benchmark")
        assert entry is not None
        copy = Copy(name, shape, entry.blocks, entry.sequence)
        embeddings = torch.zeros(shape.num_tokens, shape.width, dtype=getattr(torch, shape.dtype))
        began = time.perf_counter()
        write_rows(self.memory, copy, embeddings)
        written = time.perf_counter()
        read_rows(self.memory, copy)
        read = time.perf_counter()
        self.arena.discard(entry)
        return written - began, read - written


def hand_off(repeats: int) -> dict[str, Any]:
    """Time every stage of every shape; stages and shapes take turns."""
    command = [sys.executable, __file__, "--publish", SECRET]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        here = HandOff(json.loads(process.stdout.readline()))
        stages: dict[str, dict[str, list[float]]] = {
            name: {"write": [], "fetch_unix": [], "fetch_tcp": [], "read": []} for name in SHAPES
        }
        for turn in range(repeats + 2):
            for name in random.Random(turn).sample(list(SHAPES), len(SHAPES)):
                wrote, read = here.copies(name)
                timed = {
                    "write": wrote,
                    "read": read,
                    "fetch_unix": here.fetch(name, tcp=False),
                    "fetch_tcp": here.fetch(name, tcp=True),
                }
                # Each thread connects, and pages are taken, in the first turns.
                for stage, seconds in timed.items() if turn > 1 else ():
                    stages[name][stage].append(seconds)
        here.fetcher.close()
        process.kill()
    return {name: summary(SHAPES[name], found) for name, found in stages.items()}


def summary(shape: Shape, stages: dict[str, list[float]]) -> dict[str, Any]:
    """Return one shape's figures."""
    found: dict[str, Any] = {"bytes": shape.nbytes}
    for stage, seconds in stages.items():
        found[stage] = spread(seconds)
        found[stage]["mb_s"] = round(shape.nbytes / statistics.median(seconds) / 1e6, 1)
    return found


def encode_again(repeats: int) -> dict[str, float]:
    """Time one image through a vision tower of CLIP-L/14 at 336 pixels, with random weights."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.set_num_threads(1)
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    tower = CLIPVisionModel(config).eval()
    pixels = torch.zeros(1, 3, 336, 336)
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats):
            began = time.perf_counter()
            tower(pixels)
            seconds.append(time.perf_counter() - began)
    return spread(seconds)


class Late:
    """Stands before an engine's fetcher and lets fetches begin after a delay."""

    def __init__(self, fetcher: Any) -> None:
        self.fetcher, self.delay_s = fetcher, 0.0

    def fetch(
        self, entry: Any, source: Any, deadline: float, done: Callable[[str, str], None]
    ) -> None:
        """Begin to fetch later."""
        arguments = (entry, source, deadline, done)
        threading.Timer(self.delay_s, self.fetcher.fetch, arguments).start()

    def release(self, source: Any, media: str) -> None:
        """Pass on."""
        self.fetcher.release(source, media)

    def renew(self, source: Any) -> None:
        """Pass on."""
        self.fetcher.renew(source)


def early_prefill(repeats: int, text_tokens: int, secret: Path) -> dict[str, Any]:
    """Time the first token with early prefill on and off in turn, by the image's delay."""
    from vision import tiny_llava

    width, positions = 512, 4096
    model = tiny_llava(width=width, layers=6, positions=positions)
    settings = {
        "max_model_len": positions,
        "max_num_batched_tokens": 512,
        "block_size": 32,
        "enable_prefix_caching": False,
    }
    plugin = f"epd:role=prefill,arena_bytes={1 << 22},secret_file={secret}"
    store = Store(Shape(16, width, "float32"))
    found: dict[float, dict[str, list[float]]] = {d: {"on": [], "off": []} for d in DELAYS_S}
    with engine(model, plugin, **settings) as llm:
        side = llm.llm_engine.engine_core.engine_core.scheduler.ec_connector.scheduler.prefill
        side.fetcher = late = Late(side.fetcher)
        for turn, delay in itertools.product(range(-1, repeats), DELAYS_S):
            for state in random.Random(turn).sample(["on", "off"], 2):
                side.rules = dataclasses.replace(side.rules, early=state == "on")
                late.delay_s = delay
                seconds = first_token(llm, store.publish(f"{turn} {delay} {state}"), text_tokens)
                # The first turn warms up.
                if turn >= 0:
                    found[delay][state].append(seconds)
    store.server.stop()
    return {f"{delay:g} s": compared(both) for delay, both in found.items()}


def compared(both: dict[str, list[float]]) -> dict[str, Any]:
    """Return both states' figures and the median ratio of pairs."""
    ratios = [on / off for on, off in zip(both["on"], both["off"], strict=True)]
    figures: dict[str, Any] = {state: spread(seconds) for state, seconds in both.items()}
    return figures | {"ratio": round(statistics.median(ratios), 3)}


class Store:
    """Publishes one random item under as many ids as are asked for."""

    def __init__(self, shape: Shape) -> None:
        from vllm_plugins.kv_connectors.epd.metrics import ALL

        self.shape = shape
        self.arena = Arena(1024, shape.nbytes)
        self.memory = SharedMemory.create(1, 1024, shape.nbytes)
        ledger = Ledger(Metrics(ALL, {"model_name": "store", "engine": "0"}))
        publisher = Publisher(self.arena, self.memory, GENERATION, 3600.0, ledger)
        self.server = Server(publisher.serve, SECRET.encode(), limits=SERVER_LIMITS)
        self.server.start()

    def publish(self, media: str) -> dict[str, Any]:
        """Return the ``ec_transfer_params`` of a new item."""
        entry = self.arena.reserve(media, self.shape, "benchmark")
        assert entry is not None
        digest = self.memory.digest(entry.blocks, self.shape)
        self.arena.complete(entry, digest)
        source = Source(self.server.address, GENERATION, self.shape, digest, "0" * 32, 0.0)
        return {media: {"item_indices": [0], "vllm_plugins_epd": source.to_json()}}


def first_token(llm: Any, params: dict[str, Any], text_tokens: int) -> float:
    """Return the seconds until the first token of a prompt with text before an image."""
    from PIL import Image
    from vision import IMAGE_TOKEN
    from vllm import SamplingParams

    [media] = params
    rng = np.random.default_rng(0)
    prompt = {
        "prompt_token_ids": [*rng.integers(10, 60, text_tokens).tolist(), IMAGE_TOKEN, 9],
        "multi_modal_data": {"image": [Image.new("RGB", (56, 56))]},
        "multi_modal_uuids": {"image": [media]},
    }
    extra = {"ec_transfer_params": params}
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, extra_args=extra)
    began = time.perf_counter()
    [output] = llm.generate([prompt], sampling, use_tqdm=False)
    assert output.outputs[0].finish_reason == "length"
    return time.perf_counter() - began


def main() -> None:
    """Run all parts and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20, help="turns of each part")
    parser.add_argument("--text-tokens", type=int, default=2000, help="text before the image")
    parser.add_argument("--out", type=Path, help="file for the result")
    parser.add_argument("--publish", metavar="SECRET", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.publish:
        publish(args.publish)
        return
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder) / "secret"
        secret.touch(0o600)
        secret.write_text(SECRET)
        late_image = early_prefill(args.repeats, args.text_tokens, secret)
    result = {
        "hand_off": hand_off(args.repeats),
        "vision_tower": {"of": TOWER_OF, **encode_again(max(4, args.repeats // 4))},
        "text_tokens": args.text_tokens,
        "first_token_by_delay_of_the_image": late_image,
    }
    print(json.dumps(result, indent=1))
    write(args.out, result)


if __name__ == "__main__":
    main()
