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
import asyncio
import json
import math
import os
import shlex
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples" / "models"), str(ROOT / "examples" / "demo")]

from vllm_plugins.bench.compare import bootstrap_median, median_summary  # noqa: E402
from vllm_plugins.bench.errors import BenchError, ProcessFailedError  # noqa: E402
from vllm_plugins.bench.process import interrupt_on_termination  # noqa: E402
from vllm_plugins.bench.report import FEWEST_ROUNDS, number  # noqa: E402
from vllm_plugins.bench.server import Server  # noqa: E402
from vllm_plugins.bench.variants import STOCK, Variant, alternate  # noqa: E402

if TYPE_CHECKING:
    import aiohttp
    from prometheus_client.samples import Sample
    from serving import Served

READER = ROOT / "tests" / "fixtures" / "reader"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
}
SERVE_ARGS = "--dtype float32 --enforce-eager"
# A line for each request would push the reason of a failure out of the log's end.
QUIET = "--disable-uvicorn-access-log"
KVSHARE, NEUTRAL = "kvshare", "kvshare-neutral"
NEUTRAL_OPTIONS = "recompute_min=1,recompute_max=1"
# The reader: documents that introduce words, and how many texts there are of each.
SOURCES, EDITIONS, SYSTEM_LENGTH, DOCUMENT_LENGTH = 2, 3, 16, (50, 80)
SYSTEM = "You are assistant {:06}. Answer the question from the parts of the library below."
QUESTION = "\n\nQuestion {:06}: what is {} for?\nAnswer:"
# What a client that hangs up asks for, so that there is something left to give up.
ABORTED_TOKENS = 64
WARM_UP = (256, 64)
WATCH_S = 1.0
# A line of the stream; the first one repeats the prompt's token ids.
LINE_BYTES = 2**20
FIGURES = {
    "ttft_p50_ms": "TTFT p50, ms",
    "ttft_p99_ms": "TTFT p99, ms",
    "shared_ttft_p50_ms": "TTFT p50, shared, ms",
    "novel_ttft_p50_ms": "TTFT p50, novel, ms",
    "tbt_p50_ms": "TBT p50, ms",
    "tbt_p99_ms": "TBT p99, ms",
    "requests_per_s": "requests/s",
    "output_tokens_per_s": "output tokens/s",
}
COUNTS = ("answered", "aborted", "aborted_before_first", "errors")
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
Summary = Mapping[str, float]


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": f"{text} (default: {default})"})


@dataclass(frozen=True)
class Shape:
    """What is asked; each field is an option of the command line, with its explanation."""

    requests: int = _option(24, "requests of a trial, after every document was sent once")
    tenants: int = _option(2, "tenants, each with a cache salt and documents of its own")
    documents: int = _option(8, "documents of a tenant")
    per_prompt: int = _option(4, "documents in a prompt")
    zipf: float = _option(1.0, "exponent of the documents' popularity; 0 for equal")
    novel_share: float = _option(0.2, "share of requests on documents that nobody sent before")
    abort_share: float = _option(0.1, "share of requests whose client hangs up")
    output_tokens: int = _option(16, "length of an answer; the reader ends it after one word")


@dataclass(frozen=True)
class Asked:
    """A prompt's token ids and, where it is known, the right answer and the documents it needs."""

    prompt: list[int]
    answer: int | None = None
    hops: int | None = None


class Pool(Protocol):
    """The documents of one tenant."""

    def ask(self, rng: Random, chosen: Sequence[int]) -> Asked:
        """Return a prompt with these documents, in this order if it can be, and a question."""


Corpus = Callable[[Random, int], Pool]
"""Makes a pool of so many documents that no other pool has."""


