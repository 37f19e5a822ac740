"""Serve a real model stock and with `--plugin sarathi`, and see what a long prompt does to others.

    make demo        or        python examples/demo/demo.py [--plugin SPEC] [--tbt-slo-ms MS]

Two servers run one after the other: stock vLLM, then vLLM with the plug-in. Each streams answers
to five chats; while they run, a prompt of about 2,000 tokens arrives. Stock vLLM computes it in
one step, for which every running chat stands still. Sarathi-Serve gives each step just as much
prefill work as the target time between tokens allows: the chats go on, and the long prompt waits
longer for its first token. That is the trade.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from report import PREFIX, latency_table, metrics_table, print_answers
from rich.console import Console
from serving import serving
from workload import CAPITAL, Run, run_workload

from vllm_plugins.bench.errors import BenchError
from vllm_plugins.bench.process import interrupt_on_termination

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "models"))
from smollm2 import ensure_smollm2

ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
SERVER = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096")
# A busy machine of two cores was seen to take four minutes; an idle one takes half a minute.
READY_S = 600
# Also where the output is a file or a log: the table would be folded beyond reading.
WIDTH = 110
# Sarathi-Serve's strict target: five times an undisturbed decode step.
SLO_FACTOR = 5


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--plugin", help="value of --plugin for the second server (default: sarathi:tbt_slo_ms=...)"
    )
    parser.add_argument(
        "--tbt-slo-ms",
        type=float,
        help=f"target time between tokens (default: {SLO_FACTOR} times stock's decode step)",
    )
    parser.add_argument(
        "--document", type=int, default=9000, help="characters of the document in the long prompt"
    )
    return parser.parse_args()


def measure(console: Console, label: str, arguments: tuple[str, ...], characters: int, logs: Path):
    """Serve, run the workload, stop; return the run and the plug-ins' metrics."""
    model = ensure_smollm2()
    shown = " ".join(("vllm serve SmolLM2-135M-Instruct", *SERVER, *arguments))
    console.print(f"[bold]{label}[/bold]: {shown}", highlight=False)
    log = logs / f"{label}.log"
    with serving(model, *SERVER, *arguments, label=label, log=log, ready_s=READY_S) as server:
        console.print(f"  ready after {server.server.startup_s:.0f} s; asking ...")
        run = run_workload(server, characters)
        metrics = [sample for sample in server.metrics() if sample.name.startswith(PREFIX)]
        server.server.check()
    console.print(f"  answered in {run.seconds:.0f} s, server stopped")
    return run, metrics


def check(run: Run, metrics: list, console: Console) -> bool:
    """Say whether the demo showed what it is for, naming each thing that it did not."""
    capital = next(answer for answer in run.chats if answer.question == CAPITAL)
    claims = {
        f"the answer to {CAPITAL!r} names Paris": "Paris" in capital.text,
        f"/metrics has {PREFIX}*": bool(metrics),
    }
    for claim, holds in claims.items():
        if not holds:
            console.print(f"[red]failed:[/red] {claim}")
    return all(claims.values())


def demo(args: argparse.Namespace, console: Console, logs: Path) -> bool:
    """Run both servers and print the comparison; return whether all went well."""
    stock, _ = measure(console, "stock", (), args.document, logs)
    slo_ms = args.tbt_slo_ms or max(1, round(SLO_FACTOR * 1000 * stock.step_s))
    plugin = args.plugin or f"sarathi:tbt_slo_ms={slo_ms:.0f}"
    run, metrics = measure(console, "plug-in", ("--plugin", plugin), args.document, logs)
    runs = {"stock vLLM": stock, plugin: run}
    print_answers(console, run.answers)
    same = sum(a.text == b.text for a, b in zip(stock.answers, run.answers, strict=True))
    console.print(f"\n{same} of {len(run.answers)} answers are the same text as stock vLLM's.\n")
    console.print(metrics_table(metrics))
    console.print(latency_table(runs, slo_ms))
    return check(run, metrics, console)


def main() -> int:
    """Run the demo; 0 when everything went well."""
    args = parse()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    console = Console(width=max(WIDTH, Console().width))
    start = time.monotonic()
    try:
        with interrupt_on_termination(), tempfile.TemporaryDirectory() as folder:
            good = demo(args, console, Path(folder))
    except BenchError as error:
        console.print("[red]failed:[/red]", end=" ")
        console.print(str(error), markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the servers are stopped")
        return 130
    console.print(f"demo: {time.monotonic() - start:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
