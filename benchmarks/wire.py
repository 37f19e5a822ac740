"""How fast the wire moves data between two processes of one host.

    python benchmarks/wire.py [--rounds 15] [--out FILE]

A child process holds the data and this one fetches it, message by message, into a buffer that it
reuses, as a decode server fetches KV: over TCP on loopback, over a Unix socket, and through shared
memory (the child copies in, this process copies out, two small frames on the Unix socket tell when
to). `memcpy` copies as much within this process, once. Every round measures every way at every
size, in random order, so that a slow moment of the machine falls on all of them alike; the table
has the medians over the rounds, the JSON also quartiles, the best round and the machine's load.

`frame` is an empty request and its answer. The last lines are what a checksum costs, which each end
of a socket computes once, and what keyed checksums, which the wire does not have, would cost.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import multiprocessing
import os
import random
import secrets
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

from vllm_plugins.bench.machine import describe_machine
from vllm_plugins.wire.address import Address
from vllm_plugins.wire.connection import Connection, connect
from vllm_plugins.wire.server import Server
from vllm_plugins.wire.shared_memory import SharedBuffer

SIZES = {"64 KiB": 1 << 16, "1 MiB": 1 << 20, "16 MiB": 1 << 24, "256 MiB": 1 << 28}
LARGEST = max(SIZES.values())
# Messages of one sample are at least this long together, so that the clock is fine enough.
SAMPLE_BYTES = 1 << 24
EMPTY_FRAMES = 200
FETCH, ATTACH, FILL = 1, 2, 3
Way = Callable[[int], None]
"""Moves so many bytes."""


def child(secret: bytes, parent: Pipe) -> None:
    """Serve data until the parent closes its end of the pipe."""
    data = memoryview(bytearray(secrets.token_bytes(1 << 20) * (LARGEST >> 20)))

    def serve(connection: Connection) -> None:
        shared = None
        while True:
            frame = connection.receive()
            size = frame.header["size"]
            if frame.kind == FETCH:
                connection.send(FETCH, {}, data[:size])
            elif frame.kind == ATTACH:
                shared = SharedBuffer.attach(connection.receive_descriptor(), size)
            elif shared is not None:
                shared.view[:size] = data[:size]
                connection.send(FILL, {})

    with Server(serve, secret) as server:
        parent.send(server.address.to_json())
        try:
            parent.recv()
        except EOFError:
            return


@contextmanager
def serving(secret: bytes) -> Iterator[Address]:
    """Start the child, and end it on the way out."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(secret, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Address.from_json(ours.recv())
    finally:
        ours.close()
        process.join(10)


def fetching(connection: Connection, place: memoryview) -> Way:
    """Return the way by a socket."""

    def fetch(size: int) -> None:
        connection.request(FETCH, {"size": size}, into=lambda count, header: place[:count])

    return fetch


def sharing(connection: Connection, shared: SharedBuffer, place: memoryview) -> Way:
    """Return the way by shared memory."""
    connection.send(ATTACH, {"size": shared.size})
    connection.send_descriptor(shared.descriptor)

    def fetch(size: int) -> None:
        connection.request(FILL, {"size": size})
        place[:size] = shared.view[:size]

    return fetch


def copying(place: memoryview) -> Way:
    """Return the yardstick: a copy within this process."""
    source = memoryview(bytearray(secrets.token_bytes(1 << 20) * (LARGEST >> 20)))

    def copy(size: int) -> None:
        place[:size] = source[:size]

    return copy


def seconds(move: Callable[[int], object], size: int, count: int) -> float:
    """Return the time that one of `count` messages took, in seconds."""
    start = time.perf_counter()
    for _ in range(count):
        move(size)
    return (time.perf_counter() - start) / count


def measure(ways: Mapping[str, Way], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of a message, by way and size, one per round."""
    cells = [(way, size) for way in ways for size in SIZES]
    frames = [(way, "frame") for way in ("tcp", "unix")]
    taken: dict[str, dict[str, list[float]]] = {way: {} for way in ways}
    order = random.Random(0)
    for i in range(rounds + 1):
        for way, name in order.sample(cells + frames, len(cells + frames)):
            size = SIZES.get(name, 0)
            count = max(1, SAMPLE_BYTES // size) if size else EMPTY_FRAMES
            spent = seconds(ways[way], size, count)
            # The first round touches every page for the first time.
            if i:
                taken[way].setdefault(name, []).append(spent)
    return taken


def checksums(rounds: int) -> dict[str, list[float]]:
    """Return the seconds that checksums of 1 MiB take, by algorithm, one per round."""
    data, key = secrets.token_bytes(1 << 20), secrets.token_bytes(32)
    ways: dict[str, Callable[[int], object]] = {
        "crc32": lambda _: zlib.crc32(data),
        "HMAC-SHA256": lambda _: hmac.digest(key, data, "sha256"),
        "keyed BLAKE2b": lambda _: hashlib.blake2b(data, key=key).digest(),
    }
    return {name: [seconds(way, 1 << 20, 16) for _ in range(rounds)] for name, way in ways.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return quartiles and extremes."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"least": min(values), "low": low, "median": median, "high": high, "most": max(values)}


def summarise(taken: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Return MB/s (10^6 bytes), and for empty frames µs, by way and size."""
    summary: dict[str, Any] = {}
    for way, by_size in taken.items():
        summary[way] = {}
        for name, values in by_size.items():
            if name == "frame":
                summary[way]["frame, µs"] = spread([1e6 * value for value in values])
            else:
                rates = [SIZES[name] / value / 1e6 for value in values]
                summary[way][f"{name}, MB/s"] = spread(rates)
    return summary


def print_table(summary: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Print the medians: a line for each figure, a column for each way."""
    figures = [*(f"{name}, MB/s" for name in SIZES), "frame, µs"]
    print(f"{'':20}" + "".join(f"{way:>16}" for way in summary))
    for figure in figures:
        cells = [row[figure]["median"] if figure in row else None for row in summary.values()]
        print(f"{figure:20}" + "".join(f"{'' if c is None else round(c):>16}" for c in cells))


def run(rounds: int) -> dict[str, Any]:
    """Measure all ways."""
    secret = secrets.token_bytes(32)
    place = memoryview(bytearray(LARGEST))
    with (
        serving(secret) as address,
        connect(replace(address, unix=""), secret) as tcp,
        connect(address, secret) as unix,
        connect(address, secret) as beside,
        SharedBuffer.create(LARGEST) as shared,
    ):
        ways = {
            "tcp": fetching(tcp, place),
            "unix": fetching(unix, place),
            "shared memory": sharing(beside, shared, place),
            "memcpy": copying(place),
        }
        return summarise(measure(ways, rounds))


def main() -> int:
    """Measure, print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--note", default="", help="what else the machine did, for the result")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    summary = run(options.rounds)
    print_table(summary)
    sums = {
        name: spread([(1 << 20) / value / 1e6 for value in values])
        for name, values in checksums(options.rounds).items()
    }
    for name, rate in sums.items():
        print(f"{name:20}{round(rate['median']):>16} MB/s")
    if options.out:
        report = {
            "command": " ".join(["python", "benchmarks/wire.py", *sys.argv[1:]]),
            "note": options.note,
            "load average, 1 min": {"before": before, "after": os.getloadavg()[0]},
            "machine": describe_machine(),
            "summary": summary,
            "checksums, MB/s": sums,
        }
        options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
