"""The demo's workload: running chats, and a long prompt that arrives in the middle of them."""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from serving import Served

CAPITAL = "What is the capital of France?"
QUESTIONS = (
    "What is photosynthesis?",
    "Give me three tips for sleeping well.",
    "What are the benefits of regular exercise?",
    "Describe a walk on the beach.",
)
CHAT_TOKENS = 160
LONG_TOKENS = 48
# The running chats are well under way when the long prompt arrives.
TOKENS_BEFORE_LONG = 12
STRETCH = 16
TEXT = Path(__file__).resolve().parent.parent.parent / "LICENSE"
# Prompt lengths, in tokens, that a server sees before anything is measured.
WARM_UP = (32, 64, 128, 256, 400)


@dataclass
class Answer:
    """One streamed answer; times are seconds on one monotonic clock."""

    question: str
    sent: float = 0.0
    tokens_at: list[float] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first token."""
        return self.tokens_at[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between the tokens, one fewer than there are tokens."""
        return [b - a for a, b in zip(self.tokens_at, self.tokens_at[1:], strict=False)]


@dataclass(frozen=True)
class Run:
    """What one server answered."""

    chats: list[Answer]
    long: Answer
    seconds: float

    @property
    def gaps(self) -> list[float]:
        """Time between tokens of every running chat, in seconds."""
        return [gap for answer in self.chats for gap in answer.gaps]

    @property
    def step_s(self) -> float:
        """An undisturbed decode step, in seconds: the median over stretches of tokens.

        A client that has no core for a while finds several tokens at once, without gaps.
        """
        steps = [
            (later - earlier) / STRETCH
            for answer in self.chats
            for earlier, later in zip(answer.tokens_at, answer.tokens_at[STRETCH:], strict=False)
        ]
        return statistics.median(steps)

    @property
    def answers(self) -> list[Answer]:
        """Every answer, the long prompt's last."""
        return [*self.chats, self.long]


def long_question(characters: int) -> str:
    """Return a question about the first characters of the licence (about 4.5 per token)."""
    text = TEXT.read_text()[:characters]
    return (
        f"Here is a document.\n\n{text}\n\nWhat kind of document is this? Answer in one sentence."
    )


def ask(server: Served, question: str, max_tokens: int, under_way: threading.Event) -> Answer:
    """Stream one greedy answer and note when each token came."""
    answer = Answer(question, sent=time.monotonic())
    stream = server.openai.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": question}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.usage:
            answer.prompt_tokens = chunk.usage.prompt_tokens
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            answer.tokens_at.append(time.monotonic())
            answer.text += piece
        if len(answer.tokens_at) == TOKENS_BEFORE_LONG:
            under_way.set()
    if not answer.text.strip():
        raise RuntimeError(f"no answer to {question[:40]!r}")
    return answer


def run_workload(server: Served, characters: int) -> Run:
    """Start the chats, send the long prompt while they run, and wait for every answer.

    Args:
        server: where to send them.
        characters: length of the document in the long prompt.
    """
    server.server.warm_up(WARM_UP, output_tokens=16)
    under_way = threading.Event()
    start = time.monotonic()
    with ThreadPoolExecutor(len(QUESTIONS) + 2) as pool:
        chats = [
            pool.submit(ask, server, question, CHAT_TOKENS, under_way)
            for question in (CAPITAL, *QUESTIONS)
        ]
        if not under_way.wait(timeout=120):
            raise RuntimeError("the chats did not get going within two minutes")
        question = long_question(characters)
        long = pool.submit(ask, server, question, LONG_TOKENS, threading.Event()).result()
        answers = [chat.result() for chat in chats]
    return Run(answers, long, time.monotonic() - start)
