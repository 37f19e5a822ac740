"""Models and engine settings that Dynamic-LLaVA cannot serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_plugins.errors import PluginError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BACKBONES = ("llama", "qwen2")
TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Vision towers whose tokens follow one another; others put row breaks between them."""


def check_model(where: str, config: Any) -> None:
    """Refuse a model that is not a LLaVA on a known decoder with full attention.

    Args:
        where: What an error names.
        config: transformers' configuration of the whole model.

    Raises:
        PluginError: It is of another kind.
    """
    if config.model_type != "llava":
        raise PluginError(
            where,
            f"serves LLaVA models, and this one is a {config.model_type}",
            f"drop {where} for this model",
        )
    text, tower = config.text_config, config.vision_config.model_type
    if text.model_type not in BACKBONES or tower not in TOWERS:
        raise PluginError(
            where,
            f"is not known to work with a {text.model_type} decoder behind a {tower}",
            f"use one of {', '.join(BACKBONES)} behind one of {', '.join(TOWERS)}",
        )
    if set(getattr(text, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise PluginError(
            where, "some of the model's layers see a window of tokens", f"drop {where}"
        )


def check_freeing(where: str, config: VllmConfig) -> None:
    """Refuse an engine whose upper layers cannot have block tables of their own.

    Args:
        where: What an error names.
        config: The engine's configuration.

    Raises:
        PluginError: It cannot.
    """
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise PluginError(
            f"{where} with --disable-hybrid-kv-cache-manager",
            "all layers would have one block table",
            "drop one of the two",
        )


def unsupported(config: VllmConfig) -> list[tuple[str, str, str]]:
    """Return what an engine's configuration has that dropped rows cannot bear.

    Returns:
        For each: the flag, the reason and the mend.
    """
    parallel = config.parallel_config
    found: list[tuple[Any, tuple[str, str, str]]] = [
        (
            config.model_config.runner_type != "generate",
            (
                f"--runner {config.model_config.runner_type}",
                "pooling would read rows that were not computed",
                "use a generating model",
            ),
        ),
        (
            parallel.pipeline_parallel_size > 1,
            (
                "--pipeline-parallel-size",
                "stages would exchange different rows than they expect",
                "use tensor parallelism",
            ),
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            (
                "context parallelism",
                "a block's tokens would lie on several ranks",
                "use tensor parallelism",
            ),
        ),
        (
            parallel.use_ubatching,
            ("--enable-dbo", "half-batches have metadata of their own", "drop it"),
        ),
        (
            config.cache_config.kv_sharing_fast_prefill,
            ("--kv-sharing-fast-prefill", "it drops rows in mid-model too", "drop it"),
        ),
        (
            config.kv_transfer_config is not None,
            (
                "--kv-transfer-config",
                "the upper layers' pages have holes that a connector does not know of, and depend "
                "on the keep rate",
                "drop one of the two",
            ),
        ),
        (
            config.speculative_config is not None,
            (
                "--speculative-config",
                "a drafter would read hidden states of rows that were not computed",
                "drop one of the two",
            ),
        ),
        (
            config.lora_config is not None,
            (
                "--enable-lora",
                "adapters are mapped to the rows of the whole step",
                "merge the adapter into the model",
            ),
        ),
    ]
    return [problem for applies, problem in found if applies]
