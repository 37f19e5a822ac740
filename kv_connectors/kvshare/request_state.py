"""What KVShare knows of one request, beside the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_plugins.kv_connectors.kvshare.operator_desk import Order
    from vllm_plugins.kv_connectors.kvshare.planner import Plan
    from vllm_plugins.kv_connectors.kvshare.segments import Segment, Tokens
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
        tokens: Its prompt, int32, shape (n,); empty where token ids do not say what its KV is.
        domain: Digest of the tenant domain; None where it shares with nobody.
        refusal: Why the last look-up promised nothing; None where it did, or once that is counted.
        planned: The last plan, whether or not it was carried out.
        used: The plan by which its KV was made; None where nothing was reused.
        pinned: Segments that are kept until the workers have read them.
        loading: Whether the workers are at it.
        stored: Whether its prompt has been stored.
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
        if is_mixed(self.request):
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
        if is_mixed(self.request):
            return False
        return self.domain is not None and wants(self.request, "store")


def is_mixed(request: Request) -> bool:
    """Whether a prompt has images or embeddings, so that token ids do not say what its KV is."""
    embedded = request.prompt_embeds is not None or request.prompt_token_ids is None
    return embedded or bool(request.mm_features)


def wants(request: Request, what: str) -> bool:
    """Whether a request's ``kv_transfer_params`` leave reuse, or storing, allowed."""
    params = (request.kv_transfer_params or {}).get("kvshare")
    return not isinstance(params, dict) or params.get(what, True) is not False
