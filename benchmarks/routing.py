"""Least backlog against round robin, in virtual time, on real traces.

    python benchmarks/routing.py --azure FILE.csv --mooncake FILE.jsonl [--segments 5] [--out FILE]

Nothing is served: the library's dispatchers send requests to simulated workers whose step times are
the published ones of OPT-13B on an A100 (DistServe's latency model, tensor parallel 1). Both
dispatchers get the same requests. A load is a share of the throughput that the fleet reaches when
all requests of a segment are there from the start. Every segment of a trace gives one ratio, least
backlog over round robin, so that below 1 is better for times and above 1 for goodput; what is
reported is the median and the range over segments.

The ``uniform`` workload has equal lengths and Poisson arrivals, where least backlog has little to
gain. Fleets: two and four prefill and decode instances, and two of each with one prefill instance
of half the speed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from rich.progress import track

from vllm_plugins.bench.workloads import Lengths, TraceRow, from_trace, load_trace
from vllm_plugins.cli.pictures import pyplot
from vllm_plugins.routing.allocation import Targets, at_rate, attainment, evaluate
from vllm_plugins.routing.stage_times import DecodeTimes, PrefillTimes, StageTimes
from vllm_plugins.routing.virtual import Outcome, Request, Setup, Shape, simulate

TIMES = StageTimes(
    prefill=PrefillTimes(base_ms=18.1025, token_ms=0.101912, token2_ms=7.1223e-6),
    decode=DecodeTimes(base_ms=19.9347, request_ms=0.038507, context_ms=6.2694e-4),
    # 50 GB of KV at 0.82 MB per token, moved at about 80 GB/s.
    kv_blocks=3800,
    block_size=16,
    transfer_ms_per_token=0.01,
)
LOADS = (0.3, 0.5, 0.7, 0.85)
FLEETS = {
    "2P 2D": (Shape(prefill=2, decode=2), ()),
    "4P 4D": (Shape(prefill=4, decode=4), ()),
    "2P 2D, one P at half speed": (Shape(prefill=2, decode=2), (2.0,)),
}
FIGURES = ("ttft_p50", "ttft_p99", "tpot_p99", "attainment")


@dataclass(frozen=True)
class Workload:
    """Segments of requests, and the targets of a good one."""

    segments: tuple[tuple[Request, ...], ...]
    targets: Targets


def load_mooncake(path: Path) -> list[TraceRow]:
    """Read Mooncake's trace: milliseconds and lengths in tokens.

    Its clock ticks every 3 s. Requests of one tick are spread evenly over it, as their arrival at
    the same instant would be an artefact that no rate makes go away.
    """
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    ticks = Counter(row["timestamp"] for row in raw)
    tick_ms = min(b - a for a, b in pairwise(sorted(ticks)))
    rows = []
    for timestamp, group in groupby(raw, key=lambda row: row["timestamp"]):
        for i, row in enumerate(group):
            arrival_ms = timestamp + tick_ms * i / ticks[timestamp]
            rows.append(TraceRow(arrival_ms / 1e3, row["input_length"], row["output_length"]))
    return rows


def segments(
    rows: Sequence[TraceRow], lengths: Lengths, count: int, size: int
) -> tuple[tuple[Request, ...], ...]:
    """Cut a trace into windows, each at a rate of 1 req/s."""
    windows = [from_trace(rows, size, 1.0, lengths, window) for window in range(count)]
    return tuple(
        tuple(Request(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in window)
        for window in windows
    )


def uniform(count: int, size: int) -> Iterator[tuple[Request, ...]]:
    """Yield segments of equal requests with Poisson arrivals."""
    for seed in range(count):
        rng = random.Random(seed)
        now, requests = 0.0, []
        for _ in range(size):
            requests.append(Request(now, 1024, 128))
            now += rng.expovariate(1.0)
        yield tuple(requests)


def workloads(options: argparse.Namespace) -> dict[str, Workload]:
    """Return the workloads by name."""
    count, size = options.segments, options.requests
    azure = segments(load_trace(options.azure), Lengths(), count, size)
    found = {"azure chat": Workload(azure, Targets(1000, 100))}
    if options.mooncake:
        # A quarter, so that the longest prompts fit into an A100 beside others.
        lengths = Lengths(0.25, max_input=16384)
        cut = segments(load_mooncake(options.mooncake), lengths, count, size)
        found["mooncake / 4"] = Workload(cut, Targets(2500, 100))
    found["uniform"] = Workload(tuple(uniform(count, size)), Targets(1000, 100))
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that so large a share does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def figures(outcomes: Sequence[Outcome], targets: Targets) -> dict[str, float]:
    """Return times in seconds, and the attainment."""
    ttft = [one.ttft_s for one in outcomes]
    return {
        "ttft_p50": percentile(ttft, 0.5),
        "ttft_p99": percentile(ttft, 0.99),
        "tpot_p99": percentile([one.tpot_s for one in outcomes], 0.99),
        "attainment": attainment(outcomes, targets),
    }


def saturation(requests: Sequence[Request], setup: Setup) -> float:
    """Return the throughput in req/s when all requests are there from the start."""
    outcomes = simulate([replace(one, arrival_s=0.0) for one in requests], setup)
    return len(requests) / max(one.end_s for one in outcomes)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the median and the range."""
    return {"median": statistics.median(values), "range": [min(values), max(values)]}


