"""What vLLM asks a backend of packed pages, on any platform."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import torch
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_plugins.attention_backends.zipcache.page import BLOCK_SIZES, PageFormat


class PackedPages:
    """Stands before a platform's backend; `packed_backend` sets the format."""

    # Keys and values of a batch are attended to as they came, so both are one call.
    forward_includes_kv_cache_update: bool = True
    bits: ClassVar[str]
    salient_ratio: ClassVar[float]
    key_salient_ratio: ClassVar[float | None]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Return the sizes of blocks: a page is never cut into smaller ones."""
        return list(BLOCK_SIZES)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Let the cache be made of packed pages, so that it holds more blocks."""
        page = PageFormat.of(
            spec.block_size, spec.head_size, cls.bits, cls.salient_ratio, cls.key_salient_ratio
        )
        return dataclasses.replace(spec, dtype=torch.uint8, state_content_bytes=page.token_bytes)


@functools.cache
def packed_backend(
    backend: type[PackedPages],
    bits: str,
    salient_ratio: float,
    key_salient_ratio: float | None,
) -> type[PackedPages]:
    """Return a backend whose pages have the format of the plug-in's options.

    vLLM asks the class, not the layer, for the size of pages.

    Args:
        backend: The platform's.
        bits: Of salient and of other tokens.
        salient_ratio: Share of a block's tokens that are salient.
        key_salient_ratio: The same of keys, where it is not that of values.
    """
    of_keys = "" if key_salient_ratio is None else f",{key_salient_ratio:g}"
    options = {"bits": bits, "salient_ratio": salient_ratio, "key_salient_ratio": key_salient_ratio}
    # vLLM puts layers in one group by their backends' names.
    return type(f"{backend.__name__}[{bits},{salient_ratio:g}{of_keys}]", (backend,), options)
