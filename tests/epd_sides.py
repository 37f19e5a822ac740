"""EPD's two sides without an engine: requests of vLLM's own class, and memory of a few blocks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from vllm_plugins.kv_connectors.epd.arena import Arena
from vllm_plugins.kv_connectors.epd.media import KEY, Shape, Source
from vllm_plugins.kv_connectors.epd.shared_memory import SharedMemory
from vllm_plugins.wire.address import Address

WIDTH = 4
TOKENS = 4
BLOCK = TOKENS * WIDTH * 4


def shape_of(num_tokens: int, modality: str) -> Shape:
    return Shape(num_tokens, WIDTH, "float32")


def request(
    name: str, media: list[str], tokens: int = TOKENS, params: Any = None, kv: Any = None
) -> Request:
    """Return a request with text of two tokens before, between and after its items."""
    features = [
        MultiModalFeatureSpec(
            data=MultiModalKwargsItem(),
            modality="image",
            identifier=identifier,
            mm_position=PlaceholderRange(offset=2 + i * (tokens + 2), length=tokens),
        )
        for i, identifier in enumerate(media)
    ]
    given = {"ec_transfer_params": params, "kv_transfer_params": kv}
    extra = {name: value for name, value in given.items() if value is not None}
    return Request(
        request_id=name,
        prompt_token_ids=[1] * (2 + len(media) * (tokens + 2)),
        sampling_params=SamplingParams(max_tokens=4, extra_args=extra or None),
        pooling_params=None,
        mm_features=features,
    )


def source(
    address: Address = Address("127.0.0.1", 4000),  # noqa: B008 - frozen
    shape: Shape = Shape(TOKENS, WIDTH, "float32"),  # noqa: B008 - frozen
    **changes: str,
) -> Source:
    fields = {"generation": "a" * 32, "digest": "b" * 32, "lease": "c" * 32} | changes
    return Source(address=address, shape=shape, lease_end=0.0, **fields)


def params_of(*media: str, **changes: Any) -> dict[str, Any]:
    return {name: {"item_indices": [0], KEY: source(**changes).to_json()} for name in media}


@dataclass
class Counts:
    """Takes the place of the metrics' ledger; counts by metric and label."""

    values: dict[tuple[str, str], float] = field(default_factory=dict)

    def inc(self, spec: Any, amount: float = 1, label: str = "") -> None:
        key = (spec.name, label)
        self.values[key] = self.values.get(key, 0) + amount

    set = inc
    observe = inc

    def __getitem__(self, name: str) -> float:
        return sum(value for (known, _), value in self.values.items() if known == f"epd_{name}")


@dataclass
class Fetching:
    """Takes the place of a fetcher; what it is told to do, it keeps."""

    jobs: dict[str, Callable[[str, str], None]] = field(default_factory=dict)
    released: list[tuple[str, str]] = field(default_factory=list)
    renewed: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)

    def fetch(
        self, entry: Any, source: Source, deadline: float, done: Callable[[str, str], None]
    ) -> None:
        assert entry.media not in self.jobs
        self.fetched.append(entry.media)
        self.jobs[entry.media] = done

    def end(self, media: str, missing: str = "") -> None:
        """Let a fetch succeed, or fail for a reason."""
        self.jobs.pop(media)(missing, "" if missing else "b" * 32)

    def release(self, source: Source, media: str) -> None:
        self.released.append((source.lease, media))

    def renew(self, source: Source) -> None:
        self.renewed.append(source.lease)


def arena_of(blocks: int, clock: Callable[[], float] | None = None) -> Arena:
    return Arena(blocks, BLOCK, clock) if clock else Arena(blocks, BLOCK)


def memory_of(blocks: int, workers: int = 1) -> SharedMemory:
    return SharedMemory.create(workers, blocks, BLOCK)
