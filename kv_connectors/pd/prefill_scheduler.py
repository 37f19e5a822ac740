"""The prefill side in the scheduler: which finished prompts are kept, and when that is too many."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from vllm_plugins.kv_connectors.pd.groups import NULL_BLOCK, Groups, stop_before_last_token
from vllm_plugins.kv_connectors.pd.orders import Chunk, Hold
from vllm_plugins.kv_connectors.pd.reference import (
    KEY,
    BadReferenceError,
    Reference,
    prompt_digest,
    transfer_id,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from vllm_plugins.kv_connectors.pd.orders import Orders
    from vllm_plugins.kv_connectors.pd.reference import Peer

logger = init_logger("vllm.vllm_plugins.pd")

# A prompt whose first token was sampled: there is something to decode.
PREFILLED = frozenset({RequestStatus.FINISHED_LENGTH_CAPPED})
# What is sampled behind a shortened prompt may end an answer, and means nothing.
SHORTENED = PREFILLED | {RequestStatus.FINISHED_STOPPED}


class PrefillScheduler:
    """Hands prompts over.

    Args:
        groups: The KV cache groups.
        total_blocks: Blocks of the pool.
        max_held_fraction: Share of the pool that started prompts, and those that wait to be
            pulled, may take together.
        stream_layers: Whether prompts may be read while they are being computed.
    """

    def __init__(
        self,
        groups: Groups,
        total_blocks: int,
        max_held_fraction: float,
        *,
        stream_layers: bool,
    ) -> None:
        self._groups, self._stream_layers = groups, stream_layers
        self._most_held = max_held_fraction * total_blocks
        self._peers: tuple[Peer, ...] = ()
        self._transfers: dict[str, str] = {}
        self._streams: dict[str, tuple[Request, str]] = {}
        self._started: dict[str, int] = {}
        self._held: dict[str, tuple[str, int]] = {}
        self._names: set[str] = set()
        self._shortened: set[str] = set()
        self._started_blocks = self._held_blocks = 0
        self._full = False
        self._holds: list[Hold] = []
        self._cancelled: list[str] = []

    def introduce(self, peers: Sequence[Peer]) -> None:
        """Learn where the workers serve their blocks."""
        self._peers = tuple(peers)

    @property
    def held_blocks(self) -> int:
        """Blocks that wait to be pulled."""
        return self._held_blocks

    def arrive(self, request: Request) -> None:
        """Note a request that is to be handed over.

        Where layers forget, its prompt is shortened by the token that the decode instance computes,
        unless whoever asks continues behind the token that is sampled here, and says so.

        Raises:
            BadReferenceError: Its parameters are malformed, or name a transfer of another request;
                it is then answered without a reference.
        """
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_decode"):
            return
        body = params.get(KEY) or {}
        if not isinstance(body, dict):
            raise BadReferenceError(f"'{KEY}' is no JSON object")
        if request.prompt_token_ids is None:
            raise BadReferenceError("a prompt of embeddings has no tokens to name it by")
        name = transfer_id(body) if "transfer_id" in body else uuid.uuid4().hex
        if name in self._names:
            raise BadReferenceError(f"transfer_id {name} is another request's")
        self._names.add(name)
        self._transfers[request.request_id] = name
        continued = body.get("continued") is True
        if self._groups.stop_early and not continued and stop_before_last_token(request):
            self._shortened.add(request.request_id)
        if self._stream_layers and body.get("stream") is True:
            self._streams[request.request_id] = (request, digest_of(request))

    def must_wait(self, request: Request) -> bool:
        """Whether a prompt must not be started, since too much waits to be pulled already.

        That is DistServe's back-pressure: the blocks of the batch, of the candidate and of all
        finished prompts that are not pulled yet stay within a limit. A prompt that alone exceeds
        it starts when there is no other. vLLM *skips* who has to wait, so the first of a step holds
        back all that it is asked about behind it: whatever the order of the queue is, nobody is
        overtaken by smaller prompts. One that was preempted is in the sum already.
        """
        if not self._waits_for_room(request):
            return False
        self._full |= self._exceeds(self._held_blocks + self._started_blocks, request)
        return self._full

    def startable(self, waiting: Iterable[Request]) -> Iterator[Request]:
        """Yield those of the waiting requests that `must_wait` lets start in one step, in order."""
        taken, full = self._held_blocks + self._started_blocks, False
        for request in waiting:
            if self._waits_for_room(request):
                full = full or self._exceeds(taken, request)
                if full:
                    continue
                taken += self._blocks(request)
            yield request

    def start(self, request: Request) -> None:
        """Note that a prompt has its blocks."""
        if self._waits_for_room(request):
            self._started[request.request_id] = self._blocks(request)
            self._started_blocks += self._started[request.request_id]

    def step(self, output: SchedulerOutput, blocks_of: Any, orders: Orders) -> None:
        """Add to a step's orders.

        Args:
            output: What the step computes.
            blocks_of: Returns a request's block ids by group.
            orders: Receives the orders.
        """
        self._full = False
        orders.holds, self._holds = self._holds, []
        for request_id, (request, _) in list(self._streams.items()):
            if request.num_preemptions:
                # Its blocks are others' now; it may start again, but not under the same name.
                del self._streams[request_id]
                self._cancelled.append(self._transfers[request_id])
        orders.cancelled, self._cancelled = self._cancelled, []
        for request_id, (request, digest) in self._streams.items():
            count = output.num_scheduled_tokens.get(request_id)
            if count:
                orders.chunks.append(self._chunk(request, digest, count, blocks_of(request_id)))

    def finished(
        self, request: Request, blocks: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Keep a finished prompt's blocks; return whether, and what names them."""
        name = self._transfers.pop(request.request_id, None)
        stream = self._streams.pop(request.request_id, None)
        good = SHORTENED if request.request_id in self._shortened else PREFILLED
        self._shortened.discard(request.request_id)
        self._started_blocks -= self._started.pop(request.request_id, 0)
        if name is None:
            return False, None
        if request.status not in good or not self._stands_right(request):
            self._cancelled.append(name)
            self._names.discard(name)
            return False, None
        digest = stream[1] if stream else digest_of(request)
        tokens = request.num_prompt_tokens
        kept = tuple(
            group.kept(ids, tokens) for group, ids in zip(self._groups.all, blocks, strict=True)
        )
        count = sum(block != NULL_BLOCK for ids in kept for block in ids)
        self._holds.append(Hold(name, request.request_id, digest, kept))
        self._held[request.request_id] = (name, count)
        self._held_blocks += count
        return True, Reference(name, tokens, digest, self._peers).to_params()

    def freed(self, request_id: str) -> None:
        """Note that vLLM frees a request's blocks."""
        if request_id in self._held:
            name, blocks = self._held.pop(request_id)
            self._names.discard(name)
            self._held_blocks -= blocks

    @property
    def has_orders(self) -> bool:
        """Whether the workers have yet to hear something."""
        return bool(self._holds or self._cancelled)

    def _waits_for_room(self, request: Request) -> bool:
        """Whether a request is to be handed over, and has not been started yet."""
        name = request.request_id
        return name in self._transfers and name not in self._started

    def _exceeds(self, taken: int, request: Request) -> bool:
        return bool(taken) and taken + self._blocks(request) > self._most_held

    def _blocks(self, request: Request) -> int:
        return self._groups.most_blocks(request.num_prompt_tokens)

    def _stands_right(self, request: Request) -> bool:
        """Whether what is kept is of the prompt; what forgets must not have gone on behind it."""
        behind = request.num_computed_tokens - request.num_prompt_tokens
        return behind == 0 or (behind > 0 and not self._groups.stop_early)

    def _chunk(
        self, request: Request, digest: str, count: int, blocks: tuple[list[int], ...]
    ) -> Chunk:
        """Return a step's part of a prompt; the last one completes its last block too."""
        tokens = request.num_prompt_tokens
        # vLLM counts a step's tokens only after it has asked for its orders.
        end = min(request.num_computed_tokens + count, tokens)
        ready = tuple(
            0
            if group.is_state
            else group.table_blocks(end)
            if end == tokens
            else end // group.block_size
            for group in self._groups.all
        )
        name = self._transfers[request.request_id]
        return Chunk(name, digest, blocks, ready, last=end == tokens)


def digest_of(request: Request) -> str:
    """Return the digest of all that a request's prompt KV depends on."""
    tokens = request.prompt_token_ids
    assert tokens is not None
    return prompt_digest(tokens, extra_of(request))


def extra_of(request: Request) -> list[Any]:
    """Return what the KV of a request's prompt depends on besides its tokens."""
    adapter = request.lora_request
    return [
        None if adapter is None else adapter.lora_name,
        request.cache_salt,
        *((media.identifier, media.mm_position.offset) for media in request.mm_features or ()),
    ]
