"""Early prefill: the text before a late image is computed while the image is still on its way.

A request reaches the prefill server with the list of its items, some of which are not here yet.
Three pieces, which vLLM's scheduler asks in this order, let it start anyway:

1. ``ensure_cache_available(request, computed)`` is False where the next token to compute (and the
   drafter's look-ahead behind it) lies in a missing item. vLLM then skips the request in this step
   and goes on with others. Without this rule the cut of piece 3 would leave no tokens, and a
   waiting request without tokens ends vLLM's scan of the queue: everybody behind it would wait.
2. ``has_cache_item(id)`` is True only for an item that is here: it is loaded, not encoded.
3. ``EncoderCacheManager.can_allocate`` is False for a missing item: vLLM cuts the request's chunk
   just before it.

The connector has the first two, the class below the third; both ask the scheduler's side of the
plug-in (`scheduler_side.py`) which items are missing. Without early prefill piece 1 waits for
all items that are still ahead, and piece 3 finds none missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.request import Request


class Gate(Protocol):
    """What a scheduler's other parts ask and tell the scheduler's side."""

    def arrived(self, request: Request) -> None:
        """Take note of a request before it waits to be scheduled."""

    def is_missing(self, request: Request, index: int) -> bool:
        """Whether an item of a request is not here yet and must not be encoded here."""

    def found_cached(self, media: str) -> None:
        """An item that a request needs is in the encoder cache already."""

    def forget(self) -> None:
        """What has been encoded is no longer right, as when the weights change."""


# Connector and manager of one engine are made by the same scheduler, the connector first.
_gates: dict[str, Gate] = {}


def open_gate(engine: str, gate: Gate) -> None:
    """Let an engine's encoder cache manager find its scheduler's side."""
    _gates[engine] = gate


def gate_of(engine: str) -> Gate:
    """Return an engine's scheduler's side."""
    return _gates[engine]


def close_gate(engine: str) -> None:
    """Forget an engine that shuts down."""
    _gates.pop(engine, None)


def can_go_on(
    features: Sequence[MultiModalFeatureSpec],
    is_missing: Callable[[int], bool],
    computed: int,
    lookahead: int,
    early: bool,
) -> bool:
    """Whether a request can be scheduled: piece 1 of the rule.

    Args:
        features: The request's items, by place in the prompt.
        is_missing: Whether the item of an index is not here yet.
        computed: Tokens that have their KV.
        lookahead: Tokens that a drafter reads beyond those that a step computes.
        early: Whether tokens before a missing item may be computed.
    """
    for index, feature in enumerate(features):
        place = feature.mm_position
        if place.offset + place.length > computed and is_missing(index):
            # What is cut before this item ends where the drafter would read into it.
            return early and computed + lookahead < place.offset
    return True


class EpdEncoderCacheManager(EncoderCacheManager):
    """vLLM's own manager, which cuts a chunk before a missing item: piece 3 of the rule."""

    gate: Gate

    @classmethod
    def create_manager(cls, *, cache_size: int, vllm_config: VllmConfig) -> EpdEncoderCacheManager:
        """Make the manager of one engine.

        Args:
            cache_size: Its capacity in embeddings.
            vllm_config: Names the engine.
        """
        manager = cls(cache_size)
        assert vllm_config.ec_transfer_config is not None
        manager.gate = gate_of(vllm_config.ec_transfer_config.engine_id)
        return manager

    def reset(self) -> None:
        """Forget all embeddings, here and in the arena."""
        super().reset()
        self.gate.forget()

    def check_and_update_cache(self, request: Request, input_id: int) -> bool:
        """Return whether an item is in the encoder cache, and let the gate know."""
        found = super().check_and_update_cache(request, input_id)
        if found:
            self.gate.found_cached(request.mm_features[input_id].identifier)
        return found

    def can_allocate(
        self,
        request: Request,
        input_id: int,
        encoder_compute_budget: int,
        num_embeds_to_schedule: int,
    ) -> bool:
        """Return False for a missing item, else what vLLM's own manager says."""
        if self.gate.is_missing(request, input_id):
            return False
        return super().can_allocate(
            request, input_id, encoder_compute_budget, num_embeds_to_schedule
        )
