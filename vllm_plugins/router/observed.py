"""The few values that a router reads from a vLLM server's ``/metrics``."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SAMPLE = re.compile(
    rb"^(?:vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc|cache_config_info)"
    rb"|vllm_plugins:(pd_held_blocks))"
    rb"\{([^\n]*)\} (\S+)$",
    re.MULTILINE,
)
_BLOCKS = re.compile(rb'num_gpu_blocks="(\d{1,9})"')
_BLOCK_SIZE = re.compile(rb'(?<![a-z_])block_size="(\d{1,6})"')


@dataclass(frozen=True)
class Observed:
    """What an instance's metrics say; sums over its engines, the mean for the share.

    Attributes:
        running: Requests being computed.
        waiting: Requests that wait.
        kv_usage: Share of the KV blocks in use, 0 to 1.
        kv_blocks: Blocks of the KV cache; 0 where not said.
        block_size: Tokens of a block; 0 where not said.
        held_blocks: KV blocks that wait to be pulled; None for connectors that do not say.
        read_s: When they were read, in seconds of the event loop's clock.
    """

    running: int
    waiting: int
    kv_usage: float
    kv_blocks: int
    block_size: int
    held_blocks: int | None = None
    read_s: float = 0.0


def parse_metrics(text: bytes) -> Observed:
    """Return the few values that matter of a vLLM server's ``/metrics``.

    Raises:
        ValueError: A value is no number.
    """
    sums: dict[bytes, float] = {}
    engines = blocks = block_size = 0
    for stock, own, labels, value in _SAMPLE.findall(text):
        name = stock or own
        if name == b"cache_config_info":
            found, size = _BLOCKS.search(labels), _BLOCK_SIZE.search(labels)
            blocks += int(found[1]) if found else 0
            block_size = int(size[1]) if size else block_size
            continue
        sums[name] = sums.get(name, 0.0) + _number(value)
        engines += name == b"kv_cache_usage_perc"
    held = sums.get(b"pd_held_blocks")
    return Observed(
        int(sums.get(b"num_requests_running", 0)),
        int(sums.get(b"num_requests_waiting", 0)),
        sums.get(b"kv_cache_usage_perc", 0.0) / max(1, engines),
        blocks,
        block_size,
        None if held is None else int(held),
    )


def _number(text: bytes) -> float:
    value = float(text)
    if not 0 <= value < 1e15:
        raise ValueError(f"{text[:30]!r} cannot be")
    return value
