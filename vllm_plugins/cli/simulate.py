"""``vllm-plugins simulate``: schedulers in virtual time on a workload, without a model."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_plugins.bench.errors import BenchError

if TYPE_CHECKING:
    from vllm_plugins.bench.metrics import Slo
    from vllm_plugins.bench.workloads import Request, TraceRow
    from vllm_plugins.engine.cost_model import StepCostModel
    from vllm_plugins.simulator.simulate import Machine, Policy

HELP = "Run schedulers in virtual time on a workload, without a model."
COLUMNS = ("ttft_p50_ms", "ttft_p99_ms", "tbt_p50_ms", "tbt_p99_ms", "tbt_max_ms", "attainment")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="SPEC",
        help="A plug-in to simulate, as for `vllm serve`; several are simulated together.",
    )
    parser.add_argument(
        "--budgets",
        type=int,
        nargs="+",
        default=[512, 2048, 8192],
        help="Values of --max-num-batched-tokens of stock vLLM to compare with; the plug-ins get "
        "the largest.",
    )
    cost = parser.add_mutually_exclusive_group(required=True)
    cost.add_argument("--profile", type=Path, help="Cost profile of `vllm-plugins profile`.")
    cost.add_argument(
        "--cost",
        help="Cost model as six numbers: seconds per step, row, row above the knee, request, "
        "token of decode context, and query-key pair of prefill.",
    )
    parser.add_argument("--knee", type=float, default=float("inf"), help="Rows; with --cost.")
    _add_workload(parser)
    _add_engine(parser)


def _add_workload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace", default="azure", help="`azure` for the shipped sample, or a CSV file like it."
    )
    parser.add_argument("--rate", type=float, default=1.0, help="Requests per second.")
    parser.add_argument("--requests", type=int, default=300, help="Requests of a simulation.")
    parser.add_argument("--length-scale", type=float, default=1.0, help="Factor on trace lengths.")
    parser.add_argument("--ttft-slo-ms", type=float, default=2000.0, help="Target; default 2000.")
    parser.add_argument("--tbt-slo-ms", type=float, default=100.0, help="Target; default 100.")
    parser.add_argument(
        "--capacity",
        action="store_true",
        help="Also search the highest rate at which 90 %% of the requests meet both targets.",
    )
    parser.add_argument("--out", type=Path, help="JSON file for the result.")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="Model folder; by default a small Llama's.")
    parser.add_argument("--blocks", type=int, default=8192, help="KV cache blocks.")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="As for `vllm serve`.")
    parser.add_argument("--stages", type=int, default=1, help="Pipeline stages.")
    parser.add_argument("--asynchronous", action="store_true", help="Asynchronous scheduling.")


def run(args: argparse.Namespace) -> int:
    """Simulate every policy, print a table and write the result."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = _compare(args, Path(folder))
        except BenchError as error:
            raise SystemExit(f"vllm-plugins simulate: error: {error}") from None
    _print(result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _compare(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from rich.progress import track

    from vllm_plugins.bench.metrics import Slo
    from vllm_plugins.simulator.simulate import figures

    machine = _machine(args, folder)
    slo = Slo(args.ttft_slo_ms, args.tbt_slo_ms)
    workload = partial(_workload, args, _rows(args.trace))
    rows = []
    for policy in track(_policies(args), "Simulating", transient=True):
        row: dict[str, Any] = {"policy": policy.name, "rate": args.rate}
        row |= figures(machine, policy, workload, args.rate, slo)
        if args.capacity:
            row |= _capacity(args, machine, policy, workload, slo)
        rows.append(row)
    return rows


def _capacity(
    args: argparse.Namespace, machine: Machine, policy: Policy, workload: Any, slo: Slo
) -> dict[str, Any]:
    from vllm_plugins.simulator.simulate import capacity

    found = capacity(machine, policy, workload, slo, args.rate)
    return {"capacity": found.rate, "capacity_fails_at": found.fails_at}


def _machine(args: argparse.Namespace, folder: Path) -> Machine:
    from vllm_plugins.simulator.config import write_model_config
    from vllm_plugins.simulator.simulate import Machine

    return Machine(
        model=args.model or write_model_config(folder),
        step_seconds=_cost_model(args).seconds,
        blocks=args.blocks,
        arguments={"max_num_seqs": args.max_num_seqs},
        stages=args.stages,
        asynchronous=args.asynchronous,
    )


def _cost_model(args: argparse.Namespace) -> StepCostModel:
    from vllm_plugins.engine.cost_model import FEATURES, StepCostModel
    from vllm_plugins.engine.cost_profile import load_profile

    if args.profile:
        # The simulated machine is whatever the profile was measured on.
        return load_profile(args.profile, f"--profile {args.profile}").cost_model()
    try:
        numbers = tuple(float(text) for text in args.cost.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != len(FEATURES) or min(numbers) < 0:
        raise BenchError(f"--cost {args.cost}: write {len(FEATURES)} numbers, none negative")
    return StepCostModel(numbers, args.knee)


def _policies(args: argparse.Namespace) -> Sequence[Policy]:
    from vllm_plugins.simulator.simulate import Policy

    budget = "max_num_batched_tokens"
    policies = [Policy(f"stock {size}", (), {budget: size}) for size in args.budgets]
    if args.plugin:
        name = " + ".join(args.plugin)
        policies.append(Policy(name, tuple(args.plugin), {budget: max(args.budgets)}))
    return policies


def _rows(trace: str) -> list[TraceRow]:
    from vllm_plugins.bench.workloads import load_trace

    path = Path(trace)
    if trace != "azure" and not path.is_file():
        raise BenchError(f"--trace {trace}: no such file")
    return load_trace(None if trace == "azure" else path)


def _workload(args: argparse.Namespace, rows: list[TraceRow], rate: float) -> list[Request]:
    from vllm_plugins.bench.workloads import Lengths, from_trace

    lengths = replace(Lengths(), scale=args.length_scale)
    return from_trace(rows, args.requests, rate, lengths)


def _print(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = [*COLUMNS, *(["capacity"] if "capacity" in rows[0] else [])]
    table = Table("policy", *columns)
    for row in rows:
        table.add_row(row["policy"], *(f"{row[column]:.3g}" for column in columns))
    Console(width=max(120, 60 + 14 * len(columns))).print(table)
