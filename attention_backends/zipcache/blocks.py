"""The life of a block: RAW in a residual row, STAGED at four bits, SEALED with its quota.

It follows the scheduler's output, so it knows each request's blocks and when the request ends. What
a step's kernels do to blocks is decided before the step, for all layers at once::

    decode    RAW --------------> SEALED   before the step after the one that fills it
    prefill   (RAW) -> STAGED --> SEALED   before the step after the prompt's end, or when the
                                           request ends or staging is full

A full block can be shared by vLLM's prefix cache from the step on in which it is filled, in every
state: readers follow the state. Only who wrote it adds to its scores. A request has one residual
row as long as it runs; when it ends, or is preempted, its full blocks are sealed and the row is
free. Without a choice to make (one class of bits) prompts' blocks are sealed as they are written.

There are as many rows as requests can run at a time. A session whose next turn waits holds one too,
and vLLM may let another request run in its place: where that one finds no row, the session's leaves
the device until the session goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_plugins.attention_backends.zipcache import saliency
from vllm_plugins.attention_backends.zipcache.batch import RAW, SEALED, Seals
from vllm_plugins.attention_backends.zipcache.saliency import Probing

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

NO_ROW = -1
NO_PROBES = np.zeros(0, dtype=np.int64)
REASONS = ("prompt", "decode", "ended", "pressure")


@dataclass(frozen=True)
class LifeOptions:
    """What decides about blocks.

    Attributes:
        block_size: Tokens of a block.
        chooses: Whether blocks have salient tokens and others.
        probing: Which queries of a prompt are probes.
        normalizer: As of `saliency.weights`.
        decode_score: ``last_query`` scores a block that is filled while decoding by the query that
            fills it, as the published code does; ``accumulate`` by all queries that saw its tokens.
        always_salient_first: First tokens of a sequence, salient at any rate [G].
        rows: Requests at a time.
        staged: Blocks that may be staged at a time; those that one step fills must fit.
    """

    block_size: int
    chooses: bool
    probing: Probing
    normalizer: str = "probe_nnz"
    decode_score: str = "last_query"
    always_salient_first: int = 0
    rows: int = 1
    staged: int = 0


@dataclass
class _Request:
    """A request as the worker sees it; ``prompt`` is what is known before it generates."""

    blocks: list[int]
    computed: int
    prompt: int
    own_from: int
    row: int = NO_ROW
    staged: list[int] = field(default_factory=list)
    # Index of a block that decoding has filled and that is still in the residual row.
    filled: int | None = None
    # What the probes counts of its row were, while the row is away.
    away: np.ndarray | None = None


@dataclass(frozen=True)
class _Staged:
    """A block that waits for its quota."""

    row: int
    index: int
    request: _Request
    # Probes that saw each token.
    seen: np.ndarray


@dataclass(frozen=True)
class Part:
    """What the kernels have to know of a request in a step.

    Attributes:
        position: Of its first token.
        row: Its residual row, or -1.
        score_from: First block whose sums grow.
        reset: Whether these start from zero.
        probes: Counted from its first token in the step.
    """

    position: int
    row: int
    score_from: int
    reset: bool
    probes: np.ndarray


class BlockLife:
    """Follows blocks through the steps of an engine.

    Attributes:
        state: Where each block's tokens are, int32, shape (blocks,).
        sealed: Blocks sealed so far, by reason.
        parts: What each request has to do in this step, by the block that it writes last.
        leaving: Requests whose residual rows leave the device before this step, and the rows.
        returning: Those whose rows come back after that, and the rows that they get.

    Args:
        options: What decides about them.
        num_blocks: Of the cache.
    """

    def __init__(self, options: LifeOptions, num_blocks: int) -> None:
        self.options = options
        self.state = torch.full((num_blocks,), SEALED, dtype=torch.int32)
        self.sealed = dict.fromkeys(REASONS, 0)
        self._requests: dict[str, _Request] = {}
        self._prompts: dict[str, int] = {}
        self._free_rows = list(range(options.rows - 1, -1, -1))
        self._free_staging = list(range(options.staged - 1, -1, -1))
        # By block, the oldest first.
        self._staged: dict[int, _Staged] = {}
        self._row_seen = np.zeros((options.rows, options.block_size), dtype=np.int32)
        self._new: set[int] = set()
        self.parts: dict[int, Part] = {}
        self.leaving: dict[str, int] = {}
        self.returning: dict[str, int] = {}
        self._scheduled: set[str] = set()
        self._changed: set[int] = set()
        self._seals: list[tuple[int, int, int, np.ndarray]] = []

    @property
    def num_staged(self) -> int:
        """Blocks that wait for their quota."""
        return len(self._staged)

    @property
    def changed(self) -> list[int]:
        """Blocks whose state this step has changed."""
        return list(self._changed)

    @property
    def away(self) -> set[str]:
        """Requests whose residual rows are not on the device."""
        return {name for name, x in self._requests.items() if x.away is not None}

    def part(self, block: int) -> Part:
        """Return what the request that writes a block last in this step has to do in it."""
        return self.parts[block]

    # ---- One step --------------------------------------------------------------------------------

    def begin_step(self, output: SchedulerOutput) -> Seals | None:
        """Follow the scheduler into a step.

        Args:
            output: Of the scheduler.

        Returns:
            The blocks to seal, in every layer, before anything of the step is written.
        """
        self._seals, self.parts, self._new, self._changed = [], {}, set(), set()
        self.leaving, self.returning, self._scheduled = {}, {}, set(output.num_scheduled_tokens)
        for name in output.finished_req_ids:
            self._end(name)
            self._prompts.pop(name, None)
        for name in output.preempted_req_ids or ():
            self._end(name)
        for request in self._requests.values():
            self._seal_filled(request, "decode")
            if request.computed >= request.prompt:
                self._seal_staged(request, "prompt")
        for name in sorted(self._scheduled & self.away):
            self._bring_back(name)
        self._admit(output)
        counts = output.num_scheduled_tokens
        decoding = {name: self._plan(self._requests[name], n) for name, n in counts.items()}
        # Only now: planning may seal blocks, and this step's probes have not seen these.
        for name, n in counts.items():
            request = self._requests[name]
            last = request.blocks[(request.computed - 1) // self.options.block_size]
            self.parts[last] = self._part(request, request.computed - n, decoding[name])
        return self._take_seals()

    def _admit(self, output: SchedulerOutput) -> None:
        for new in output.scheduled_new_reqs:
            length = self._prompts[new.req_id] = _prompt_length(new)
            if new.req_id in self._requests:
                self._continue(self._requests[new.req_id], new, length)
            else:
                self._add(new.req_id, new.block_ids[0], new.num_computed_tokens, length)
        cached = output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[i]
            if name not in self._requests:
                # Resumed after preemption: what it had generated belongs to its prompt now.
                assert blocks is not None
                known = self._prompts[name] + cached.num_output_tokens[i]
                self._add(name, blocks[0], cached.num_computed_tokens[i], known)
            elif blocks is not None:
                self._requests[name].blocks += blocks[0]

    def _add(self, name: str, blocks: list[int], computed: int, prompt: int) -> None:
        size = self.options.block_size
        assert name not in self._requests, f"request {name} begins twice"
        assert computed % size == 0, "an unfilled block cannot come from elsewhere"
        self._requests[name] = _Request(list(blocks), computed, prompt, computed // size)

    def _continue(self, request: _Request, new: NewRequestData, prompt: int) -> None:
        """Begin a streaming session's next turn, and take back what ran ahead of the last one.

        A step that was under way when the turn ended may have computed a token that is none of the
        session's. Where that token has filled a block, the residual row still has all of it.
        """
        size, row, computed = self.options.block_size, request.row, new.num_computed_tokens
        index, kept = divmod(computed, size)
        held = index + bool(kept)
        same = list(new.block_ids[0][:held]) == request.blocks[:held]
        assert same, f"request {new.req_id} begins twice"
        if kept and computed < request.computed:
            assert index == (request.computed - 1) // size, "a turn's end is taken back by a block"
            self._move(request.blocks[index], RAW - row)
            self._row_seen[row, kept:] = 0
        request.filled = None
        request.blocks, request.computed, request.prompt = list(new.block_ids[0]), computed, prompt

    def _end(self, name: str) -> None:
        request = self._requests.pop(name, None)
        if request is None:
            return
        self._seal_filled(request, "ended")
        self._seal_staged(request, "ended")
        if request.row != NO_ROW:
            self._free_rows.append(request.row)

    def _move(self, block: int, state: int) -> None:
        self.state[block] = state
        self._changed.add(block)

    # ---- What a request writes -------------------------------------------------------------------

    def _plan(self, request: _Request, count: int) -> bool:
        """Decide where a request's tokens go; return whether it decodes."""
        size, first = self.options.block_size, request.computed
        end = request.computed = first + count
        decoding = count == 1 and first >= request.prompt
        if not decoding:
            request.prompt = max(request.prompt, end)
        for index in range(first // size, -(-end // size)):
            block, is_new = request.blocks[index], index * size >= first
            if is_new:
                self._move(block, SEALED)
            if (index + 1) * size <= end and not decoding:
                self._fill(request, index, block)
            else:
                self._keep_raw(request, block, is_new)
        if decoding and end % size == 0:
            request.filled = first // size
        return decoding

    def _keep_raw(self, request: _Request, block: int, is_new: bool) -> None:
        """Let tokens go to the residual row; also those by which decoding fills a block."""
        if request.row == NO_ROW:
            request.row = self._take_row()
        if is_new:
            self._row_seen[request.row] = 0
        self._move(block, RAW - request.row)

    def _take_row(self) -> int:
        if not self._free_rows:
            idle = (x for x in self._requests.items() if x[0] not in self._scheduled)
            name, request = next((name, x) for name, x in idle if x.row != NO_ROW)
            request.away = self._row_seen[request.row].copy()
            self.leaving[name] = request.row
            self._free_rows.append(request.row)
            request.row = NO_ROW
        return self._free_rows.pop()

    def _bring_back(self, name: str) -> None:
        request = self._requests[name]
        assert request.away is not None
        row = self.returning[name] = request.row = self._take_row()
        self._row_seen[row], request.away = request.away, None
        block = request.blocks[(request.computed - 1) // self.options.block_size]
        if int(self.state[block]) <= RAW:
            self._move(block, RAW - row)

    def _fill(self, request: _Request, index: int, block: int) -> None:
        """Let a prompt's block be staged, or sealed at once where there is no choice to make."""
        if not self.options.chooses:
            self.sealed["prompt"] += 1
            self._move(block, SEALED)
            return
        raw = int(self.state[block]) <= RAW
        seen = self._row_seen[request.row].copy() if raw else np.zeros_like(self._row_seen[0])
        if not self._free_staging:
            self._seal_block(next(b for b in self._staged if b not in self._new), "pressure")
        row = self._free_staging.pop()
        self._staged[block] = _Staged(row, index, request, seen)
        self._move(block, row)
        self._new.add(block)
        request.staged.append(block)

    def _part(self, request: _Request, first: int, decoding: bool) -> Part:
        options, size = self.options, self.options.block_size
        if not options.chooses:
            return Part(first, request.row, 0, False, NO_PROBES)
        if not decoding:
            probes = options.probing.chosen(first, request.computed, request.prompt)
            self._count(request, probes)
            return Part(first, request.row, request.own_from, False, probes - first)
        tail, last = first // size, options.decode_score == "last_query"
        if last and request.filled is None:
            return Part(first, request.row, tail, False, NO_PROBES)
        self._row_seen[request.row, : first % size + 1] += 1
        return Part(first, request.row, tail, last, np.zeros(1, dtype=np.int64))

    def _count(self, request: _Request, probes: np.ndarray) -> None:
        """Add a chunk's probes to the counts of the request's own blocks."""
        size = self.options.block_size
        for block in request.staged:
            staged = self._staged[block]
            _see(staged.seen, staged.index * size, probes)
        if request.computed % size:
            _see(self._row_seen[request.row], request.computed // size * size, probes)

    # ---- Sealing ---------------------------------------------------------------------------------

    def _seal_filled(self, request: _Request, reason: str) -> None:
        if request.filled is None:
            return
        options, index, block = self.options, request.filled, request.blocks[request.filled]
        if options.decode_score == "last_query":
            # One query alone has seen all of them: nothing to normalise [C].
            weight = np.ones(options.block_size, dtype=np.float32)
        else:
            weight = self._weight(self._row_seen[request.row], index, request)
        self._seals.append((block, RAW - request.row, index, weight))
        self.sealed[reason] += 1
        self._move(block, SEALED)
        request.filled = None

    def _seal_staged(self, request: _Request, reason: str) -> None:
        for block in list(request.staged):
            self._seal_block(block, reason)

    def _seal_block(self, block: int, reason: str) -> None:
        staged = self._staged.pop(block)
        weight = self._weight(staged.seen, staged.index, staged.request)
        self._seals.append((block, staged.row, staged.index, weight))
        self.sealed[reason] += 1
        self._move(block, SEALED)
        staged.request.staged.remove(block)
        self._free_staging.append(staged.row)

    def _weight(self, seen: np.ndarray, index: int, request: _Request) -> np.ndarray:
        positions = index * self.options.block_size + np.arange(self.options.block_size)
        length = max(request.prompt, request.computed)
        return saliency.weights(seen, positions, length, self.options.normalizer)

    def _take_seals(self) -> Seals | None:
        if not self._seals:
            return None
        block, source, index, weight = map(list, zip(*self._seals, strict=True))
        size, first = self.options.block_size, self.options.always_salient_first
        forced = [min(max(first - i * size, 0), size) for i in index]
        return Seals.of(block, source, forced, weight)


def _see(seen: np.ndarray, first: int, probes: np.ndarray) -> None:
    """Count for each token from a position on the probes that are not before it."""
    positions = first + np.arange(len(seen))
    seen += (len(probes) - np.searchsorted(probes, positions)).astype(np.int32)


def _prompt_length(new: NewRequestData) -> int:
    tokens = new.prefill_token_ids or new.prompt_token_ids
    if tokens is not None:
        return len(tokens)
    assert new.prompt_embeds is not None
    return len(new.prompt_embeds)
