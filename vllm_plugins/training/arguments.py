"""Command-line arguments that every ``vllm-plugins train`` technique has."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_plugins.errors import PluginError

INTERRUPTED = 130


@dataclass(frozen=True)
class Defaults:
    """What differs between techniques.

    Attributes:
        batch: Samples of a step.
        schedule: Of the learning rate.
        warmup: Share of the steps.
        clip: Largest gradient norm, 0 for none.
    """

    batch: int
    schedule: str
    warmup: float = 0.0
    clip: float = 0.0


def at_least(least: float, kind: Callable[[str], float] = int) -> Callable[[str], Any]:
    """Return an argparse type: a finite number not under ``least``."""

    def read(text: str) -> float:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
        return value

    read.__name__ = getattr(kind, "__name__", "number")
    return read


def share(text: str) -> float:
    """Read a share between 0 and 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def add_arguments(parser: argparse.ArgumentParser, defaults: Defaults) -> None:
    """Add the arguments of data and loop."""
    parser.epilog = (
        "On several GPUs: torchrun --nproc-per-node N -m vllm_plugins.cli.main train ... "
        "--device cuda. Ctrl-C stops after the current step and saves; --resume goes on."
    )
    _add_data(parser.add_argument_group("data"))
    _add_run(parser.add_argument_group("run"))
    _add_steps(parser.add_argument_group("steps"), defaults)


def _add_data(group: Any) -> None:
    add = group.add_argument
    add("--data", type=Path, required=True, help="samples, in the LLaVA JSON layout")
    add("--images", type=Path, metavar="DIR", help="folder that their image paths start from")
    add("--max-tokens", type=at_least(8), default=2048, help="longest sample (default: 2048)")
    add("--held-out", type=at_least(0), default=64, help="samples to evaluate on (default: 64)")
    add(
        "--workers", type=at_least(0), default=0, help="processes that prepare batches (default: 0)"
    )


def _add_run(group: Any) -> None:
    add = group.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--seed", type=at_least(0), default=0, help="of order and randomness (default: 0)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the frozen parts and of matrix products (default: float32)",
    )
    add("--save-every", type=at_least(1), default=500, metavar="STEPS", help="default: 500")
    add("--eval-every", type=at_least(1), default=500, metavar="STEPS", help="default: 500")
    add("--no-plot", action="store_true", help="draw no curves (that needs the extra 'tools')")


def _add_steps(group: Any, defaults: Defaults) -> None:
    add = group.add_argument
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=at_least(1), default=1, help="default: 1")
    length.add_argument("--steps", type=at_least(1), help="steps of the optimiser, for --epochs")
    add(
        "--batch",
        type=at_least(1),
        default=defaults.batch,
        help=f"samples of a step, over all processes (default: {defaults.batch})",
    )
    add(
        "--micro-batch",
        type=at_least(1),
        metavar="N",
        help="samples of one forward of a process (default: the largest fitting one up to 8)",
    )
    add(
        "--schedule",
        choices=("constant", "cosine"),
        default=defaults.schedule,
        help=f"of the learning rate (default: {defaults.schedule})",
    )
    add(
        "--warmup",
        type=share,
        default=defaults.warmup,
        metavar="SHARE",
        help=f"share of the steps (default: {defaults.warmup:g})",
    )
    add(
        "--clip",
        type=at_least(0, float),
        default=defaults.clip,
        metavar="NORM",
        help=f"largest norm of the gradient, 0 for none (default: {defaults.clip:g})",
    )


def loop_options(args: argparse.Namespace, samples: int, ranks: int = 1) -> Any:
    """Return the :class:`.loop.LoopOptions` of parsed arguments.

    Args:
        args: Of a parser that :func:`add_arguments` was called for.
        samples: Number of samples that are trained on.
        ranks: Processes that train together.

    Raises:
        PluginError: CUDA is asked for where there is none, or the run's folder is in use.
    """
    import torch

    from vllm_plugins.training.loop import LoopOptions

    check_folder(args)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise PluginError("--device", "no CUDA device is here", "use --device cpu")
    steps = args.steps or max(1, round(args.epochs * samples / args.batch))
    return LoopOptions(
        out=args.out,
        steps=steps,
        batch=args.batch,
        micro_batch=args.micro_batch or _largest_part(args.batch // ranks),
        schedule=args.schedule,
        warmup=args.warmup,
        clip=args.clip,
        seed=args.seed,
        save_every=args.save_every,
        eval_every=args.eval_every,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        workers=args.workers,
    )


def check_folder(args: argparse.Namespace) -> None:
    """Refuse to train over another run.

    Raises:
        PluginError: The folder holds a checkpoint and ``--resume`` is not given.
    """
    if not args.resume and any(args.out.glob("checkpoint-*/state.json")):
        raise PluginError("--out", f"{args.out} holds a run", "add --resume or name another folder")


def _largest_part(batch: int) -> int:
    return next((size for size in range(8, 0, -1) if batch % size == 0), 1)
