"""Servers of the stages in virtual time: encoder, prefill, and the engine that decodes."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count

from vllm_plugins.routing.stage_times import StageTimes

Action = Callable[[], None]
# DistServe's waiting_block_prop_threshold: how much pulled KV may wait to be decoded.
WAITING_SHARE = 0.05


class Clock:
    """Virtual time: runs actions in the order of their times, equal times in order of entry."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Action]] = []
        self._entered = count()

    def after(self, delay_s: float, action: Action) -> None:
        """Run an action so many seconds from now."""
        heapq.heappush(self._events, (self.now + delay_s, next(self._entered), action))

    def run(self) -> None:
        """Run until nothing is left to do."""
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()


class EncodeServer:
    """An encoder: first come, first served, a few images at a time.

    Args:
        clock: Virtual time.
        times: Of this instance.
    """

    def __init__(self, clock: Clock, times: StageTimes) -> None:
        self._clock = clock
        self._times = times.encode
        self._queue: deque[tuple[int, Action]] = deque()
        self._busy = False

    def submit(self, tokens: int, done: Action) -> None:
        """Encode an image of so many encoder tokens, then call ``done``."""
        self._queue.append((tokens, done))
        if not self._busy:
            self._begin()

    def _begin(self) -> None:
        size = min(self._times.max_images, len(self._queue))
        batch = [self._queue.popleft() for _ in range(size)]
        self._busy = bool(batch)
        if batch:
            ms = self._times.ms(sum(tokens for tokens, _ in batch))
            self._clock.after(ms / 1e3, partial(self._end, [done for _, done in batch]))

    def _end(self, batch: list[Action]) -> None:
        for done in batch:
            done()
        self._begin()


class PrefillServer:
    """A prefill instance: first come, first served, one whole prompt per step.

    A prompt's KV stays here until a decode instance has pulled it; while it fills the KV cache, no
    prompt is begun.

    Args:
        clock: Virtual time.
        times: Of this instance.
        slowdown: Factor on its times.
    """

    def __init__(self, clock: Clock, times: StageTimes, slowdown: float = 1.0) -> None:
        self._clock = clock
        self._times = times
        self._slowdown = slowdown
        self._queue: deque[tuple[int, int, Action]] = deque()
        self._held_blocks = 0
        self._busy = False

    def submit(self, prompt_tokens: int, encoder_tokens: int, done: Action) -> None:
        """Encode images here if any, prefill a prompt, call ``done``, and hold the KV."""
        self._queue.append((prompt_tokens, encoder_tokens, done))
        self._begin()

    def release(self, prompt_tokens: int) -> None:
        """Free the KV of a prompt."""
        self._held_blocks -= self._times.blocks(prompt_tokens)
        self._begin()

    def _begin(self) -> None:
        if self._busy or not self._queue:
            return
        prompt, encoder, done = self._queue[0]
        blocks = self._times.blocks(prompt)
        if self._held_blocks + blocks > self._times.kv_blocks:
            return
        self._queue.popleft()
        self._busy = True
        self._held_blocks += blocks
        ms = self._times.encode.ms(encoder) + self._times.prefill.ms(prompt)
        self._clock.after(ms * self._slowdown / 1e3, partial(self._end, done))

    def _end(self, done: Action) -> None:
        self._busy = False
        done()
        self._begin()


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in an engine that decodes.

    Attributes:
        context: Tokens whose KV it has, or will have once ``todo`` is 0.
        left: Tokens to produce.
        first_token: Called at the end of the step that produces its first token there.
        finished: Called at the end of the step that produces its last token.
        todo: Tokens of the context still to be computed here.
        encoder_tokens: Embeddings to be computed here, before the prompt.
        tokens: Produced before it joined the batch for the last time.
    """

    context: int
    left: int
    first_token: Action
    finished: Action
    todo: int = 0
    encoder_tokens: int = 0
    joined: int = 0
    ends: int = 0
    began: bool = False
    tokens: int = 0

    def report(self) -> None:
        """Report the first token, once."""
        if not self.began:
            self.began = True
            self.first_token()


class TokenBatch:
    """The sequences that produce a token in every step; a step costs the same for any number.

    Attributes:
        context: Tokens of context of all sequences.
        members: The sequences, newest last.
    """

    def __init__(self, block_size: int) -> None:
        self.context = 0
        self.members: dict[Sequence, None] = {}
        self._steps = 0
        self._ends: list[tuple[int, int, Sequence]] = []
        self._entered = count()
        # Sequences by the step, modulo the block size, at which they need a new KV block.
        self._growing = [0] * block_size

    def __len__(self) -> int:
        return len(self.members)

    def join(self, sequence: Sequence) -> None:
        """Let a sequence produce tokens from the next step on."""
        sequence.joined, sequence.ends = self._steps, self._steps + sequence.left
        self.members[sequence] = None
        self.context += sequence.context
        self._growing[self._phase(sequence)] += 1
        heapq.heappush(self._ends, (sequence.ends, next(self._entered), sequence))

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence out, with its context and tokens left brought up to date."""
        steps = self.age(sequence)
        del self.members[sequence]
        self._growing[self._phase(sequence)] -= 1
        sequence.tokens += steps
        sequence.context += steps
        sequence.left -= steps
        self.context -= sequence.context

    def age(self, sequence: Sequence) -> int:
        """Return the tokens that a sequence has produced since it joined."""
        return self._steps - sequence.joined

    def step(self) -> tuple[int, list[Sequence]]:
        """Produce a token for each; return the new KV blocks and the sequences that have ended."""
        new_blocks = self._growing[self._steps % len(self._growing)]
        self._steps += 1
        self.context += len(self.members)
        ended = []
        while self._ends and self._ends[0][0] <= self._steps:
            end, _, sequence = heapq.heappop(self._ends)
            # One that was taken out and came back ends later than this entry says.
            if sequence in self.members and sequence.ends == end:
                self.leave(sequence)
                ended.append(sequence)
        return new_blocks, ended

    def _phase(self, sequence: Sequence) -> int:
        return (sequence.joined - sequence.context) % len(self._growing)


