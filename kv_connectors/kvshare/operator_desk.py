"""What a server's operator may do with the store: look, register canonical segments, evict.

Orders come from the operator's endpoint (``operator_api.py``) as signed parameters of an ordinary
request of one token, by the same way as every other request, and are answered with its output.

A *canonical* segment is text that the operator had computed behind a fixed context, never taken
from a user's request, so its KV carries no tenant's text. It stays until the operator evicts it.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from vllm_plugins.kv_connectors.kvshare.segments import Segment, Tokens, as_tokens
from vllm_plugins.kv_connectors.kvshare.tenancy import OperatorOrders, read_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.request import Request

    from vllm_plugins.kv_connectors.kvshare.index import SegmentIndex, Stored
    from vllm_plugins.kv_connectors.kvshare.plugin import KVShareOptions

# Digits of a domain's digest that are shown, and that name it in an order.
SHOWN_DIGITS = 16


@dataclass(frozen=True)
class Order:
    """An order that was signed with the operator's key.

    Attributes:
        do: ``inspect``, ``evict`` or ``register``.
        what: What to evict: ``all``, ``canonical`` or ``domain``.
        name: Of the canonical text or, to evict, of what.
        context: First tokens of the prompt that are the fixed context of a text to register.
    """

    do: str
    what: str = ""
    name: str = ""
    context: int = 0


class OperatorDesk:
    """Carries out orders.

    Args:
        signed: Verifies them.
        index: The stored segments.
        public: Domain of canonical segments; None where none may be registered.
    """

    def __init__(
        self, signed: OperatorOrders | None, index: SegmentIndex, public: bytes | None
    ) -> None:
        self._signed = signed
        self._index = index
        self._public = public
        self._canonical: dict[str, list[Segment]] = {}

    def order(self, request: Request) -> Order | None:
        """Return the order that a request carries; None where there is none that is genuine."""
        params = (request.kv_transfer_params or {}).get("kvshare")
        if self._signed is None or not isinstance(params, dict) or "operator" not in params:
            return None
        order = self._signed.verify(params["operator"])
        if order is None or order.get("salt") != request.cache_salt:
            return None
        if order["do"] != "register":
            return Order(order["do"], str(order.get("what", "")), str(order.get("name", "")))
        tokens = as_tokens(request.prompt_token_ids or ())
        if order["prompt"] != prompt_digest(tokens):
            return None
        return Order("register", name=str(order["name"]), context=int(order["context"]))

    def carry_out(self, order: Order) -> tuple[dict[str, Any], list[int]]:
        """Carry out an order to inspect or to evict.

        Returns:
            The answer, and the keys of the segments that are gone.
        """
        if order.do == "inspect":
            return self._inspect(), []
        if order.what == "all":
            return self._evict(list(self._index), tuple(self._canonical))
        if order.what == "canonical":
            if order.name not in self._canonical:
                return {"error": f"no canonical text is named {order.name!r}"}, []
            keys = [segment.key for segment in self._canonical[order.name]]
            return self._evict(keys, (order.name,))
        if len(order.name) != SHOWN_DIGITS:
            return {"error": f"a domain is named by {SHOWN_DIGITS} hexadecimal digits"}, []
        keys = [s.key for s in self._segments() if _shown(s.domain) == order.name]
        if not keys:
            return {"error": f"nothing is stored of domain {order.name!r}"}, []
        named = order.name == _shown(self._public or b"")
        return self._evict(keys, tuple(self._canonical) if named else ())

    def refusal(self, order: Order) -> str:
        """Return why a text cannot be registered; empty where it can."""
        if self._public is None:
            return "canonical segments need sharing_scope=public_canonical"
        if order.name in self._canonical:
            return f"a canonical text is named {order.name!r} already: evict it first"
        return ""

    def registered(self, order: Order, stored: Stored) -> tuple[dict[str, Any], list[int]]:
        """Keep what was stored of a text under its name, or none of it.

        Returns:
            The answer, and the keys of the segments that are gone again.
        """
        segments = [segment for segment in stored.segments if segment is not None]
        if not segments:
            return {"error": "nothing to store: the text is too short or there is no room"}, []
        refusal = self.refusal(order)
        if refusal:
            # Another request has registered the name meanwhile.
            return {"error": refusal}, [s.key for s in segments if self._index.remove(s.key)]
        if len(segments) < len(stored.segments):
            gone = [s.key for s in segments if self._index.remove(s.key)]
            quota = self._index.quota
            return {"error": f"no room: canonical texts are sure of {quota} tokens in all"}, gone
        self._index.pin(segments)
        self._canonical[order.name] = segments
        return {"tokens": sum(map(len, segments)), "segments": len(segments)}, []

    def lost(self, key: int) -> list[int]:
        """Let go of a canonical segment whose KV is gone; return the keys that go with it."""
        for name, segments in self._canonical.items():
            for segment in segments:
                if segment.key == key:
                    segments.remove(segment)
                    if not segments:
                        del self._canonical[name]
                    return self._index.unpin([segment])
        return []

    def release_all(self) -> list[int]:
        """Let go of all canonical segments, so that they can be evicted."""
        return self._release(tuple(self._canonical))

    def _release(self, names: Sequence[str]) -> list[int]:
        return [k for name in names for k in self._index.unpin(self._canonical.pop(name))]

    def _evict(self, keys: list[int], names: Sequence[str]) -> tuple[dict[str, Any], list[int]]:
        sizes = {key: len(self._index.get(key) or ()) for key in keys}
        gone = self._release(names)
        gone += [key for key in keys if key in self._index and self._index.remove(key)]
        # What a plan in flight still reads is found no more and goes when it lets go.
        return {"evicted_segments": len(keys), "evicted_tokens": sum(sizes.values())}, gone

    def _segments(self) -> list[Segment]:
        found = (self._index.get(key) for key in self._index)
        return [segment for segment in found if segment is not None]

    def _inspect(self) -> dict[str, Any]:
        domains: dict[str, list[Segment]] = {}
        for segment in self._segments():
            domains.setdefault(_shown(segment.domain), []).append(segment)
        return {
            "capacity_tokens": self._index.capacity,
            "used_tokens": self._index.used,
            "segments": len(self._index),
            "domains": [{"domain": name, **_sums(own)} for name, own in domains.items()],
            # Keeping them has counted as a hit.
            "canonical": [
                {"name": name, **_sums(own, spare=1)} for name, own in self._canonical.items()
            ],
        }


def operator_orders(options: KVShareOptions) -> OperatorOrders | None:
    """Return what verifies the operator's orders; None where there is no operator.

    Raises:
        PluginError: The operator's key cannot be read.
    """
    path = options.operator_key_file
    if path is None:
        return None
    return OperatorOrders(read_key("--plugin kvshare: operator_key_file", path))


def prompt_digest(tokens: Tokens) -> str:
    """Return the digest, in hexadecimal, that binds an order to the prompt it came with."""
    return blake2b(as_tokens(tokens).tobytes()).hexdigest()


def _shown(domain: bytes) -> str:
    return domain.hex()[:SHOWN_DIGITS]


def _sums(segments: Sequence[Segment], spare: int = 0) -> dict[str, int]:
    return {
        "tokens": sum(map(len, segments)),
        "segments": len(segments),
        "hits": sum(segment.hits - spare for segment in segments),
    }
