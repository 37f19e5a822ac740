"""Declaration of the SpecVLM plug-in."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from vllm_plugins.errors import PluginError
from vllm_plugins.plugin import Options, Paper, Requirements, WorkerPlugin
from vllm_plugins.spec_decode.specvlm.settings import (
    Mode,
    Operator,
    SpecVLMSettings,
    read_settings,
)

if TYPE_CHECKING:
    from vllm.config import LoRAConfig, ModelConfig, SpeculativeConfig, VllmConfig

    from vllm_plugins.arguments import EngineArguments
    from vllm_plugins.spec_decode.specvlm.listener import SpecVlmListener

logger = logging.getLogger("vllm.vllm_plugins.specvlm")

ARCHITECTURES = ("EagleSpecVLMLlamaForCausalLM", "EagleSpecVLMQwen2ForCausalLM")
"""Of a drafter's checkpoint, after the target's language model."""
MODEL_CLASS = "vllm_plugins.spec_decode.specvlm.model:SpecVlmDrafter"
OVERRIDES = ("mode", "default_operator", "select_from", "prune_ratio", "pool_ratio", "seed")
"""Options that replace what the checkpoint's own block says."""


class SpecVlmOptions(Options):
    """Options of SpecVLM."""

    model: str = Field(
        min_length=1,
        description="Drafter's checkpoint, as `vllm-plugins train specvlm` makes it.",
        examples=["DRAFTER"],
    )
    num_speculative_tokens: int = Field(
        5, ge=1, le=16, description="Tokens drafted in a round, one after another."
    )
    draft_until_batch: int | None = Field(
        32,
        ge=1,
        description="Requests of a step up to which it drafts: beyond, verifying may cost more "
        "than it saves. None drafts for every batch.",
    )
    draft_sampling: Literal["greedy", "probabilistic"] = Field(
        "greedy",
        description="How drafts are taken where requests have a temperature; either way outputs "
        "have the target's distribution.",
    )
    mode: Mode | None = Field(
        None,
        description="select: a gate picks the operator for the question; static: default_operator; "
        "weighted, concat: combinations; off: the image whole. By default the checkpoint's.",
    )
    default_operator: Operator | None = Field(
        None,
        description="Operator of mode=static, and where the gate does not see the question. By "
        "default the checkpoint's.",
    )
    select_from: tuple[Operator, ...] | None = Field(
        None,
        min_length=1,
        description="Operators that the gate picks from. All get as many rows as the one that "
        "needs most, so leaving conv out compresses more. By default the checkpoint's.",
    )
    prune_ratio: float | None = Field(
        None, ge=1, le=30, description="Image rows for one that prune keeps; by default trained."
    )
    pool_ratio: float | None = Field(
        None, ge=1, le=30, description="Image rows for one that pool makes; by default trained."
    )
    seed: int | None = Field(
        None, ge=0, lt=1 << 53, description="Of prune's random rows; by default the checkpoint's."
    )

    @model_validator(mode="after")
    def _distinct(self) -> SpecVlmOptions:
        named = self.select_from or ()
        if len(set(named)) != len(named):
            raise ValueError("select_from names an operator twice")
        return self

    def settings(self, draft: ModelConfig) -> SpecVLMSettings:
        """Return the checkpoint's settings with these options over them.

        Raises:
            PluginError: The checkpoint's block is absent or ill-formed.
        """
        block = getattr(draft.hf_config, "specvlm", None)
        trained = read_settings(block, f"{self.model}/config.json")
        over = {name: getattr(self, name) for name in OVERRIDES}
        return trained.model_copy(update={k: v for k, v in over.items() if v is not None})


class SpecVlmPlugin(WorkerPlugin):
    """EAGLE drafting for vision-language models, with an image compressed for the drafter."""

    name = "specvlm"
    family = "speculative decoding"
    summary = "Drafts with one layer that sees the image, compressed as the question needs it."
    papers = (Paper("SpecVLM: Fast Speculative Decoding in Vision-Language Models", "2509.11815"),)
    exactness = "exact; mode=off leaves the drafter the whole image"
    requires = Requirements(vllm=">=0.31", platforms=frozenset({"cpu", "cuda"}))
    conflicts: ClassVar[dict[str, str]] = {
        "kvshare": "the drafter has to see the tokens that are not computed",
        "pd": "which blocks the drafter does not see would not travel with them",
        "zipcache": "a rejected draft could be part of a block that is packed already",
    }
    Options: ClassVar[type[Options]] = SpecVlmOptions

    def enter_process(self, options: SpecVlmOptions) -> None:
        """Let vLLM find the drafter's class in this process."""
        from vllm import ModelRegistry

        known = ModelRegistry.get_supported_archs()
        for name in ARCHITECTURES:
            if name not in known:
                ModelRegistry.register_model(name, MODEL_CLASS)

    def configure(self, options: SpecVlmOptions, arguments: EngineArguments) -> None:
        """Have vLLM's EAGLE drafting load the drafter, and images arrive whole."""
        super().configure(options, arguments)
        arguments.set("speculative_config", _speculative(options))
        # The operators need an image's rows in one step.
        arguments.set("disable_chunked_mm_input", True)

    def check(self, options: SpecVlmOptions, config: VllmConfig) -> None:
        """Refuse targets, drafters and settings that cannot work together."""
        for flag, reason, mend in _unsupported(config):
            raise PluginError(f"--plugin specvlm with {flag}", reason, mend)
        assert config.speculative_config is not None
        draft = config.speculative_config.draft_model_config
        _check_draft(options.model, config.model_config, draft)
        settings = options.settings(draft)
        _check_encoder_cache(config, *settings.grid)
        _check_block_size(config.cache_config.block_size, settings.block_size)

    def listener(self, options: SpecVlmOptions, config: VllmConfig) -> SpecVlmListener:
        """Make the part of one worker."""
        from vllm_plugins.spec_decode.specvlm.listener import SpecVlmListener

        return SpecVlmListener(options, config)