class Engine:
    """An engine that prefills and decodes together, as stock vLLM does with chunked prefill.

    Running sequences come first in a step; what is left of the token budget goes to prompts, first
    come, first served. When the KV cache is full, the newest running sequence is taken out and
    computed again later.

    Args:
        clock: Virtual time.
        times: Of this instance.
    """

    def __init__(self, clock: Clock, times: StageTimes) -> None:
        self._clock = clock
        self._times = times
        self._free_blocks = times.kv_blocks
        self._batch = TokenBatch(times.block_size)
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()
        self._ready: deque[Sequence] = deque()
        self._fresh: list[Sequence] = []
        self._busy = False

    def submit(self, sequence: Sequence) -> None:
        """Take a sequence whose context is still to be computed."""
        self._waiting.append(sequence)
        self._begin()

    def running(self) -> Iterator[tuple[Sequence, int]]:
        """Yield the sequences that decode, and how many tokens each has produced here."""
        for sequence in self._batch.members:
            yield sequence, sequence.tokens + self._batch.age(sequence)

    def _begin(self) -> None:
        if self._busy:
            return
        while self._ready and len(self._batch) < self._times.max_batch:
            self._join(self._ready.popleft())
        decode = self._times.decode
        base = decode.base_ms if self._batch.members else 0.0
        ms = decode.request_ms * len(self._batch) + decode.context_ms * self._batch.context
        chunks = self._chunks(self._times.token_budget - len(self._batch))
        if chunks is not None:
            base = max(base, self._times.prefill.base_ms)
            ms += chunks
        elif not self._batch.members:
            return
        self._busy = True
        self._clock.after((base + ms) / 1e3, self._end)

    def _join(self, sequence: Sequence) -> None:
        self._batch.join(sequence)
        self._fresh.append(sequence)

    def _chunks(self, budget: int) -> float | None:
        """Compute prompts up to the budget; return their milliseconds, None for no prompt."""
        self._admit(budget)
        ms = None
        for sequence in self._prefilling:
            if budget <= 0:
                break
            start = sequence.context - sequence.todo
            tokens = min(sequence.todo, budget)
            ms = (ms or 0.0) + self._times.prefill.chunk_ms(start, start + tokens)
            ms += self._times.encode.ms(sequence.encoder_tokens)
            sequence.encoder_tokens = 0
            sequence.todo -= tokens
            budget -= tokens
        return ms

    def _admit(self, budget: int) -> None:
        """Give waiting sequences their KV blocks, as far as the step can use them."""
        budget -= sum(sequence.todo for sequence in self._prefilling)
        while self._waiting and budget > 0:
            head = self._waiting[0]
            blocks = self._times.blocks(head.context)
            running = len(self._batch) + len(self._prefilling) + len(self._ready)
            if blocks > self._free_blocks or running >= self._times.max_batch:
                return
            self._free_blocks -= blocks
            self._prefilling.append(self._waiting.popleft())
            budget -= head.todo

    def _end(self) -> None:
        self._busy = False
        new_blocks, ended = self._batch.step()
        self._free_blocks -= new_blocks
        fresh, self._fresh = self._fresh, []
        for sequence in fresh:
            sequence.report()
        for sequence in ended:
            self._finish(sequence)
        while self._prefilling and self._prefilling[0].todo == 0:
            self._prefilled(self._prefilling.popleft())
        while self._free_blocks < 0:
            self._preempt(next(reversed(self._batch.members)))
        self._begin()

    def _prefilled(self, sequence: Sequence) -> None:
        sequence.report()
        sequence.tokens += 1
        sequence.left -= 1
        if sequence.left:
            self._ready.append(sequence)
        else:
            self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        self._free_blocks += self._times.blocks(sequence.context)
        sequence.finished()

    def _preempt(self, sequence: Sequence) -> None:
        self._batch.leave(sequence)
        self._free_blocks += self._times.blocks(sequence.context)
        sequence.todo = sequence.context
        self._waiting.appendleft(sequence)


