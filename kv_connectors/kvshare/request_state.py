"""What KVShare knows of one request, beside the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_plugins.kv_connectors.kvshare.segments import as_tokens

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_plugins.kv_connectors.kvshare.operator_desk import Order
    from vllm_plugins.kv_connectors.kvshare.planner import Plan
    from vllm_plugins.kv_connectors.kvshare.segments import Segment, Tokens
    from vllm_plugins.kv_connectors.kvshare.tainted import Root
    from vllm_plugins.kv_connectors.kvshare.tally import Refusal


@dataclass(frozen=True, slots=True)
class Hit:
    """What a waiting request would find in the store.

    Attributes:
        share: Share of its prompt that is stored, in [0, 1].
        saved: Prefill that its reuse spares, in tokens through all layers.
    """

    share: float
    saved: float


NO_HIT = Hit(0.0, 0.0)


@dataclass
class RequestState:
    """What is known of a request from its first look-up to its end.

    Attributes:
        request: vLLM's own object.
        tokens: Its prompt as far as token ids say what its KV is (`text_of`), int32, shape (n,).
        domain: Digest of the tenant domain; None where it shares with nobody.
        refusal: Why the last look-up promised nothing; None where it did, or once that is counted.
        cached: Tokens that the prefix cache held for it at the last look-up.
        root: Where what the prefix cache held is approximate from; None where it is exact.
        turns: Blocks at which its chain of hashes has gone over to a root, in order.
        planned: The last plan, whether or not it was carried out.
        used: The plan by which its KV was made; None where nothing was reused.
        pinned: Segments that are kept until the workers have read them.
        loading: Whether the workers are at it.
        stored: Whether its `tokens` have been stored, or are not to be.
        refreshed: Generated tokens at the last look at its stale tokens; None without any.
        hit: What it would find in the store, as of ``hit_version`` of the index.
        hit_version: Version of the index at the last look-up by the waiting order.
        declined: Whether it is to be computed in full, after a load that failed.
        order: What the server's operator orders by it.
        answer: What the operator is told when it ends.
    """

    request: Request
    tokens: Tokens
    domain: bytes | None
    refusal: Refusal | None = None
    cached: int = 0
    root: Root | None = None
    turns: list[int] = field(default_factory=list)
    planned: Plan | None = None
    used: Plan | None = None
    pinned: list[Segment] = field(default_factory=list)
    loading: bool = False
    stored: bool = False
    refreshed: int | None = None
    hit: Hit = NO_HIT
    hit_version: int = -1
    declined: bool = False
    order: Order | None = None
    answer: dict[str, Any] = field(default_factory=dict)

    @property
    def barred(self) -> Refusal | None:
        """Why stored KV may not serve it, whatever is stored; None where it may."""
        if len(self.tokens) == 0:
            return "media"
        if self.order is not None:
            return "operator"
        if self.domain is None:
            return "unsigned"
        if not wants(self.request, "reuse"):
            return "opted_out"
        if self.request.skip_reading_prefix_cache:
            return "full_prefill"
        return "failed" if self.declined else None

    @property
    def may_store(self) -> bool:
        """Whether its KV may be stored, once complete."""
        if self.order is not None:
            return self.order.do == "register"
        return len(self.tokens) > 0 and self.domain is not None and wants(self.request, "store")

    @property
    def may_refresh(self) -> bool:
        """Whether what it reuses may be computed again while it decodes."""
        # After a preemption, what the prefix cache gives back is not told apart. Behind an image,
        # a token's index is not the position by which M-RoPE rotated the query that looks.
        return not self.request.num_preemptions and not is_mixed(self.request)


def is_mixed(request: Request) -> bool:
    """Whether a prompt has images or embeddings, so that not all its KV follows from token ids."""
    embedded = request.prompt_embeds is not None or request.prompt_token_ids is None
    return embedded or bool(request.mm_features)


def text_of(request: Request) -> Tokens:
    """Return the part of a prompt whose KV follows from its token ids, int32, shape (n,).

    That is what stands before its first image: behind it KV is the image's, and with M-RoPE its
    positions are others as well. Of a prompt with embeddings it is nothing.
    """
    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        return as_tokens(())
    tokens = as_tokens(request.prompt_token_ids)
    first = min((m.mm_position.offset for m in request.mm_features), default=len(tokens))
    return tokens[:first]


def wants(request: Request, what: str) -> bool:
    """Whether a request's ``kv_transfer_params`` leave reuse, or storing, allowed."""
    params = (request.kv_transfer_params or {}).get("kvshare")
    return not isinstance(params, dict) or params.get(what, True) is not False
