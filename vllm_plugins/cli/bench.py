"""``vllm-plugins bench``: stock vLLM at its best against a plug-in, paired, in one run."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_plugins.cli import bench_drafting, bench_kernel

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_plugins.bench.config import BenchConfig, CapacitySearch, TraceShape
    from vllm_plugins.bench.results import Results
    from vllm_plugins.bench.variants import Variant

HELP = "Compare a plug-in with stock vLLM at its best static setting."
DEFAULT_BUDGETS = (64, 128, 256, 512, 2048)
FAILED, INTERRUPTED = 2, 130
# Columns of the tables in a log file, which has no width of its own.
LOG_WIDTH = 150


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``bench``."""
    parser.add_argument(
        "plugin",
        nargs="?",
        metavar="NAME[:options]",
        help="plug-in under test, as for --plugin; 'none' compares only the --variant entries",
    )
    parser.add_argument("--model", help="model path or name")
    parser.add_argument("--tokenizer", help="tokenizer, where it is not the model's own")
    parser.add_argument("--out", type=Path, help="result folder (default: bench-results/...)")
    _add_variants(parser.add_argument_group("variants"))
    _add_targets(parser.add_argument_group("targets and rounds"))
    _add_trace(parser.add_argument_group("trace workload: real arrivals and lengths"))
    _add_stall(parser.add_argument_group("stall workload: long prompts arrive among decodes"))
    _add_offline(parser.add_argument_group("offline workload: a batch job of short requests"))
    _add_capacity(parser.add_argument_group("capacity (trace workload)"))
    bench_drafting.add_arguments(
        parser.add_argument_group("drafting for images, one request at a time, without a server"),
        _positive,
    )
    bench_kernel.add_arguments(
        parser.add_argument_group("kernels: one attention layer, without a server"),
        _numbers,
        _positive,
    )


def _add_variants(group: Any) -> None:
    add = group.add_argument
    add(
        "--serve-args",
        default="",
        metavar="'ARGS'",
        help="'vllm serve' arguments for every variant",
    )
    add("--plugin-args", default="", metavar="'ARGS'", help="further ones for the plug-in alone")
    add(
        "--variant",
        action="append",
        default=[],
        metavar="NAME='ARGS'",
        help="another variant to pair, with its 'vllm serve' arguments; repeatable",
    )
    add(
        "--budgets",
        type=_numbers(int),
        default=DEFAULT_BUDGETS,
        metavar="B,B,...",
        help="values of --max-num-batched-tokens to sweep (default: 64,128,256,512,2048)",
    )
    add(
        "--static",
        metavar="B|default",
        help="skip the sweep: pair with this budget, or with vLLM's default",
    )
    add(
        "--max-num-seqs",
        type=_positive(int),
        default=32,
        help="of every variant; vLLM refuses a budget below it (default: 32)",
    )


def _add_targets(group: Any) -> None:
    add = group.add_argument
    add("--ttft-slo-ms", type=_positive(float), default=2000.0, help="default: 2000")
    add("--tbt-slo-ms", type=_positive(float), default=200.0, help="default: 200")
    add(
        "--tbt-stat",
        choices=("p99", "max", "p50"),
        default="p99",
        help="which statistic of a request's token gaps must meet the TBT target (default: p99)",
    )
    add(
        "--criterion",
        choices=("goodput", "attainment", "throughput", "ttft-p99", "tbt-p99", "stall", "capacity"),
        help="what makes a static budget the best one (default: goodput; stall: soonest long "
        "prompt among those that keep the TBT target; offline: throughput)",
    )
    add("--repeats", type=_positive(int), default=5, help="alternated rounds (default: 5)")
    add("--seed", type=int, default=0, help="seed of prompts and bootstrap (default: 0)")
    add(
        "--accuracy-prompts",
        type=int,
        default=8,
        metavar="N",
        help="greedy completions to compare between variants, 0 for none (default: 8)",
    )
    add("--start-timeout", type=_positive(float), default=600.0, metavar="S")
    add("--trial-timeout", type=_positive(float), default=1800.0, metavar="S")
    add("--no-plot", action="store_true", help="write no picture (it needs the extra 'tools')")


