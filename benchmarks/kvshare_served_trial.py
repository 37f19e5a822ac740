"""One trial of the KVShare benchmark over HTTP: a fresh server, its requests and its counters."""

from __future__ import annotations

import argparse
import asyncio
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from kvshare_served_client import Outcome, send_all
from kvshare_served_requests import Request, arrivals

from vllm_plugins.bench.errors import BenchError, ProcessFailedError
from vllm_plugins.bench.variants import Variant

if TYPE_CHECKING:
    from prometheus_client.samples import Sample
    from serving import Served

# A line for each request would push the reason of a failure out of the log's end.
QUIET = "--disable-uvicorn-access-log"
WARM_UP = (256, 64)
COUNTED_BY_VLLM = (
    "vllm:prompt_tokens_total",
    "vllm:prefix_cache_hits_total",
    "vllm:external_prefix_cache_hits_total",
    "vllm:num_preemptions_total",
)
COUNTED_BY_KVSHARE = "vllm_plugins:kvshare_"
NOT_COUNTED = ("_created", "_bucket")
# What only grows; everything else is a gauge.
GROWING = ("_total", "_sum", "_count")


@dataclass(frozen=True)
class Trial:
    """One server's part of a round: what came back, and what the server counted meanwhile."""

    variant: str
    round: int
    startup_s: float
    outcomes: list[Outcome]
    counters: dict[str, float]


def run_trial(
    args: argparse.Namespace,
    variant: Variant,
    turn: int,
    work: tuple[list[Request], list[Request]],
    folder: Path,
) -> Trial:
    """Start a server, show it every document, and measure.

    Args:
        args: The command line.
        variant: What the server is started with.
        turn: The round, from 0.
        work: Requests that come first, and those that are measured.
        folder: Where the server's log goes.

    Raises:
        BenchError: The server failed, or a request is too long for it.
    """
    from serving import serving

    priming, measured = work
    options = [QUIET, *shlex.split(args.serve_args), *variant.arguments]
    log = folder / f"{turn + 1}-{variant.name}.log"
    with serving(
        args.model, *options, label=variant.name, log=log, ready_s=args.start_timeout
    ) as served:
        server, patience = served.server, args.request_timeout
        check_lengths([*priming, *measured], server.max_model_len())
        server.warm_up(WARM_UP)
        asyncio.run(send_all(server, priming, [0.0] * len(priming), 1, patience))
        before = scrape(served)
        starts, limit = plan(args, len(measured), Random(f"arrivals {args.seed} {turn}"))
        outcomes = asyncio.run(send_all(server, measured, starts, limit, patience))
        counters = since(before, scrape(served))
    return Trial(variant.name, turn, server.startup_s, outcomes, counters)


def plan(args: argparse.Namespace, count: int, rng: Random) -> tuple[list[float], int]:
    """Return when each request is sent, in seconds, and how many may be under way."""
    if args.rate is not None:
        return arrivals(count, args.rate, rng), count
    return [0.0] * count, args.concurrency


def scrape(served: Served) -> dict[str, float]:
    """Read what a server has counted so far.

    Raises:
        ProcessFailedError: It does not answer.
    """
    try:
        return counted(served.metrics())
    except OSError as error:
        server = served.server
        server.check()
        what = f"the server of '{server.label}' did not answer /metrics: {error}"
        raise ProcessFailedError(what, server.log) from None


def check_lengths(requests: Iterable[Request], most: int) -> None:
    """Refuse what the server would refuse.

    Raises:
        BenchError: A prompt and its answer have more than `most` tokens.
    """
    longest = max(len(request.asked.prompt) + request.max_tokens for request in requests)
    if longest > most:
        raise BenchError(f"the longest request has {longest} tokens and the server takes {most}")


def counted(samples: Iterable[Sample]) -> dict[str, float]:
    """Return the values of KVShare's metrics and of some of vLLM's, by name and kind."""
    found: dict[str, float] = {}
    for sample in samples:
        ours = sample.name.startswith(COUNTED_BY_KVSHARE)
        if (ours and not sample.name.endswith(NOT_COUNTED)) or sample.name in COUNTED_BY_VLLM:
            name = sample.name.removeprefix("vllm_plugins:")
            name += f"{{kind={sample.labels['kind']}}}" if "kind" in sample.labels else ""
            found[name] = found.get(name, 0.0) + sample.value
    return found


def since(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Return how far each counter went; a gauge is what it is."""
    return {
        name: value - before.get(name, 0.0) * name.partition("{")[0].endswith(GROWING)
        for name, value in after.items()
    }
