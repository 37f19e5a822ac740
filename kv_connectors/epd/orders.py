"""What the scheduler's side tells the workers in each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorMetadata

from vllm_plugins.kv_connectors.epd.media import Shape
from vllm_plugins.kv_connectors.epd.shared_memory import Location


@dataclass(frozen=True)
class Copy:
    """One item's embeddings to copy between the encoder cache and the arena.

    Args:
        media: Id of the item, which is also its name in the encoder cache.
        shape: What its rows look like.
        blocks: Of the arena, in order.
        sequence: Number of the arena's reservation.
    """

    media: str
    shape: Shape
    blocks: tuple[int, ...]
    sequence: int


@dataclass
class Orders(ECConnectorMetadata):
    """Copies of one step.

    Attributes:
        step: Number of the step; zero where there is nothing to report.
        memory: Where the arena's memory is.
        saves: From the encoder cache into the arena, as soon as they are encoded.
        loads: From the arena into the encoder cache, before the model reads it.
    """

    step: int
    memory: Location
    saves: list[Copy] = field(default_factory=list)
    loads: list[Copy] = field(default_factory=list)
