"""Timing an attention backend's kernels alone, beside the platform's own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Read to find out what the memory gives; larger than any cache.
BANDWIDTH_BYTES = 512 * 2**20
STOCK = "stock"


@dataclass(frozen=True)
class KernelShape:
    """One attention layer.

    Attributes:
        heads: Query heads.
        kv_heads: Heads of keys and values.
        head_size: Of each.
        block_size: Tokens of a cache block.
        dtype: As torch names it, without the prefix.
        device: Device type.
    """

    heads: int
    kv_heads: int
    head_size: int
    block_size: int
    dtype: str
    device: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.kv_heads * self.head_size * self.torch_dtype.itemsize

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads} heads of {self.head_size}, {self.dtype}"


@dataclass(frozen=True)
class Load:
    """What is attended to.

    Attributes:
        phase: ``decode``, one query for each sequence, or ``prefill``, all of them.
        context: Tokens of each sequence.
        batch: Sequences.
    """

    phase: str
    context: int
    batch: int


@dataclass(frozen=True)
class KernelCase:
    """One way to do it.

    Attributes:
        name: `STOCK`, or what distinguishes the plug-in's ways.
        run: Does it ``steps`` times over.
        bytes: Least bytes that one step has to read.
        steps: Steps of one run.
    """

    name: str
    run: Callable[[], None]
    bytes: float
    steps: int = 1


# Makes the cases of a load, the stock one first.
MakeCases = Callable[[KernelShape, Load, dict[str, Any]], Sequence[KernelCase]]


@dataclass(frozen=True)
class KernelTime:
    """What one case took.

    Attributes:
        load: What was attended to.
        name: The case.
        seconds: Of one step, one for each round.
        bytes: Least bytes of one step.
        ratios: Stock's time over this one's, round by round.
    """

    load: Load
    name: str
    seconds: list[float]
    bytes: float
    ratios: list[float]

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def bandwidth(self) -> float:
        """Bytes per second that were needed at least."""
        return self.bytes / self.median


def _synchronise(device: str) -> None:
    import torch

    if device != "cpu":
        torch.accelerator.synchronize()


def read_bandwidth(device: str) -> float:
    """Return the bytes per second at which a large tensor is read, the best of five times."""
    import torch

    data = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    best = float("inf")
    for _ in range(5):
        _synchronise(device)
        began = time.perf_counter()
        data.sum()
        _synchronise(device)
        best = min(best, time.perf_counter() - began)
    return BANDWIDTH_BYTES / best


def measure(
    shape: KernelShape,
    loads: Sequence[Load],
    make_cases: MakeCases,
    options: dict[str, Any],
    rounds: int,
) -> Iterator[list[KernelTime]]:
    """Time every case of every load, the cases alternating.

    Args:
        shape: The layer.
        loads: What is attended to.
        make_cases: The plug-in's cases.
        options: The plug-in's options.
        rounds: Times that each case runs after one that is not counted.

    Yields:
        The times of one load.
    """
    for load in loads:
        cases = make_cases(shape, load, options)
        seconds: dict[str, list[float]] = {case.name: [] for case in cases}
        for i in range(rounds + 1):
            for case in cases:
                _synchronise(shape.device)
                began = time.perf_counter()
                case.run()
                _synchronise(shape.device)
                if i:
                    seconds[case.name].append((time.perf_counter() - began) / case.steps)
        stock = seconds[STOCK]
        yield [
            KernelTime(
                load,
                case.name,
                seconds[case.name],
                case.bytes,
                [a / b for a, b in zip(stock, seconds[case.name], strict=True)],
            )
            for case in cases
        ]
