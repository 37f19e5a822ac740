"""What a connector's scheduler side and its worker sides tell each other, once per step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

if TYPE_CHECKING:
    from vllm_plugins.kv_connectors.pd.geometry import Shard
    from vllm_plugins.kv_connectors.pd.protocol import Span
    from vllm_plugins.kv_connectors.pd.reference import Peer, Reference


@dataclass
class Introduction(KVConnectorHandshakeMetadata):
    """What a worker tells its scheduler at start: what it holds, and where it serves it."""

    shard: Shard
    peer: Peer | None


@dataclass(frozen=True)
class Hold:
    """A finished prompt whose blocks stay until they are pulled.

    Attributes:
        transfer_id: Name under which they are pulled.
        request_id: Name under which vLLM keeps them.
        digest: Of the prompt.
        blocks: Block ids by KV cache group; of recurrent layers the state's alone.
    """

    transfer_id: str
    request_id: str
    digest: str
    blocks: tuple[list[int], ...]


@dataclass(frozen=True)
class Load:
    """A prompt to pull.

    Attributes:
        request_id: vLLM's name of the request.
        reference: Where its KV is.
        digest: Of the prompt as this side knows it.
        spans: Positions to pull, by KV cache group.
        blocks: The blocks for them, by group.
    """

    request_id: str
    reference: Reference
    digest: str
    spans: tuple[Span, ...]
    blocks: tuple[list[int], ...]


@dataclass(frozen=True)
class Chunk:
    """A chunk of a prompt that this step computes and that is pulled layer by layer.

    Attributes:
        transfer_id: The transfer.
        digest: Of the whole prompt.
        blocks: Its block ids so far, by KV cache group.
        ready: Positions that are complete once this step has computed a layer, by group; of
            recurrent layers none, whose state leaves when the prompt is held.
        last: Whether the prompt ends with it.
    """

    transfer_id: str
    digest: str
    blocks: tuple[list[int], ...]
    ready: tuple[int, ...]
    last: bool = False


@dataclass
class Orders(KVConnectorMetadata):
    """Orders of one step.

    Attributes:
        holds: Blocks to keep.
        loads: Blocks to fill.
        chunks: Of this step, those that others are waiting for.
        cancelled: Transfers that do not come to an end here.
        readers: All workers' shards, once, as soon as the scheduler knows them.
        idle: Whether the step computes nothing.
    """

    holds: list[Hold] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    readers: tuple[Shard, ...] = ()
    idle: bool = False


@dataclass
class Report(KVConnectorWorkerMetadata):
    """What happened in the workers since the last step.

    Attributes:
        received: Bytes pulled, by way: tcp, unix, shared_memory.
        pull_seconds: Durations of complete pulls.
        failures: Failed pulls, by reason.
        expired: Leases that nobody renewed.
        early: Bytes that left before the last step of their prompt was over.
        sent: Bytes that left.
    """

    received: Counter[str] = field(default_factory=Counter)
    pull_seconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    expired: int = 0
    early: int = 0
    sent: int = 0

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Report:
        """Return the sum of two workers' reports."""
        assert isinstance(other, Report)
        return Report(
            self.received + other.received,
            self.pull_seconds + other.pull_seconds,
            self.failures + other.failures,
            self.expired + other.expired,
            self.early + other.early,
            self.sent + other.sent,
        )

    def __bool__(self) -> bool:
        return self != Report()
