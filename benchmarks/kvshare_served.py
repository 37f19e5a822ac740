"""KVShare over HTTP: several tenants ask about their documents, against stock vLLM.

    export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=1   # the worker alone on core 1
    taskset -c 0 python benchmarks/kvshare_served.py --concurrency 4 [--rounds 3] [--out FILE.json]
    taskset -c 0 python benchmarks/kvshare_served.py --model FOLDER --rate 0.25 [--plot FILE.png]

A prompt is a system line, some of its tenant's documents in random order, the popular ones more
often (Zipf), and a fresh question. Every tenant has a `cache_salt` of its own. A share of the
requests asks about documents that nobody sent before: there the plug-in can only lose. Another
share is given up by its client, before the first token or after a few. Answers are greedy and
streamed.

Servers take turns, each fresh: stock vLLM as it comes, prefix caching on, then the plug-in, then
the other way round. Before what is measured, every tenant sends all of its documents once, so that
figures are those of a server in use. Prompts are the same in all rounds, arrival times are drawn
for each round: stock vLLM against itself in the next round shows how many answers differ by
rounding alone, since batches form in other ways. In the open loop (`--rate`) the throughput is the
rate, unless a server falls behind.

Without `--model` the reader fixture (`tests/fixtures/reader`) answers; what is right is known
there. The documents that others refer to exist in several editions, of which a prompt holds one, so
stored KV of a reference is mostly wrong. With a model, documents are passages of Python's library.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

from kvshare_served_report import COUNTS, FIGURES, conclude, draw, report, summarise, waits
from kvshare_served_requests import Corpus, ReaderPool, Request, Shape, make_requests, text_corpus
from kvshare_served_trial import Trial, run_trial

from vllm_plugins.bench.errors import BenchError
from vllm_plugins.bench.process import interrupt_on_termination
from vllm_plugins.bench.report import number
from vllm_plugins.bench.variants import STOCK, Variant, alternate

ROOT = Path(__file__).resolve().parent.parent
# Where the trial finds the example's server, and the reader's documents their words.
sys.path[:0] = [str(ROOT / "examples" / "models"), str(ROOT / "examples" / "demo")]
READER = ROOT / "tests" / "fixtures" / "reader"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
}
SERVE_ARGS = "--dtype float32 --enforce-eager"
KVSHARE, NEUTRAL = "kvshare", "kvshare-neutral"
NEUTRAL_OPTIONS = "recompute_min=1,recompute_max=1"


def variants_of(args: argparse.Namespace) -> list[Variant]:
    """Return what is compared."""
    plugin = f"kvshare:{args.plugin_options}" if args.plugin_options else "kvshare"
    found = [Variant(STOCK), Variant(KVSHARE, ("--plugin", plugin))]
    if args.neutral:
        parts = [part for part in args.plugin_options.split(",") if part]
        kept = [part for part in parts if not part.startswith(("recompute_min=", "recompute_max="))]
        found.append(
            Variant(NEUTRAL, ("--plugin", f"kvshare:{','.join([*kept, NEUTRAL_OPTIONS])}"))
        )
    return found


def measure(
    args: argparse.Namespace, work: tuple[list[Request], list[Request]], folder: Path
) -> Iterator[Trial]:
    """Yield trial after trial, with a line for each.

    Raises:
        BenchError: A server failed; all of them have been stopped.
    """
    order = [
        (turn, variant)
        for turn, row in enumerate(alternate(variants_of(args), args.rounds))
        for variant in row
    ]
    begin = time.monotonic()
    for done, (turn, variant) in enumerate(order, 1):
        trial = run_trial(args, variant, turn, work, folder)
        found = summarise(work[1], trial.outcomes)
        left = (time.monotonic() - begin) / done * (len(order) - done)
        figures = (f"{label} {number(found.get(name))}" for name, label in FIGURES.items())
        counts = (f"{found[name]} {name.replace('_', ' ')}" for name in COUNTS)
        print(
            f"[{done}/{len(order)}, {left:.0f} s left] {variant.name}, round {turn + 1}: "
            f"{'; '.join([*figures, *counts])}",
            flush=True,
        )
        yield trial


def to_json(
    args: argparse.Namespace, requests: Sequence[Request], trials: Sequence[Trial], outcome: str
) -> dict[str, Any]:
    """Return the result as plain values, with what it was measured on."""
    from vllm_plugins.bench.machine import describe_machine

    machine = describe_machine()
    del machine["git_commit"]
    settings = {k: v for k, v in vars(args).items() if k not in ("model", "out", "plot")}
    lengths = [len(request.asked.prompt) for request in requests]
    return {
        "command": shlex.join(["python", "benchmarks/kvshare_served.py", *sys.argv[1:]]),
        "machine": machine,
        "model": args.model.name,
        "outcome": outcome,
        "variants": {variant.name: list(variant.arguments) for variant in variants_of(args)},
        "settings": settings,
        "prompt_tokens": {"mean": statistics.mean(lengths), "max": max(lengths)},
        **conclude(requests, trials),
        "trials": [
            {
                "variant": trial.variant,
                "round": trial.round,
                "startup_s": trial.startup_s,
                "summary": summarise(requests, trial.outcomes),
                "ttft_s": {
                    kind: [round(t, 4) for t in waits(requests, trial.outcomes, kind == "novel")]
                    for kind in ("shared", "novel")
                },
                "counters": trial.counters,
                "errors": [outcome.error for outcome in trial.outcomes if outcome.error],
            }
            for trial in trials
        ],
    }


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Shape]:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, default=READER, help="default: the reader fixture")
    load = parser.add_mutually_exclusive_group(required=True)
    load.add_argument("--rate", type=float, help="open loop: mean requests per second, Poisson")
    load.add_argument("--concurrency", type=int, help="closed loop: requests under way at once")
    parser.add_argument("--rounds", type=int, default=3)
    for item in fields(Shape):
        flag = f"--{item.name.replace('_', '-')}"
        kind, text = type(item.default), item.metadata["help"]
        parser.add_argument(flag, type=kind, default=item.default, help=text)
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="about; not of the reader")
    parser.add_argument("--plugin-options", default="", help="of kvshare, as after 'kvshare:'")
    parser.add_argument("--neutral", action="store_true", help="kvshare recomputing all, as well")
    parser.add_argument("--serve-args", default=SERVE_ARGS, help=f"of all servers: {SERVE_ARGS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--request-timeout", type=float, default=300.0, metavar="S")
    parser.add_argument("--start-timeout", type=float, default=600.0, metavar="S")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="PNG file")
    args = parser.parse_args(arguments)
    shape = Shape(**{item.name: getattr(args, item.name) for item in fields(Shape)})
    if not 1 <= shape.per_prompt <= shape.documents:
        parser.error("--per-prompt must be at least 1 and at most --documents")
    numbers = [args.rate, args.concurrency, args.rounds]
    numbers += [shape.requests, shape.tenants, shape.output_tokens]
    if any(value is not None and value <= 0 for value in numbers):
        parser.error("rates and numbers must be positive")
    if not all(0 <= share <= 1 for share in (shape.novel_share, shape.abort_share)):
        parser.error("shares must be between 0 and 1")
    return args, shape


def main() -> int:
    """Measure, print and write."""
    args, shape = parse()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    trials: list[Trial] = []
    outcome = "complete"
    # The reason of a failure may stand far above the end of a log, which is all that is shown.
    logs = Path(tempfile.mkdtemp(prefix="kvshare-served-"))
    with interrupt_on_termination():
        try:
            corpus: Corpus = ReaderPool
            if args.model.resolve() != READER:
                corpus = text_corpus(args.model, args.prompt_tokens, shape.per_prompt, args.seed)
            work = make_requests(shape, corpus, Random(args.seed))
            for trial in measure(args, work, logs):
                trials.append(trial)
        except BenchError as error:
            outcome = str(error).partition("\n")[0]
            print(f"error: {error}\nlogs are kept in {logs}", file=sys.stderr)
        else:
            shutil.rmtree(logs)
    if not trials:
        return 2
    result = to_json(args, work[1], trials, outcome)
    if "medians" in result:
        print(report(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    if args.plot:
        draw(work[1], trials, args.plot)
    return 0 if outcome == "complete" else 2


if __name__ == "__main__":
    raise SystemExit(main())
