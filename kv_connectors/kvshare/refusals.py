"""Engine configurations under which KVShare cannot run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_plugins.kv_connectors.kvshare.plugin import KVShareOptions
from vllm_plugins.settings import requested

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FULL_HIT_MS = KVShareOptions.model_fields["full_hit_ms"].default
# Methods of speculative decoding whose drafter reads nothing but token ids.
TOKEN_DRAFTERS = frozenset({"ngram", "suffix"})

MOVABLE_DTYPES = frozenset({"auto", "float16", "bfloat16"})


def unsupported(options: KVShareOptions, config: VllmConfig) -> list[tuple[str, str, str]]:
    """Return what KVShare cannot serve: what it runs with, why not, and what to do."""
    parallel, drafter = config.parallel_config, config.speculative_config
    others = {spec.name for spec in requested(config.additional_config)}
    found: list[tuple[Any, tuple[str, str, str]]] = [
        (
            options.full_hit_ms != FULL_HIT_MS and "spf" in others and options.order == "hit_rate",
            ("spf", "its gamma, not full_hit_ms, says how waiting weighs", "drop full_hit_ms"),
        ),
        (
            parallel.pipeline_parallel_size > 1,
            (
                "--pipeline-parallel-size",
                "stages would need each other's hidden states to recompute a token",
                "use tensor parallelism",
            ),
        ),
        (
            parallel.decode_context_parallel_size > 1,
            ("--decode-context-parallel-size", "a token's KV would be split", "drop it"),
        ),
        (
            config.cache_config.cache_dtype not in MOVABLE_DTYPES,
            ("--kv-cache-dtype", "a quantised KV cache cannot be moved", "use 'auto'"),
        ),
        (
            config.lora_config is not None,
            ("--enable-lora", "recomputed tokens would miss the adapter", "drop one of the two"),
        ),
        (
            drafter is not None and drafter.method not in TOKEN_DRAFTERS,
            (
                "--speculative-config",
                "the drafter needs hidden states of the tokens that are not computed",
                "use method 'ngram' or 'suffix'",
            ),
        ),
    ]
    return [problem for applies, problem in found if applies]