class DecodeServer(Engine):
    """A decode instance, which pulls KV from prefill instances by DistServe's rule.

    Between steps the head of the queue is accepted while less than 5 % of the KV blocks belong to
    sequences that were accepted and do not run yet, and its prompt fits into the free ones. The
    rest of the queue stays with the prefill instances.
    """

    def __init__(self, clock: Clock, times: StageTimes) -> None:
        super().__init__(clock, times)
        self._offered: deque[tuple[Sequence, Action]] = deque()
        self._idle_blocks = 0

    def offer(self, sequence: Sequence, pulled: Action) -> None:
        """Queue a prefilled sequence; ``pulled`` is called when its KV is here."""
        self._offered.append((sequence, pulled))
        self._begin()

    def _begin(self) -> None:
        if not self._busy:
            self._accept()
        super()._begin()

    def _accept(self) -> None:
        # Sequences that were preempted come first.
        while self._offered and not self._waiting:
            sequence, pulled = self._offered[0]
            blocks = self._times.blocks(sequence.context)
            if self._idle_blocks >= WAITING_SHARE * self._times.kv_blocks:
                return
            if blocks > self._free_blocks:
                return
            self._offered.popleft()
            self._free_blocks -= blocks
            self._idle_blocks += blocks
            delay_s = self._times.transfer_ms_per_token * sequence.context / 1e3
            self._clock.after(delay_s, partial(self._arrive, sequence, pulled))

    def _arrive(self, sequence: Sequence, pulled: Action) -> None:
        pulled()
        self._ready.append(sequence)
        self._begin()

    def _join(self, sequence: Sequence) -> None:
        if not sequence.began:
            self._idle_blocks -= self._times.blocks(sequence.context)
        super()._join(sequence)
