"""``vllm-plugins bench --kernel NAME``: attention kernels beside the platform's own."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_plugins.errors import PluginError

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_plugins.bench.kernels import KernelShape, KernelTime, Load, MakeCases

DEFAULT_CONTEXTS = (8192, 16384, 32768, 65536)


def add_arguments(group: Any, numbers: Any, positive: Any) -> None:
    """Add the arguments to ``bench``'s parser.

    Args:
        group: Group of the parser.
        numbers: Makes a reader of a list of numbers.
        positive: Makes a reader of one.
    """
    add = group.add_argument
    add("--kernel", metavar="NAME[:options]", help="attention backend whose kernels are timed")
    add("--phase", choices=("decode", "prefill"), default="decode", help="default: decode")
    add(
        "--contexts",
        type=numbers(int),
        default=DEFAULT_CONTEXTS,
        metavar="T,T,...",
        help="tokens of each sequence (default: 8192,16384,32768,65536)",
    )
    add(
        "--batches",
        type=numbers(int),
        default=(1,),
        metavar="N,N,...",
        help="sequences (default: 1)",
    )
    add(
        "--heads",
        type=positive(int),
        default=32,
        help="query heads, a multiple of --kv-heads (default: 32)",
    )
    add("--kv-heads", type=positive(int), default=8, help="default: 8")
    add("--head-size", type=positive(int), default=128, help="default: 128")
    add("--block-size", type=positive(int), help="default: 128 on CPU, 64 elsewhere")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the platform's own")


def run(args: argparse.Namespace, console: Console) -> int:
    """Time the kernels, print a table and write JSON and picture.

    Returns:
        0.
    """
    from vllm_plugins.bench.kernels import Load, measure, read_bandwidth
    from vllm_plugins.bench.plot import require_matplotlib

    if not args.no_plot:
        require_matplotlib()
    shape = _shape(args)
    name, make_cases, options = _cases(args.kernel)
    loads = [Load(args.phase, c, b) for b in args.batches for c in args.contexts]
    bandwidth = read_bandwidth(shape.device)
    console.print(
        f"{name} {args.phase}, {shape}; memory reads at {bandwidth / 1e9:.1f} GB/s", highlight=False
    )
    times: list[KernelTime] = []
    for found in measure(shape, loads, make_cases, options, args.repeats):
        times += found
        _print_load(found, bandwidth, console)
    out = args.out or Path("bench-results") / f"kernel-{name}-{datetime.now():%Y%m%d-%H%M%S}"
    _write(out / "result.json", shape, times, bandwidth, options)
    if not args.no_plot:
        _draw(out / "result.png", name, shape, times, bandwidth)
    console.print(f"written to {out}", highlight=False)
    return 0


def _shape(args: argparse.Namespace) -> KernelShape:
    """Return the layer that the arguments name.

    Raises:
        PluginError: There is no such layer.
    """
    from vllm.platforms import current_platform

    from vllm_plugins.bench.kernels import KernelShape

    if args.heads % args.kv_heads:
        raise PluginError(
            f"--heads {args.heads} --kv-heads {args.kv_heads}",
            "KV heads would serve unequal numbers of query heads",
            "use a multiple",
        )
    device = current_platform.device_type
    cpu = device == "cpu"
    return KernelShape(
        args.heads,
        args.kv_heads,
        args.head_size,
        # Packed pages have 32 tokens at least.
        args.block_size or (128 if cpu else 64),
        args.dtype or ("float32" if cpu else "bfloat16"),
        device,
    )


def _cases(text: str) -> tuple[str, MakeCases, dict[str, Any]]:
    """Return a plug-in's name, its cases and its validated options.

    Raises:
        PluginError: It is not an attention backend with kernels to time.
    """
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from vllm_plugins.plugin import AttentionPlugin
    from vllm_plugins.registry import enable
    from vllm_plugins.spec import parse_specs

    enabled = enable(parse_specs([text]))
    if len(enabled) != 1:
        raise PluginError(f"--kernel {text}", "names several plug-ins", "name one")
    [item] = enabled
    if not isinstance(item.plugin, AttentionPlugin) or not item.plugin.kernel_cases:
        raise PluginError(
            f"--kernel {item.plugin.name}",
            "has no attention kernels to time",
            "name 'hip' or 'zipcache'",
        )
    cases: MakeCases = resolve_obj_by_qualname(item.plugin.kernel_cases)
    return item.plugin.name, cases, item.options.model_dump()


def _print_load(times: list[KernelTime], bandwidth: float, console: Console) -> None:
    from rich.table import Table

    load = times[0].load
    table = Table(title=f"{load.phase}, {load.context} tokens x {load.batch}", title_justify="left")
    for heading in ("kernel", "ms", "MB read", "GB/s", "floor ms", "stock / it"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for x in times:
        table.add_row(
            x.name,
            f"{x.median * 1e3:.3g}",
            f"{x.bytes / 1e6:.3g}",
            f"{x.bandwidth / 1e9:.3g}",
            f"{x.bytes / bandwidth * 1e3:.3g}",
            _spread(x.ratios),
        )
    console.print(table)


def _spread(ratios: list[float]) -> str:
    from statistics import median

    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _write(
    path: Path,
    shape: KernelShape,
    times: list[KernelTime],
    bandwidth: float,
    options: dict[str, Any],
) -> None:
    from vllm_plugins.bench.machine import describe_machine

    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "command": shlex.join(["vllm-plugins", *sys.argv[1:]]),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "shape": asdict(shape),
        "options": options,
        "bytes_per_second": bandwidth,
        "times": [asdict(x) for x in times],
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def _draw(
    path: Path, name: str, shape: KernelShape, times: list[KernelTime], bandwidth: float
) -> None:
    from vllm_plugins.bench.plot import COLOURS, require_matplotlib

    plt = require_matplotlib()
    batches = sorted({x.load.batch for x in times})
    figure, axes = plt.subplots(
        1, len(batches), figsize=(5 * len(batches), 4), squeeze=False, layout="constrained"
    )
    for axis, batch in zip(axes[0], batches, strict=True):
        of_batch = [x for x in times if x.load.batch == batch]
        names = list(dict.fromkeys(x.name for x in of_batch))
        for case, colour in zip(names, COLOURS, strict=False):
            points = [x for x in of_batch if x.name == case]
            contexts = [x.load.context for x in points]
            axis.plot(contexts, [x.median * 1e3 for x in points], "o-", color=colour, label=case)
            floor = [x.bytes / bandwidth * 1e3 for x in points]
            axis.plot(contexts, floor, ":", color=colour)
        _scale(axis, batch, times[0].load)
    figure.suptitle(f"{name}: one layer's attention, {shape} (dotted: reading the bytes alone)")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _scale(axis: Any, batch: int, load: Load) -> None:
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="context, tokens",
        ylabel=f"ms per {'step' if load.phase == 'decode' else 'prompt'}",
        title=f"batch {batch}",
    )
    axis.legend(frameon=False)
