"""``vllm-plugins bench --drafting DRAFTER``: ways to draft for images beside none at all."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_plugins.bench.errors import BenchError

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_plugins.bench.drafting import Drafted, DraftingBench


def add_arguments(group: Any, positive: Any) -> None:
    """Add the arguments to ``bench``'s parser.

    Args:
        group: Group of the parser.
        positive: Makes a reader of one number.
    """
    add = group.add_argument
    add(
        "--drafting",
        type=Path,
        metavar="DRAFTER",
        help="drafter's checkpoint; --model is its target",
    )
    add(
        "--data",
        type=Path,
        metavar="JSON",
        help="samples in LLaVA's layout; first questions are asked",
    )
    add("--images", type=Path, metavar="DIR", help="their pictures")
    add("--max-tokens", type=positive(int), default=128, help="of an answer (default: 128)")
    add("--ignore-eos", action="store_true", help="answers of exactly that length")
    add("--drafts", type=positive(int), default=5, help="tokens of a draft (default: 5)")
    add(
        "--engine-args",
        type=json.loads,
        default={},
        metavar="JSON",
        help="engine arguments of every engine, by field name",
    )
    add("--ways", metavar="NAME,NAME,...", help="ways to draft (default: all)")


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure, print a table line by line and write JSON and picture.

    Returns:
        0.
    """
    from vllm_plugins.bench.drafting import measure
    from vllm_plugins.bench.plot import require_matplotlib

    if not args.no_plot:
        require_matplotlib()
    bench = _read(args)
    out = args.out or Path("bench-results") / f"drafting-{datetime.now():%Y%m%d-%H%M%S}"
    out.mkdir(parents=True, exist_ok=True)
    results: list[Drafted] = []
    for found in measure(bench, out / "engines.log"):
        results.append(found)
        console.print(
            f"{found.name:<12} {found.speedup:.2f}x ({min(found.speedups):.2f} to "
            f"{max(found.speedups):.2f}), {found.tokens_per_round:.2f} tokens a round, "
            f"{found.draft_rows} draft-prefill rows, {found.draft_kv_bytes / 1e6:.1f} MB of draft "
            f"KV read, answers {'equal' if found.equal else 'DIFFER'}",
            highlight=False,
        )
        _write(out / "result.json", bench, results)
    if not args.no_plot:
        _draw(out / "result.png", results)
    console.print(f"written to {out}", highlight=False)
    return 0


def _read(args: argparse.Namespace) -> DraftingBench:
    """Read the benchmark's arguments.

    Raises:
        BenchError: One is missing or unknown.
    """
    from vllm_plugins.bench.drafting import VARIANTS, DraftingBench
    from vllm_plugins.training.data import read_samples

    if args.model is None or args.data is None:
        raise BenchError("--drafting needs a --model and --data")
    names = args.ways.split(",") if args.ways else VARIANTS
    unknown = sorted(set(names) - set(VARIANTS))
    if unknown:
        raise BenchError(f"--ways {','.join(unknown)}: known are {', '.join(VARIANTS)}")
    samples = read_samples(args.data, args.images)[: args.requests]
    return DraftingBench(
        args.model,
        args.drafting,
        [(s.turns[0].question, str(s.image) if s.image else None) for s in samples],
        args.max_tokens,
        args.ignore_eos,
        args.drafts,
        args.repeats,
        args.engine_args,
        names,
    )


def _write(path: Path, bench: DraftingBench, results: list[Drafted]) -> None:
    from vllm_plugins.bench.machine import describe_machine

    described = asdict(bench) | {"prompts": len(bench.prompts), "drafter": str(bench.drafter)}
    result = {
        "command": shlex.join(["vllm-plugins", *sys.argv[1:]]),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "bench": described,
        "results": [asdict(found) | {"speedup": found.speedup} for found in results],
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def _draw(path: Path, results: list[Drafted]) -> None:
    from vllm_plugins.bench.plot import COLOURS, require_matplotlib

    plt = require_matplotlib()
    panels = (
        ("speed-up over no drafting", [x.speedup for x in results]),
        ("tokens a round", [x.tokens_per_round for x in results]),
        ("draft-prefill rows", [x.draft_rows for x in results]),
        ("MB of draft KV read", [x.draft_kv_bytes / 1e6 for x in results]),
    )
    names = [x.name for x in results]
    figure, axes = plt.subplots(1, 4, figsize=(16, 0.4 * len(names) + 1.5), layout="constrained")
    for axis, (title, values), colour in zip(axes, panels, COLOURS, strict=False):
        axis.barh(names, values, color=colour)
        axis.set_title(title)
        axis.invert_yaxis()
    axes[0].axvline(1, color="black", linewidth=1)
    figure.savefig(path, dpi=140)
    plt.close(figure)
