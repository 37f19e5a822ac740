"""What KVShare knows of one request, beside the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_plugins.kv_connectors.kvshare.operator_desk import Order
    from vllm_plugins.kv_connectors.kvshare.planner import Plan
    from vllm_plugins.kv_connectors.kvshare.segments import Segment, Tokens


@dataclass
class RequestState:
    """What is known of a request from its first look-up to its end.

    Attributes:
        request: vLLM's own object.
        tokens: Its prompt, int32, shape (n,).
        domain: Digest of the tenant domain; None where it shares with nobody.
        planned: The last plan, whether or not it was carried out.
        used: The plan by which its KV was made; None where nothing was reused.
        pinned: Segments that are kept until the workers have read them.
        loading: Whether the workers are at it.
        stored: Whether its prompt has been stored.
        refreshed: Generated tokens at the last look at its stale tokens; None without any.
        share: Share of its prompt that is stored, as of ``share_version`` of the index.
        share_version: Version of the index at the last look-up by the waiting order.
        declined: Whether it is to be computed in full, after a load that failed.
        order: What the server's operator orders by it.
        answer: What the operator is told when it ends.
    """

    request: Request
    tokens: Tokens
    domain: bytes | None
    planned: Plan | None = None
    used: Plan | None = None
    pinned: list[Segment] = field(default_factory=list)
    loading: bool = False
    stored: bool = False
    refreshed: int | None = None
    share: float = 0.0
    share_version: int = -1
    declined: bool = False
    order: Order | None = None
    answer: dict[str, Any] = field(default_factory=dict)

    @property
    def may_reuse(self) -> bool:
        """Whether stored KV may serve it."""
        barred = self.domain is None or self.declined or self.order is not None
        return not barred and wants(self.request, "reuse")

    @property
    def may_store(self) -> bool:
        """Whether its KV may be stored, once complete."""
        if self.order is not None:
            return self.order.do == "register"
        return self.domain is not None and wants(self.request, "store")


def wants(request: Request, what: str) -> bool:
    """Whether a request's ``kv_transfer_params`` leave reuse, or storing, allowed."""
    params = (request.kv_transfer_params or {}).get("kvshare")
    return not isinstance(params, dict) or params.get(what, True) is not False