def compare(name: str, fleet: str, workload: Workload) -> list[dict[str, Any]]:
    """Return a row for each load, and one for the goodput."""
    shape, slowdown = FLEETS[fleet]
    turns = Setup(TIMES, shape, "round-robin", prefill_slowdown=slowdown)
    backlog = replace(turns, dispatch="backlog")
    rows = []
    for load in LOADS:
        pairs = [
            [figures(simulate(requests, setup), workload.targets) for setup in (backlog, turns)]
            for requests in at_load(workload, turns, load)
        ]
        row: dict[str, Any] = {"workload": name, "fleet": fleet, "load": load}
        for figure in FIGURES[:3]:
            row[f"{figure}_ratio"] = spread([one[figure] / other[figure] for one, other in pairs])
        for side, kind in enumerate(("backlog", "round_robin")):
            row[kind] = {f: spread([pair[side][f] for pair in pairs]) for f in FIGURES}
        rows.append(row)
    goodputs = [
        [evaluate(requests, setup, workload.targets).goodput for setup in (backlog, turns)]
        for requests in workload.segments
    ]
    ratios = [one / other for one, other in goodputs if other]
    sides = {
        kind: spread([pair[side] for pair in goodputs])
        for side, kind in enumerate(("backlog", "round_robin"))
    }
    rows.append({"workload": name, "fleet": fleet, "goodput_ratio": spread(ratios), **sides})
    return rows


def at_load(workload: Workload, setup: Setup, load: float) -> Iterator[list[Request]]:
    """Yield the segments at a share of the fleet's throughput."""
    for requests in workload.segments:
        yield at_rate(requests, load * saturation(requests, setup))


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the ratios over load, a line for each workload and fleet."""
    plt = pyplot()
    shown = ("ttft_p50_ratio", "ttft_p99_ratio", "tpot_p99_ratio")
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), sharey=True, layout="constrained")
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "load" in row:
            lines.setdefault((row["workload"], row["fleet"]), []).append(row)
    styles = dict(zip(FLEETS, ("-", "--", ":"), strict=True))
    colours = dict(
        zip(dict.fromkeys(name for name, _ in lines), ("C0", "C1", "grey"), strict=False)
    )
    for axis, ratio in zip(axes, shown, strict=True):
        for (name, fleet), points in lines.items():
            loads = [row["load"] for row in points]
            medians = [row[ratio]["median"] for row in points]
            low = [row[ratio]["range"][0] for row in points]
            high = [row[ratio]["range"][1] for row in points]
            style = {"color": colours[name], "linestyle": styles[fleet]}
            axis.plot(loads, medians, marker="o", label=f"{name}, {fleet}", **style)
            axis.fill_between(loads, low, high, color=colours[name], alpha=0.06)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_title(ratio.replace("_ratio", "").replace("_", " ").upper())
        axis.set_xlabel("load (share of saturation)")
    axes[0].set_ylabel("least backlog / round robin")
    axes[0].legend(fontsize=7)
    figure.suptitle("Simulated dispatch, OPT-13B stage times; below 1 least backlog is better")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare dispatchers in virtual time.")
    parser.add_argument("--azure", type=Path, help="Azure's trace; the shipped sample otherwise.")
    parser.add_argument("--mooncake", type=Path, help="Mooncake's trace; left out otherwise.")
    parser.add_argument("--segments", type=int, default=5, help="Windows of each trace.")
    parser.add_argument("--requests", type=int, default=1000, help="Requests of a window.")
    parser.add_argument("--out", type=Path, help="JSON file; the picture goes beside it.")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every comparison, print its ratios and write the result."""
    options = parse(arguments)
    loaded = workloads(options)
    cases = [(w, f) for w in loaded.items() for f in FLEETS]
    rows = []
    for (name, workload), fleet in track(cases, "Simulating", transient=True):
        found = compare(name, fleet, workload)
        rows += found
        show(found)
    if options.out:
        options.out.write_text(json.dumps(report(options, loaded, rows), indent=1) + "\n")
        draw(options.out.with_suffix(".png"), rows)
    return 0


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the ratios."""
    for row in rows:
        ratios = {k: v for k, v in row.items() if k.endswith("_ratio")}
        text = ", ".join(
            f"{k} {v['median']:.3f} ({v['range'][0]:.3f} to {v['range'][1]:.3f})"
            for k, v in ratios.items()
        )
        print(f"{row['workload']}; {row['fleet']}; load {row.get('load', '-')}: {text}", flush=True)


def report(
    options: argparse.Namespace, loaded: dict[str, Workload], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the result with what it rests on."""
    traces = [path.name for path in (options.azure, options.mooncake) if path]
    return {
        "what": "Dispatch by least backlog over dispatch in turn, simulated in virtual time",
        "simulated": True,
        "stage_times": "DistServe's published latency model of OPT-13B on an A100-80G, TP 1",
        "times": TIMES.model_dump(),
        "traces": traces or ["shipped Azure sample"],
        "segments": options.segments,
        "requests_per_segment": options.requests,
        "targets_ms": {
            name: {"ttft": one.targets.ttft_ms, "tpot": one.targets.tpot_ms}
            for name, one in loaded.items()
        },
        "rows": list(rows),
    }


if __name__ == "__main__":
    sys.exit(main())