def _add_trace(group: Any) -> None:
    add = group.add_argument
    add(
        "--workload",
        choices=("trace", "stall", "offline"),
        default="trace",
        help="what is sent (default: trace)",
    )
    add(
        "--rates",
        type=_numbers(float),
        default=(1.0,),
        metavar="R,R,...",
        help="req/s (default: 1)",
    )
    add(
        "--requests",
        type=_positive(int),
        default=64,
        help="per trial, also of the offline workload (default: 64)",
    )
    add("--trace", type=Path, metavar="CSV", help="default: the Azure chat sample in the package")
    add("--length-scale", type=_positive(float), default=1.0, help="of both lengths (default: 1)")
    add("--max-input", type=_positive(int), default=4096, help="tokens (default: 4096)")
    add("--max-output", type=_positive(int), default=1024, help="tokens (default: 1024)")


def _add_stall(group: Any) -> None:
    add = group.add_argument
    add("--decodes", type=_positive(int), default=8, help="running decodes (default: 8)")
    add("--long-prompt", type=_positive(int), default=3000, help="tokens (default: 3000)")
    add(
        "--decode-tokens",
        type=_positive(int),
        default=512,
        help="per decode, enough to outlast the last long prompt (default: 512)",
    )
    add("--stalls", type=_positive(int), default=2, help="long prompts per trial (default: 2)")
    add("--stall-start", type=_positive(float), default=2.0, metavar="S", help="default: 2")
    add("--stall-every", type=_positive(float), default=10.0, metavar="S", help="default: 10")


def _add_offline(group: Any) -> None:
    add = group.add_argument
    add("--offline-input", type=_positive(int), default=32, help="tokens (default: 32)")
    add("--offline-output", type=_positive(int), default=64, help="tokens (default: 64)")


def _add_capacity(group: Any) -> None:
    add = group.add_argument
    add("--find-capacity", action="store_true", help="search each pair's highest bearable rate")
    add("--capacity-target", type=_positive(float), default=0.9, help="share (default: 0.9)")
    add("--capacity-trials", type=_positive(int), default=6, help="rates per search (default: 6)")
    add("--capacity-start", type=_positive(float), help="first rate (default: first of --rates)")


def _positive(kind: type[int] | type[float]) -> Any:
    def read(text: str) -> float:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    # argparse names the type in its message about what is not a number.
    read.__name__ = kind.__name__
    return read


def _numbers(kind: type[int] | type[float]) -> Any:
    def read(text: str) -> tuple[float, ...]:
        return tuple(_positive(kind)(item) for item in text.split(","))

    read.__name__ = f"list of {kind.__name__}"
    return read


def run(args: argparse.Namespace) -> int:
    """Run the benchmark.

    Returns:
        0, 2 when something failed, 130 after Ctrl-C.
    """
    from rich.console import Console

    from vllm_plugins.bench.errors import BenchError
    from vllm_plugins.errors import PluginError

    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    try:
        return _run(args, console)
    except (BenchError, PluginError) as error:
        # Not a console of rich: a log tail must stay as it is, brackets and long lines included.
        print(f"error: {error}", file=sys.stderr)
        return FAILED


def _run(args: argparse.Namespace, console: Console) -> int:
    from vllm_plugins.bench.errors import BenchError
    from vllm_plugins.bench.plot import draw, require_matplotlib
    from vllm_plugins.bench.report import print_report
    from vllm_plugins.versions import require_supported_vllm

    require_supported_vllm()
    if args.kernel:
        return bench_kernel.run(args, console)
    if args.drafting:
        return bench_drafting.run(args, console)
    if args.plugin is None or args.model is None:
        raise BenchError("name a plug-in and a --model, or an attention backend with --kernel")
    _check_plugin(args.plugin)
    if not args.no_plot:
        # Asked for before hours of measuring, not after.
        require_matplotlib()
    config = read_config(args)
    (config.out / "logs").mkdir(parents=True, exist_ok=True)
    results, interrupted = _measure(config, console)
    print_report(results, console)
    if interrupted:
        console.print(f"interrupted: {config.out / 'result.json'} holds what was measured")
        return INTERRUPTED
    if not args.no_plot:
        draw(results, config.out / "result.png")
    console.print(f"written to {config.out}", highlight=False)
    return 0


def _check_plugin(spec: str) -> None:
    """Refuse an unknown plug-in or option now rather than after the sweep."""
    from vllm_plugins.bench.variants import NO_PLUGIN
    from vllm_plugins.registry import enable
    from vllm_plugins.spec import parse_specs

    if spec != NO_PLUGIN:
        enable(parse_specs([spec]))


