"""``vllm-plugins allocate``: how many workers should encode, prefill and decode."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_plugins.errors import PluginError

if TYPE_CHECKING:
    from vllm_plugins.routing.allocation import Candidate, Targets
    from vllm_plugins.routing.stage_times import StageTimes
    from vllm_plugins.routing.virtual import Request, Shape

HELP = "Choose how many workers encode, prefill and decode, from profiled stage times and a trace."
# A trace of a million requests; what is larger is cut by its owner.
MAX_TRACE_BYTES = 1 << 28
FIRST_PORT = 8100
DRAWN = 8
TRACE_MEND = (
    'write lines such as {"arrival_s": 0.5, "prompt_tokens": 900, "output_tokens": 200, '
    '"images": [576]}, or a CSV file with TIMESTAMP, ContextTokens and GeneratedTokens'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    measured = parser.add_mutually_exclusive_group(required=True)
    measured.add_argument(
        "--times", type=Path, help="JSON file with the stage times of one worker."
    )
    measured.add_argument(
        "--profile", type=Path, help="Cost profile in its place, for requests without images."
    )
    parser.add_argument("--kv-blocks", type=int, help="KV blocks of a worker, for --profile.")
    parser.add_argument(
        "--block-size", type=int, default=16, help="Tokens of a block, for --profile; default 16."
    )
    parser.add_argument(
        "--trace",
        default="azure",
        help="Requests as JSON lines (arrival_s, prompt_tokens with the images' placeholders, "
        "output_tokens, images: encoder tokens of each) or as an Azure CSV file; `azure` for the "
        "shipped sample.",
    )
    parser.add_argument("--workers", type=int, required=True, help="Workers to divide.")
    parser.add_argument("--slo-ttft-ms", type=float, help="Target for the time to first token.")
    parser.add_argument("--slo-tpot-ms", type=float, help="Target for the time per output token.")
    parser.add_argument(
        "--attainment", type=float, default=0.9, help="Share that meets both; default 0.9."
    )
    parser.add_argument(
        "--requests", type=int, default=1000, help="First requests to use; default 1000."
    )
    parser.add_argument(
        "--dispatch",
        choices=("backlog", "round-robin"),
        default="backlog",
        help="The router's dispatch.",
    )
    parser.add_argument(
        "--first-token",
        choices=("decode", "prefill"),
        default="decode",
        help="Which instance computes the first token, as for `vllm-plugins route`.",
    )
    parser.add_argument("--model", default="MODEL", help="Model of the printed commands.")
    parser.add_argument("--out", type=Path, help="JSON file for the result.")
    parser.add_argument("--plot", type=Path, help="Picture of attainment against rate (PNG).")


def run(args: argparse.Namespace) -> int:
    """Search, print the table and the commands, write the result."""
    targets = _targets(args)
    requests = read_requests(args.trace, args.requests)
    times = _times(args, requests)
    candidates = _search(args, requests, times, targets)
    _print(candidates, targets)
    if args.out:
        args.out.write_text(json.dumps(_report(args, times, candidates), indent=1) + "\n")
    if args.plot:
        draw(args.plot, candidates, targets)
    if not candidates[0].goodput:
        raise PluginError(
            "allocate",
            "no split meets the targets at any rate",
            "loosen them, or spread requests of the trace that arrive at the same instant",
        )
    for line in launch_lines(candidates[0].shape, args.model):
        print(line)
    return 0


def _times(args: argparse.Namespace, requests: Sequence[Request]) -> StageTimes:
    from vllm_plugins.routing.stage_times import load_stage_times, times_of

    if args.profile is None:
        return load_stage_times(args.times)
    from vllm_plugins.engine.cost_profile import load_profile

    where = f"--profile {args.profile}"
    if not args.kv_blocks or args.kv_blocks < 1 or args.block_size < 1:
        raise PluginError(
            where,
            "does not say how many KV blocks a worker has",
            "give --kv-blocks, and --block-size if it is not 16, as the server's log has them",
        )
    if any(one.images for one in requests):
        raise PluginError(
            where,
            "does not say how long images take, and the trace has some",
            "write a file for --times (docs/disaggregation.md)",
        )
    return times_of(load_profile(args.profile, where), args.kv_blocks, args.block_size)


def _targets(args: argparse.Namespace) -> Targets:
    from vllm_plugins.routing.allocation import Targets

    if args.slo_ttft_ms is None or args.slo_tpot_ms is None:
        raise PluginError(
            "allocate",
            "goodput needs a target for TTFT and one for TPOT",
            "give --slo-ttft-ms and --slo-tpot-ms",
        )
    return Targets(args.slo_ttft_ms, args.slo_tpot_ms, args.attainment)


def read_requests(trace: str, count: int) -> list[Request]:
    """Read the first requests of a trace, in order of arrival.

    Args:
        trace: A file, or ``azure`` for the shipped sample.
        count: Most requests to take.

    Raises:
        PluginError: The file is missing, too large or malformed, or the count is not over 1.
    """
    from vllm_plugins.bench.errors import BenchError
    from vllm_plugins.bench.workloads import load_trace
    from vllm_plugins.routing.virtual import Request

    if count < 2:
        raise PluginError("--requests", f"{count} requests have no rate", "give at least 2")
    path, where = Path(trace), f"--trace {trace}"
    try:
        if trace != "azure" and path.stat().st_size > MAX_TRACE_BYTES:
            raise PluginError(where, f"is larger than {MAX_TRACE_BYTES} bytes", "cut it")
        if path.suffix == ".jsonl":
            requests = list(_json_lines(path.read_text(), where))
        else:
            rows = load_trace(None if trace == "azure" else path)
            requests = [Request(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in rows]
    except OSError as error:
        raise PluginError(where, f"cannot be read ({error.strerror})", TRACE_MEND) from None
    except (BenchError, ValueError) as error:
        if isinstance(error, PluginError):
            raise
        raise PluginError(where, f"is malformed ({error})", TRACE_MEND) from None
    return sorted(requests, key=lambda one: one.arrival_s)[:count]


def _json_lines(text: str, where: str) -> Iterator[Request]:
    from pydantic import TypeAdapter, ValidationError

    from vllm_plugins.routing.virtual import Request

    line_format = TypeAdapter(Request)
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            request = line_format.validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "line"
            reason = f"line {number} is malformed ({place}: {first['msg']})"
            raise PluginError(where, reason, TRACE_MEND) from None
        yield request


def _search(
    args: argparse.Namespace, requests: Sequence[Request], times: StageTimes, targets: Targets
) -> list[Candidate]:
    from rich.progress import Progress

    from vllm_plugins.routing.allocation import allocate, shapes

    total = len(list(shapes(args.workers, any(one.images for one in requests))))
    with Progress(transient=True) as progress:
        task = progress.add_task("Simulating", total=total)
        return allocate(
            requests,
            times,
            args.workers,
            targets,
            args.dispatch,
            args.first_token,
            seen=lambda candidate: progress.advance(task),
        )


def _print(candidates: Sequence[Candidate], targets: Targets) -> None:
    from rich.console import Console
    from rich.table import Table

    title = (
        f"{targets.attainment:.0%} of requests within TTFT {targets.ttft_ms:g} ms and "
        f"TPOT {targets.tpot_ms:g} ms, in virtual time"
    )
    table = Table("workers", "goodput (req/s)", "fails at (req/s)", title=title)
    for one in candidates:
        fails_at = one.capacity.fails_at
        shown = "-" if fails_at is None else f"{fails_at:.3g}"
        table.add_row(str(one.shape), f"{one.goodput:.3g}", shown)
    Console().print(table)


def launch_lines(shape: Shape, model: str) -> list[str]:
    """Return the commands that start such workers and the router before them.

    Each worker needs a device of its own; the addresses are those of one host.
    """
    from vllm_plugins.deploy.settings import read_settings

    if shape.combined == shape.workers:
        parallel = f" --data-parallel-size {shape.workers}" if shape.workers > 1 else ""
        return [f"vllm serve {model}{parallel}"]
    counts = {
        "encode": shape.encode,
        "prefill": shape.prefill + shape.combined,
        "decode": shape.decode,
    }
    # The instances are those that `vllm-plugins deploy` would start.
    settings = read_settings(
        {"model": model} | {role: {"replicas": count} for role, count in counts.items()}
    )
    lines, routes, ports = [], [], itertools.count(FIRST_PORT)
    for role in settings.roles():
        plugins = " ".join(f"--plugin {_words(spec)}" for spec in settings.plugins(role))
        chosen = list(itertools.islice(ports, counts[role]))
        lines += [f"vllm serve {model} {plugins} --port {port}" for port in chosen]
        routes.append(" ".join([f"--{role}", *(f"http://127.0.0.1:{port}" for port in chosen)]))
    return [*lines, f"vllm-plugins route {' '.join(routes)}"]


def _words(spec: Mapping[str, Any]) -> str:
    """Return a plug-in with its options as the command line takes it."""
    options = ",".join(f"{name}={value}" for name, value in spec.items() if name != "name")
    return f"{spec['name']}:{options}"


def _report(
    args: argparse.Namespace, times: StageTimes, candidates: Sequence[Candidate]
) -> dict[str, Any]:
    return {
        "simulated": True,
        "times": times.model_dump(),
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()
        },
        "best": str(candidates[0].shape),
        "candidates": [
            {
                "workers": str(one.shape),
                "goodput": one.goodput,
                "fails_at": one.capacity.fails_at,
                "attainment_by_rate": sorted(one.capacity.measured),
            }
            for one in candidates
        ],
    }


def draw(path: Path, candidates: Sequence[Candidate], targets: Targets) -> None:
    """Draw attainment against rate of the best candidates.

    Args:
        path: PNG file to write.
        candidates: The best first.
        targets: What was wanted.

    Raises:
        PluginError: matplotlib is not installed.
    """
    from vllm_plugins.cli.pictures import pyplot

    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, one in enumerate(candidates[:DRAWN]):
        rates, shares = zip(*sorted(one.capacity.measured), strict=True)
        width = 2.5 if i == 0 else 1.0
        label = f"{one.shape}: {one.goodput:.3g} req/s"
        axes.plot(rates, shares, marker="o", markersize=3, linewidth=width, label=label)
    axes.axhline(targets.attainment, color="grey", linestyle="--", linewidth=1)
    axes.set_xlabel("requests per second")
    axes.set_ylabel("share within both targets")
    axes.set_title("Simulated attainment; the bold line is the choice", fontsize=11)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)