class ReaderPool:
    """Documents for the reader fixture. Those that introduce words are in every prompt.

    Args:
        rng: Source of everything that is drawn.
        count: Documents to choose from.
    """

    def __init__(self, rng: Random, count: int) -> None:
        from reader_data import DOC, FILLERS, KEYS, NAMES, Document, Size, make_prompt

        total = count + SOURCES
        if total > len(NAMES):
            raise BenchError(f"the reader knows at most {len(NAMES) - SOURCES} documents")
        size = Size(
            documents=(total, total),
            length=DOCUMENT_LENGTH,
            facts=(2, min(5, len(KEYS) // total)),
            sources=(SOURCES, SOURCES),
        )
        drawn = make_prompt(rng, size).documents
        self._plain = [document for document in drawn if not document.notes]
        self._sources = [
            [document, *(document.redrawn(rng) for _ in range(EDITIONS - 1))]
            for document in drawn
            if document.notes
        ]
        words = rng.choices(FILLERS, k=SYSTEM_LENGTH)
        self._system = Document((DOC, rng.choice(NAMES), *words), ())

    def ask(self, rng: Random, chosen: Sequence[int]) -> Asked:
        """Return a prompt of these documents in an order in which sources precede references."""
        from reader_data import Prompt, in_order

        documents = [self._plain[i] for i in chosen]
        documents += [rng.choice(editions) for editions in self._sources]
        prompt = Prompt((self._system, *in_order(rng, documents)))
        question = rng.choice(prompt.questions)
        return Asked([*prompt.ids, *question.tokens], question.answer, question.hops)


@dataclass(frozen=True)
class TextPool:
    """Passages of text, with what comes before and after them.

    Attributes:
        head: Token ids at the start of every prompt.
        passages: Title and token ids of each.
        encode: The model's tokenizer.
    """

    head: list[int]
    passages: list[tuple[str, list[int]]]
    encode: Callable[[str], list[int]]

    def ask(self, rng: Random, chosen: Sequence[int]) -> Asked:
        """Return a prompt with these passages in this order and a question about one of them."""
        title = self.passages[rng.choice(chosen)][0]
        question = self.encode(QUESTION.format(rng.randrange(10**6), title))
        tokens = [token for i in chosen for token in self.passages[i][1]]
        return Asked([*self.head, *tokens, *question])


class TextCorpus:
    """Passages of Python's library, of which each goes into one pool.

    Args:
        encode: The tokenizer, without special tokens.
        first: Special tokens that begin a prompt.
        length: Tokens in a passage, its title among them.
        seed: Seed of the order of the modules.
    """

    def __init__(
        self, encode: Callable[[str], list[int]], first: list[int], length: int, seed: int
    ) -> None:
        self._encode, self._first, self._length = encode, first, length
        self._modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        Random(seed).shuffle(self._modules)
        self._supply = self._passages()

    def _passages(self) -> Iterator[tuple[str, list[int]]]:
        for path in self._modules:
            ids = self._encode(path.read_text(encoding="utf-8", errors="replace"))
            for start in range(0, len(ids) - self._length + 1, self._length):
                title = f"part {start // self._length + 1} of {path.name}"
                heading = self._encode(f"\n\n# {title}\n")
                yield title, [*heading, *ids[start : start + self._length]][: self._length]

    def __call__(self, rng: Random, count: int) -> TextPool:
        """Return a pool of passages that no other pool has.

        Raises:
            BenchError: There are not so many.
        """
        passages = [passage for _, passage in zip(range(count), self._supply, strict=False)]
        if len(passages) < count:
            raise BenchError("Python's library is too short: lower --documents or --requests")
        system = self._encode(SYSTEM.format(rng.randrange(10**6)))
        return TextPool([*self._first, *system], passages, self._encode)


def text_corpus(model: Path, prompt_tokens: int, per_prompt: int, seed: int) -> TextCorpus:
    """Return passages of such a length that a prompt has about `prompt_tokens` tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    frame = len(encode(SYSTEM.format(0))) + len(encode(QUESTION.format(0, "part 1 of module.py")))
    length = max(32, (prompt_tokens - frame) // per_prompt)
    return TextCorpus(encode, list(tokenizer("")["input_ids"]), length, seed)


@dataclass(frozen=True)
class HangUp:
    """A client hangs up with so many tokens or after so many seconds, whichever is first."""

    tokens: int
    seconds: float


@dataclass(frozen=True)
class Request:
    """One request; `novel` says that its documents were in no other."""

    tenant: int
    asked: Asked
    max_tokens: int
    novel: bool = False
    hang_up: HangUp | None = None

    def body(self, model: str) -> dict[str, Any]:
        """Return what is sent to `/v1/completions`."""
        return {
            "model": model,
            "prompt": self.asked.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,
            "cache_salt": f"tenant-{self.tenant}",
            # The reader says by itself when it has answered.
            "ignore_eos": self.asked.answer is None or self.hang_up is not None,
        }


def make_requests(shape: Shape, corpus: Corpus, rng: Random) -> tuple[list[Request], list[Request]]:
    """Draw requests.

    Returns:
        Those that come first, which show every document once and then a mixture, and those
        that are measured, in their order.
    """
    pools = [corpus(rng, shape.documents) for _ in range(shape.tenants)]
    priming = [
        Request(tenant, pool.ask(rng, chosen), 1)
        for tenant, pool in enumerate(pools)
        for chosen in (*_in_groups(shape), popular(rng, shape))
    ]
    tenants = [i % shape.tenants for i in range(shape.requests)]
    rng.shuffle(tenants)
    novel = set(rng.sample(range(shape.requests), round(shape.novel_share * shape.requests)))
    leaving = hang_ups(rng, shape)
    measured = []
    for i, (tenant, hang_up) in enumerate(zip(tenants, leaving, strict=True)):
        pool = corpus(rng, shape.per_prompt) if i in novel else pools[tenant]
        chosen = list(range(shape.per_prompt)) if i in novel else popular(rng, shape)
        tokens = max(shape.output_tokens, ABORTED_TOKENS) if hang_up else shape.output_tokens
        measured.append(Request(tenant, pool.ask(rng, chosen), tokens, i in novel, hang_up))
    return priming, measured


def _in_groups(shape: Shape) -> list[Sequence[int]]:
    every = range(shape.documents)
    return [every[i : i + shape.per_prompt] for i in range(0, len(every), shape.per_prompt)]


def popular(rng: Random, shape: Shape) -> list[int]:
    """Draw different documents one after another, document i with weight ``(i + 1) ** -zipf``."""
    # The order in which clocks of these rates ring first is that of weighted draws.
    rings = [rng.expovariate((i + 1) ** -shape.zipf) for i in range(shape.documents)]
    drawn = sorted(range(shape.documents), key=rings.__getitem__)[: shape.per_prompt]
    rng.shuffle(drawn)
    return drawn


def hang_ups(rng: Random, shape: Shape) -> list[HangUp | None]:
    """Draw who hangs up: every other one before the first token, the rest after a few."""
    found: list[HangUp | None] = [None] * shape.requests
    for n, i in enumerate(rng.sample(range(len(found)), round(shape.abort_share * len(found)))):
        # From a millisecond to a second: prefill takes one or the other, by the model.
        early, late = HangUp(1, 10 ** rng.uniform(-3, 0)), HangUp(rng.randint(2, 8), math.inf)
        found[i] = late if n % 2 else early
    return found


def arrivals(count: int, rate: float, rng: Random) -> list[float]:
    """Draw a Poisson process: seconds from the start of the trial, the first at 0."""
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + rng.expovariate(rate))
    return times[:count]


@dataclass
class Outcome:
    """What came back for a request.

    Attributes:
        sent_s: When it was sent; all times are on one clock.
        chunk_s: When each chunk with a token arrived.
        tokens: Token ids of the answer so far.
        finished: Whether the server said that the answer ends here.
        error: What went wrong; empty if nothing did.
    """

    sent_s: float
    chunk_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.chunk_s[0] - self.sent_s

    def take(self, message: Mapping[str, Any], now: float) -> None:
        """Add one message of the stream."""
        if "error" in message:
            self.error = str(message["error"])[:300]
            return
        for choice in message["choices"]:
            self.finished |= choice.get("finish_reason") is not None
            if choice.get("token_ids"):
                self.tokens += choice["token_ids"]
                self.chunk_s.append(now)


async def send_all(
    server: Server,
    requests: Sequence[Request],
    starts: Sequence[float],
    limit: int,
    patience: float,
) -> list[Outcome]:
    """Send requests, each at its time and never more than `limit` at once.

    Args:
        server: Server to load.
        requests: What is sent; who waits for a turn gets it in this order.
        starts: Seconds after the first one, shape (requests,).
        limit: Most requests under way.
        patience: Seconds until a request without an end counts as failed.

    Raises:
        ProcessFailedError: The server died, or answered nothing at all.
    """
    import aiohttp

    turn, begin = asyncio.Semaphore(limit), time.perf_counter()
    # A connection each: reuse would race with the server's closing of idle ones.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    no_limit = aiohttp.ClientTimeout(total=None)

    async def one(request: Request, start: float) -> Outcome:
        await asyncio.sleep(begin + start - time.perf_counter())
        async with turn:
            return await _ask(session, server, request, patience)

    async with aiohttp.ClientSession(
        connector=connector, timeout=no_limit, read_bufsize=LINE_BYTES
    ) as session:
        answers = asyncio.gather(*(one(r, s) for r, s in zip(requests, starts, strict=True)))
        watch = asyncio.create_task(_watch(server))
        both: set[asyncio.Future[Any]] = {answers, watch}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
            outcomes = await answers
        finally:
            watch.cancel()
            answers.cancel()
            await asyncio.gather(*both, return_exceptions=True)
    _check(server, outcomes)
    return outcomes


async def _watch(server: Server) -> None:
    while True:
        server.check()
        await asyncio.sleep(WATCH_S)


def _check(server: Server, outcomes: Sequence[Outcome]) -> None:
    server.check()
    if all(outcome.error for outcome in outcomes):
        what = f"every request to the server of '{server.label}' failed, the first with: "
        raise ProcessFailedError(what + outcomes[0].error, server.log)


async def _ask(
    session: aiohttp.ClientSession, server: Server, request: Request, patience: float
) -> Outcome:
    import aiohttp

    outcome = Outcome(time.perf_counter())
    stays = request.hang_up.seconds if request.hang_up else math.inf
    try:
        # Leaving the block in the middle of a stream closes the connection.
        async with asyncio.timeout(min(stays, patience)):
            await _read(session, server, request, outcome)
    except TimeoutError:
        if patience <= stays:
            outcome.error = f"no end after {patience:g} s (--request-timeout)"
    except aiohttp.ClientError as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


async def _read(
    session: aiohttp.ClientSession, server: Server, request: Request, outcome: Outcome
) -> None:
    enough = request.hang_up.tokens if request.hang_up else math.inf
    url = f"{server.url}/v1/completions"
    async with session.post(url, json=request.body(server.model)) as response:
        if response.status != 200:
            outcome.error = f"HTTP {response.status}: {(await response.text())[:300]}"
            return
        async for line in response.content:
            if line.startswith(b"data: {"):
                outcome.take(json.loads(line[6:]), time.perf_counter())
                if len(outcome.tokens) >= enough or outcome.error:
                    response.close()
                    return
    if not (outcome.finished and outcome.tokens):
        outcome.error = "the stream ended before the answer"


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


def _whole(request: Request, *outcomes: Outcome) -> bool:
    """Whether a request was answered to its end, by all."""
    return request.hang_up is None and not any(outcome.error for outcome in outcomes)


def waits(requests: Sequence[Request], outcomes: Sequence[Outcome], novel: bool) -> list[float]:
    """Return the times to first token of one kind of request, in seconds, as they were sent."""
    both = zip(requests, outcomes, strict=True)
    return [o.ttft_s for r, o in both if r.novel == novel and _whole(r, o)]


def summarise(requests: Sequence[Request], outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return the figures of a trial, over requests answered to their end; none of nothing.

    The time between tokens is that between chunks of a stream, as a client sees it.
    """
    both = list(zip(requests, outcomes, strict=True))
    left = [o for r, o in both if r.hang_up is not None and not o.error]
    answered = [(r, o) for r, o in both if _whole(r, o)]
    counts = (len(answered), len(left), sum(not o.tokens for o in left))
    errors = sum(bool(o.error) for o in outcomes)
    figures: dict[str, float] = dict(zip(COUNTS, (*counts, errors), strict=True))
    shared, novel = (waits(requests, outcomes, kind) for kind in (False, True))
    gaps = [late - early for _, o in answered for early, late in pairwise(o.chunk_s)]
    for name, values, percentiles in (
        ("ttft", [*shared, *novel], (50, 99)),
        ("shared_ttft", shared, (50,)),
        ("novel_ttft", novel, (50,)),
        ("tbt", gaps, (50, 99)),
    ):
        for q in percentiles if values else ():
            figures[f"{name}_p{q}_ms"] = 1e3 * float(np.percentile(values, q))
    if answered:
        seconds = max(o.chunk_s[-1] for _, o in answered) - min(o.sent_s for o in outcomes)
        figures["requests_per_s"] = len(answered) / seconds
        figures["output_tokens_per_s"] = sum(len(o.tokens) for _, o in answered) / seconds
    return figures


def ratios(ours: Sequence[Summary], theirs: Sequence[Summary]) -> dict[str, dict[str, Any]]:
    """Return ours over theirs, round by round, with the median and its spread.

    The spread is a bootstrap interval from five rounds on, and the range below.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in FIGURES:
        if not all(summary.get(name) for summary in (*ours, *theirs)):
            continue
        values = [a[name] / b[name] for a, b in zip(ours, theirs, strict=True)]
        low, high, spread = min(values), max(values), "range"
        if len(values) >= FEWEST_ROUNDS:
            interval = bootstrap_median(values)
            low, high, spread = interval.low, interval.high, "95 % interval"
        median = statistics.median(values)
        found[name] = {"median": median, "low": low, "high": high, "spread": spread, "all": values}
    return found


def matching(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two answers have in common at their start."""
    differs = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differs, min(len(one), len(other)))


def agreement(triples: Iterable[tuple[Request, Outcome, Outcome]]) -> dict[str, float | None]:
    """Compare two answers to each request, of those that both answered to their end."""
    kept = [
        (r.novel, one.tokens, other.tokens) for r, one, other in triples if _whole(r, one, other)
    ]
    return {
        "compared": len(kept),
        "identical": _mean(a == b for _, a, b in kept),
        "identical_shared": _mean(a == b for novel, a, b in kept if not novel),
        "identical_novel": _mean(a == b for novel, a, b in kept if novel),
        "matching_tokens": _mean(matching(a, b) for _, a, b in kept),
        "answer_tokens": _mean(len(b) for _, _, b in kept),
    }


def right_answers(both: Iterable[tuple[Request, Outcome]]) -> dict[str, float | None]:
    """Return the share of right answers, by the documents that an answer needs; none known: {}."""
    kept = [
        (r.asked.hops, o.tokens[:1] == [r.asked.answer])
        for r, o in both
        if r.asked.answer is not None and _whole(r, o)
    ]
    if not kept:
        return {}
    return {
        "right": _mean(right for _, right in kept),
        "right_one_document": _mean(right for hops, right in kept if hops == 1),
        "right_two_documents": _mean(right for hops, right in kept if hops == 2),
    }


def _mean(values: Iterable[float]) -> float | None:
    kept = list(values)
    return sum(kept) / len(kept) if kept else None


def conclude(requests: Sequence[Request], trials: Sequence[Trial]) -> dict[str, Any]:
    """Return what follows from the rounds in which every variant was measured."""
    names = list(dict.fromkeys(trial.variant for trial in trials))
    by_round: dict[int, dict[str, Trial]] = {}
    for trial in trials:
        by_round.setdefault(trial.round, {})[trial.variant] = trial
    rounds = [row for row in by_round.values() if len(row) == len(names) and STOCK in row]
    if not rounds:
        return {}
    summaries = {n: [summarise(requests, row[n].outcomes) for row in rounds] for n in names}
    others = [name for name in names if name != STOCK]
    pairs = {f"{name} / {STOCK}": [(row[name], row[STOCK]) for row in rounds] for name in others}
    pairs[f"{STOCK} / itself, next round"] = [(b[STOCK], a[STOCK]) for a, b in pairwise(rounds)]
    return {
        "medians": {name: median_summary(summaries[name]) for name in names},
        "ratios": {f"{n} / {STOCK}": ratios(summaries[n], summaries[STOCK]) for n in others},
        "agreement": {
            label: agreement(
                triple
                for one, other in rows
                for triple in zip(requests, one.outcomes, other.outcomes, strict=True)
            )
            for label, rows in pairs.items()
        },
        "right": {
            name: right_answers(
                pair for row in rounds for pair in zip(requests, row[name].outcomes, strict=True)
            )
            for name in names
        },
        "counters_per_round": {
            name: _mean_of([row[name].counters for row in rounds]) for name in names
        },
    }


def _mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = sorted({name for row in rows for name in row})
    return {name: sum(row.get(name, 0.0) for row in rows) / len(rows) for name in names}


def table(head: str, columns: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out numbers: a line for each column's name, so that many figures fit any width."""
    width = max(map(len, (head, *columns)))
    widths = [max(len(name), 24) for name in rows]
    lines = [
        [head, *rows],
        *([name, *(_cell(row.get(name)) for row in rows.values())] for name in columns),
    ]
    return "\n".join(
        line[0].ljust(width) + "".join(f"  {c:>{w}}" for c, w in zip(line[1:], widths, strict=True))
        for line in lines
    )


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
    return number(value)


def report(result: Mapping[str, Any]) -> str:
    """Return a result as text."""
    kinds = {row["spread"] for found in result["ratios"].values() for row in found.values()}
    parts = [
        table("medians over rounds", (*FIGURES, *COUNTS), result["medians"]),
        table(f"ratios, median ({', '.join(kinds)})", tuple(FIGURES), result["ratios"]),
    ]
    for head, key in (
        ("answers", "agreement"),
        ("right answers", "right"),
        ("counted, per round", "counters_per_round"),
    ):
        columns = list(dict.fromkeys(name for row in result[key].values() for name in row))
        if columns:
            parts.append(table(head, columns, result[key]))
    return "\n\n".join(parts)


def draw(requests: Sequence[Request], trials: Sequence[Trial], path: Path) -> None:
    """Draw how the time to the first token is distributed, over all rounds."""
    from vllm_plugins.cli.pictures import pyplot

    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for axis, novel in zip(axes, (False, True), strict=True):
        for name in dict.fromkeys(trial.variant for trial in trials):
            mine = [trial.outcomes for trial in trials if trial.variant == name]
            times = sorted(t for outcomes in mine for t in waits(requests, outcomes, novel))
            axis.step(times, [(i + 1) / len(times) for i in range(len(times))], label=name)
        axis.set_title("documents nobody sent before" if novel else "documents sent before")
        axis.set_xlabel("time to first token, s")
        axis.set_xlim(left=0)
    axes[0].set_ylabel("share of requests")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


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