def _speculative(options: SpecVlmOptions) -> dict[str, Any]:
    stock: dict[str, Any] = {
        "method": "eagle",
        "model": options.model,
        "num_speculative_tokens": options.num_speculative_tokens,
        "draft_sample_method": options.draft_sampling,
    }
    until = options.draft_until_batch
    if until is not None:
        # vLLM carries the last entry on to all larger batches.
        stock["num_speculative_tokens_per_batch_size"] = [
            (1, until, options.num_speculative_tokens),
            (until + 1, until + 1, 0),
        ]
    return stock


def _check_draft(where: str, target: ModelConfig, draft: ModelConfig) -> None:
    """Refuse a drafter that was made for something else.

    Raises:
        PluginError: It is of another kind or shape than the target needs.
    """
    ours = set(ARCHITECTURES) & set(draft.hf_config.architectures or ())
    if not ours:
        raise PluginError(
            f"--plugin specvlm: model={where}",
            f"is a {', '.join(draft.hf_config.architectures or ('model',))}, no drafter of SpecVLM",
            "train one: vllm-plugins train specvlm",
        )
    text = target.hf_text_config
    for name, own, wanted in (
        ("hidden size", draft.get_hidden_size(), text.hidden_size),
        ("vocabulary", draft.get_vocab_size(), text.vocab_size),
    ):
        if own != wanted:
            raise PluginError(
                f"--plugin specvlm: model={where}",
                f"has a {name} of {own} and the target one of {wanted}",
                "take a drafter that was trained for this target",
            )
    if draft.uses_mrope:
        raise PluginError(
            f"--plugin specvlm: model={where}",
            "has positions of three dimensions, which compressed rows have not",
            "train the drafter with one-dimensional positions",
        )


def _check_encoder_cache(config: VllmConfig, lines: int, columns: int) -> None:
    """Refuse an encoder cache in which two images side by side would wait for each other for ever.

    Drafting looks one token ahead: the last token of one image needs the first of the next.

    Raises:
        PluginError: Prompts may have several images, and it holds only one.
    """
    limit = config.model_config.get_multimodal_config().get_limit_per_prompt("image")
    held = config.scheduler_config.encoder_cache_size
    if limit > 1 and held < 2 * lines * columns:
        raise PluginError(
            "--plugin specvlm",
            f"several images of {lines * columns} tokens in a prompt, but an encoder cache of "
            f"{held}",
            f"set --max-num-batched-tokens to {2 * lines * columns} or more, or "
            "--limit-mm-per-prompt '{\"image\": 1}'",
        )


def _check_block_size(served: int | None, trained: int) -> None:
    """Say so where the drafter sees other rows of an image than it was trained for."""
    if served is not None and served != trained:
        logger.warning(
            "vllm-plugins: specvlm: KV blocks have %d tokens, the drafter was trained for %d and "
            "sees other rows of an image than in training: --block-size %d",
            served,
            trained,
            trained,
        )


def _is_plain_eagle(speculative: SpeculativeConfig) -> bool:
    other = speculative.parallel_drafting or speculative.disable_padded_drafter_batch
    return speculative.method == "eagle" and not other


def _may_adapt_head(lora: LoRAConfig | None) -> bool:
    """Return whether vLLM would apply an adapter's part for the head."""
    if lora is None:
        return False
    modules = lora.target_modules
    return modules is None or any(name.endswith("lm_head") for name in modules)


def _unsupported(config: VllmConfig) -> list[tuple[str, str, str]]:
    """Return what the engine's configuration has that SpecVLM cannot serve."""
    parallel, speculative = config.parallel_config, config.speculative_config
    found: list[tuple[bool, tuple[str, str, str]]] = [
        (
            speculative is None,
            ("no --speculative-config", "there is nothing to draft with", "use --plugin specvlm"),
        ),
        (
            speculative is not None and not _is_plain_eagle(speculative),
            (
                "this --speculative-config",
                "the drafter is served by method 'eagle', its steps one after another and padded",
                "drop --speculative-config",
            ),
        ),
        (
            not config.model_config.is_multimodal_model,
            ("this model", "it takes no images", "use --speculative-config for a text model"),
        ),
        (
            parallel.pipeline_parallel_size > 1,
            (
                "--pipeline-parallel-size",
                "the drafter's stage has no image embeddings",
                "use --tensor-parallel-size",
            ),
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            ("context parallelism", "holes are whole blocks of one rank", "use tensor parallelism"),
        ),
        (
            parallel.use_ubatching,
            ("--enable-dbo", "a step's rows would be halved before the drafter", "drop it"),
        ),
        (
            config.kv_transfer_config is not None,
            (
                "--kv-transfer-config",
                "which blocks the drafter does not see would not travel with them",
                "drop one of the two",
            ),
        ),
        (
            config.cache_config.kv_sharing_fast_prefill,
            ("--kv-sharing-fast-prefill", "it drops the drafter's prompt rows", "drop it"),
        ),
        (
            config.use_v2_model_runner and _may_adapt_head(config.lora_config),
            (
                "--enable-lora",
                "model runner V2 maps an adapter of lm_head to one row of a request, and drafts "
                "have more",
                "set --lora-target-modules without lm_head",
            ),
        ),
    ]
    return [problem for applies, problem in found if applies]