def _measure(config: BenchConfig, console: Console) -> tuple[Results, bool]:
    """Run all trials, and write the result file however they end."""
    from vllm_plugins.bench.machine import describe_machine
    from vllm_plugins.bench.process import interrupt_on_termination
    from vllm_plugins.bench.report import TrialProgress, to_json, write_json
    from vllm_plugins.bench.results import Results
    from vllm_plugins.bench.runner import Runner, load_points, planned_trials

    results = Results(config, load_points(config))
    started, began, outcome = datetime.now(UTC).isoformat(timespec="seconds"), time.time(), "failed"
    try:
        with interrupt_on_termination(), TrialProgress(console, planned_trials(config)) as progress:
            Runner(config, results, progress).run()
        outcome = "complete"
    except KeyboardInterrupt:
        outcome = "interrupted"
    finally:
        context = {
            "outcome": outcome,
            "command": shlex.join(["vllm-plugins", *sys.argv[1:]]),
            "started": started,
            "duration_s": round(time.time() - began, 1),
            "machine": describe_machine(),
        }
        write_json(config.out / "result.json", to_json(results, context))
    return results, outcome == "interrupted"


def read_config(args: argparse.Namespace) -> BenchConfig:
    """Turn parsed arguments into a configuration.

    Raises:
        BenchError: The arguments do not fit together.
    """
    from vllm_plugins.bench.config import DEFAULT_CRITERION, BenchConfig, OfflineShape, StallShape
    from vllm_plugins.bench.metrics import Slo

    statics, challengers = _read_variants(args)
    stall = (args.decodes, args.long_prompt, args.decode_tokens, args.stalls)
    return BenchConfig(
        model=args.model,
        out=args.out or _default_out(args.plugin, args.workload),
        workload=args.workload,
        statics=statics,
        challengers=challengers,
        slo=Slo(args.ttft_slo_ms, args.tbt_slo_ms, args.tbt_stat),
        criterion=args.criterion or DEFAULT_CRITERION[args.workload],
        trace=_read_trace(args),
        stall=StallShape(*stall, args.stall_start, args.stall_every),
        offline=OfflineShape(args.requests, args.offline_input, args.offline_output),
        capacity=_read_capacity(args),
        repeats=args.repeats,
        seed=args.seed,
        common=("--max-num-seqs", str(args.max_num_seqs), *shlex.split(args.serve_args)),
        tokenizer=args.tokenizer,
        accuracy_prompts=args.accuracy_prompts,
        start_timeout_s=args.start_timeout,
        trial_timeout_s=args.trial_timeout,
    )


def _read_trace(args: argparse.Namespace) -> TraceShape:
    from vllm_plugins.bench.config import TraceShape
    from vllm_plugins.bench.workloads import Lengths

    lengths = Lengths(args.length_scale, args.max_input, args.max_output)
    return TraceShape(args.rates, args.requests, lengths, args.trace)


def _read_capacity(args: argparse.Namespace) -> CapacitySearch:
    from vllm_plugins.bench.config import TRACE, CapacitySearch
    from vllm_plugins.bench.errors import BenchError

    if args.find_capacity and args.workload != TRACE:
        raise BenchError("--find-capacity: only the trace workload has a request rate")
    if args.criterion == "capacity" and not args.find_capacity:
        raise BenchError("--criterion capacity: needs --find-capacity")
    start = args.capacity_start or args.rates[0]
    return CapacitySearch(args.find_capacity, args.capacity_target, args.capacity_trials, start)


def _read_variants(
    args: argparse.Namespace,
) -> tuple[tuple[Variant, ...], tuple[Variant, ...]]:
    from vllm_plugins.bench.errors import BenchError
    from vllm_plugins.bench.variants import (
        check_names,
        named_variant,
        plugin_variant,
        static_variants,
    )

    if args.criterion == "stall" and args.workload != "stall":
        raise BenchError("--criterion stall: needs --workload stall")
    if args.static is None:
        statics = static_variants(args.budgets)
    elif args.static == "default":
        statics = static_variants([])
    else:
        statics = static_variants([_positive(int)(args.static)])[1:]
    plugin = plugin_variant(args.plugin, args.plugin_args)
    challengers = ([plugin] if plugin else []) + [named_variant(text) for text in args.variant]
    if not challengers:
        raise BenchError("nothing to compare: name a plug-in, or give --variant with 'none'")
    check_names([*statics, *challengers])
    return tuple(statics), tuple(challengers)


def _default_out(plugin: str, workload: str) -> Path:
    from vllm_plugins.bench.variants import NO_PLUGIN, plugin_label

    name = "variants" if plugin == NO_PLUGIN else plugin_label(plugin)
    return Path("bench-results") / f"{name}-{workload}-{datetime.now():%Y%m%d-%H%M%S}"
