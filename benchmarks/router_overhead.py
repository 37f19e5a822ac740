"""What the router costs: time to the first token, time per token, and requests per second.

    python benchmarks/router_overhead.py [--rounds 5] [--seconds 4] [--out FILE]

A prefill and a decode instance are played by one process that computes nothing, so that all time
is the path's own. The router is the real command in a process of its own, alone on the first CPU
where there are several; the instances and the client share the others. Every round measures in turn

- `first`: a stream's first byte, one request at a time. Without the router the same client asks the
  prefill instance and then the decode instance itself, as the router does.
- `token`: how long after the decode instance wrote a token the client has it, at a rate that keeps
  nobody busy. Both read the same monotonic clock.
- `requests`: short requests without streaming per second, as many at a time as --clients.
- `tokens`: tokens per second through the router, as fast as the decode instance writes them.

`cpu` is the router's own processor time for it, which other work on the machine disturbs less than
the clock on the wall. Medians over the rounds, with the least and the largest round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_OUT = ROOT / "benchmarks" / "results" / "router_overhead.json"
BODY = {"model": "tiny", "prompt": "a short prompt " * 8, "temperature": 0}
TOKEN = {
    "id": "cmpl-0", "object": "text_completion", "created": 0, "model": "tiny",
    "choices": [{"index": 0, "text": " token", "logprobs": None, "finish_reason": None}],
}  # fmt: skip
TRANSFER = {"do_remote_prefill": True, "remote_engine_id": "e", "remote_block_ids": [[1, 2, 3]]}
WHOLE = {
    "id": "cmpl-0", "object": "text_completion", "created": 0, "model": "tiny",
    "choices": [{"index": 0, "text": " a short answer", "finish_reason": "length"}],
    "usage": {"prompt_tokens": 24, "completion_tokens": 4, "total_tokens": 28},
}  # fmt: skip
DONE = b"data: [DONE]\n\n"
# Tokens per second and seconds of a stream that keeps nobody busy; streams that keep all busy.
RATE_PER_STREAM, SLICE_S, STREAMS = 200.0, 0.25, 16


class Instance(asyncio.Protocol):
    """Plays both instances, with as little work per request as possible."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin a connection."""
        self._transport: Any = transport
        self._got = b""

    def data_received(self, data: bytes) -> None:
        """Answer the requests that are whole."""
        self._got += data
        while True:
            head, found, rest = self._got.partition(b"\r\n\r\n")
            if not found:
                return
            length = _content_length(head)
            if len(rest) < length:
                return
            self._got = rest[length:]
            self._answer(head.split(b" ", 2)[1], rest[:length])

    def _answer(self, path: bytes, raw: bytes) -> None:
        if path == b"/v1/models":
            self._whole({"data": [{"id": "tiny", "max_model_len": 4096}]})
        elif not raw:
            self._whole({})
        else:
            body = json.loads(raw)
            if body.get("stream"):
                self._stream(body["max_tokens"], body.get("user"))
            else:
                transfer = (body.get("kv_transfer_params") or {}).get("do_remote_decode")
                self._whole(WHOLE | ({"kv_transfer_params": TRANSFER} if transfer else {}))

    def _whole(self, value: Mapping[str, Any]) -> None:
        body = json.dumps(value).encode()
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (len(body), body)
        )

    def _stream(self, tokens: int, rate: str | None) -> None:
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        self._tokens(tokens, 1 / float(rate) if rate else 0.0)

    def _tokens(self, left: int, pause_s: float) -> None:
        if self._transport.is_closing():
            return
        if not left:
            self._piece(DONE)
            self._transport.write(b"0\r\n\r\n")
            return
        self._piece(b"data: " + json.dumps(TOKEN | {"sent": time.monotonic()}).encode() + b"\n\n")
        loop = asyncio.get_running_loop()
        loop.call_later(pause_s, self._tokens, left - 1, pause_s)

    def _piece(self, data: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


async def serve_instances(ports: Sequence[int]) -> None:
    """Play the instances until the process is ended."""
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(Instance, "127.0.0.1", port) for port in ports]
    await asyncio.gather(*(server.serve_forever() for server in servers))


