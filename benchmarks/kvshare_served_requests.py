"""What the KVShare benchmark over HTTP asks: tenants' documents, and requests about them."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

from vllm_plugins.bench.errors import BenchError

# The reader: documents that introduce words, and how many texts there are of each.
SOURCES, EDITIONS, SYSTEM_LENGTH, DOCUMENT_LENGTH = 2, 3, 16, (50, 80)
SYSTEM = "You are assistant {:06}. Answer the question from the parts of the library below."
QUESTION = "\n\nQuestion {:06}: what is {} for?\nAnswer:"
# What a client that hangs up asks for, so that there is something left to give up.
ABORTED_TOKENS = 64


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