class Connection:
    """A client's connection, which sends one request at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def open(self) -> Connection:
        """Connect."""
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    def close(self) -> None:
        """End the connection."""
        self._writer.close()

    async def whole(self, fields: Mapping[str, Any]) -> bytes:
        """Send a request and return its answer."""
        head = await self._ask(fields)
        return await self._reader.readexactly(_content_length(head))

    async def stream(self, fields: Mapping[str, Any]) -> tuple[float, list[float]]:
        """Send a streamed request.

        Returns:
            Seconds to its first byte, and each token's seconds on the way.
        """
        began = time.perf_counter()
        await self._ask({**fields, "stream": True})
        delays, first = [], 0.0
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            data = await self._reader.readexactly(size + 2)
            now = time.monotonic()
            first = first or time.perf_counter() - began
            for event in data.split(b"\n\n"):
                _, found, sent = event.partition(b'"sent": ')
                if found:
                    delays.append(now - float(sent.rstrip(b"}\r\n")))
        await self._reader.readexactly(2)
        return first, delays

    async def _ask(self, fields: Mapping[str, Any]) -> bytes:
        body = json.dumps({**BODY, **fields}).encode()
        self._writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        head = await self._reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n")[0]:
            raise SystemExit(f"answered {head!r}")
        return head


async def measure_first(router: int, prefill: int, decode: int, seconds: float) -> dict[str, float]:
    """Return the median times to the first byte in ms, with the router and without."""
    through = await Connection(router).open()
    p, d = await Connection(prefill).open(), await Connection(decode).open()
    with_router, without = [], []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        with_router.append((await through.stream({"max_tokens": 1}))[0])
        began = time.perf_counter()
        answer = json.loads(
            await p.whole({"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}})
        )
        transfer = answer["kv_transfer_params"]
        taken = time.perf_counter() - began
        without.append(
            taken + (await d.stream({"max_tokens": 1, "kv_transfer_params": transfer}))[0]
        )
    for connection in (through, p, d):
        connection.close()
    ours, direct = (statistics.median(times) * 1e3 for times in (with_router, without))
    return {"router_ms": ours, "direct_ms": direct, "added_ms": ours - direct}


async def measure_token(router: int, decode: int, seconds: float) -> dict[str, float]:
    """Return the median delays of a token in ms, with the router and without.

    Streams with and without it take turns, so that a slow moment of the machine falls on both.
    """
    ports = {"router": router, "direct": decode}
    connections = {name: await Connection(port).open() for name, port in ports.items()}
    delays: dict[str, list[float]] = {name: [] for name in ports}
    fields = {"max_tokens": int(RATE_PER_STREAM * SLICE_S), "user": str(RATE_PER_STREAM)}
    for _ in range(max(1, int(seconds / SLICE_S / len(ports)))):
        for name, connection in connections.items():
            delays[name] += (await connection.stream(fields))[1]
    for connection in connections.values():
        connection.close()
    result = {f"{name}_ms": statistics.median(some) * 1e3 for name, some in delays.items()}
    tail = {name: sorted(some)[int(len(some) * 0.99)] * 1e3 for name, some in delays.items()}
    result |= {f"{name}_p99_ms": delay for name, delay in tail.items()}
    return {**result, "added_ms": result["router_ms"] - result["direct_ms"]}


async def measure_requests(router: int, pid: int, clients: int, seconds: float) -> dict[str, float]:
    """Return requests per second, and the router's processor time per request in microseconds."""
    connections = [await Connection(router).open() for _ in range(clients)]
    until = time.perf_counter() + seconds

    async def ask(connection: Connection) -> int:
        count = 0
        while time.perf_counter() < until:
            await connection.whole({"max_tokens": 4})
            count += 1
        return count

    cpu, began = cpu_seconds(pid), time.perf_counter()
    count = sum(await asyncio.gather(*map(ask, connections)))
    taken, spent = time.perf_counter() - began, cpu_seconds(pid) - cpu
    for connection in connections:
        connection.close()
    return {"per_s": count / taken, "cpu_us": spent / count * 1e6, "per_cpu_s": count / spent}


async def measure_tokens(router: int, pid: int, seconds: float) -> dict[str, float]:
    """Return tokens per second through the router, and its processor time per token."""
    connections = [await Connection(router).open() for _ in range(STREAMS)]
    cpu, began, count = cpu_seconds(pid), time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        streams = await asyncio.gather(*(each.stream({"max_tokens": 200}) for each in connections))
        count += sum(len(stream) for _, stream in streams)
    taken, spent = time.perf_counter() - began, cpu_seconds(pid) - cpu
    for connection in connections:
        connection.close()
    return {"per_s": count / taken, "cpu_us": spent / count * 1e6}


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def process(words: Sequence[str], cpus: set[int]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command on some CPUs for as long as the block."""
    started = subprocess.Popen(words, cwd=ROOT)
    os.sched_setaffinity(started.pid, cpus)
    try:
        yield started
    finally:
        started.terminate()
        started.wait(timeout=30)


def wait_for(port: int) -> None:
    """Wait until somebody listens."""
    until = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return


async def measure(
    ports: Sequence[int], pid: int, args: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """Measure everything once per round."""
    router, prefill, decode = ports
    rounds: dict[str, list[dict[str, float]]] = {}
    for number in range(-1, args.rounds):
        # The first round warms up.
        seconds = args.seconds if number >= 0 else 0.5
        found = {
            "first": await measure_first(router, prefill, decode, seconds),
            "token": await measure_token(router, decode, seconds),
            "requests": await measure_requests(router, pid, args.clients, seconds),
            "tokens": await measure_tokens(router, pid, seconds),
        }
        if number >= 0:
            for name, figures in found.items():
                rounds.setdefault(name, []).append(figures)
    return rounds


def summarise(rounds: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Return median, least and largest of every figure."""
    return {
        name: {
            figure: {
                "median": round(statistics.median(values), 4),
                "min": round(min(values), 4),
                "max": round(max(values), 4),
            }
            for figure in some[0]
            if (values := [each[figure] for each in some])
        }
        for name, some in rounds.items()
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each part of a round")
    parser.add_argument("--clients", type=int, default=32, help="requests at a time")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--serve", type=int, nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve_instances(args.serve))
        return
    cpus = sorted(os.sched_getaffinity(0))
    alone, others = {cpus[0]}, set(cpus[1:]) or {cpus[0]}
    os.sched_setaffinity(0, others)
    router, prefill, decode = ports = free_ports(3)
    instances = [sys.executable, __file__, "--serve", str(prefill), str(decode)]
    command = [sys.executable, "-m", "vllm_plugins.cli.main", "route", "--port", str(router),
               "--prefill", f"http://127.0.0.1:{prefill}",
               "--decode", f"http://127.0.0.1:{decode}"]  # fmt: skip
    with process(instances, others), process(command, alone) as routing:
        for port in (prefill, decode, router):
            wait_for(port)
        rounds = asyncio.run(measure(ports, routing.pid, args))
    os.sched_setaffinity(0, set(cpus))
    write(args, summarise(rounds), len(others) if others != alone else 0)


def write(args: argparse.Namespace, result: Mapping[str, Any], other_cpus: int) -> None:
    """Write and print the result."""
    from vllm_plugins.bench.machine import describe_machine

    full = {
        "command": f"python benchmarks/router_overhead.py --rounds {args.rounds} "
        f"--seconds {args.seconds:g} --clients {args.clients}",
        "note": "Instances compute nothing; `cpu` figures are the router's own processor time.",
        "router_cpus": 1,
        "client_and_instance_cpus": other_cpus,
        "load_average": os.getloadavg(),
        "machine": describe_machine(),
        "result": result,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(full, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
