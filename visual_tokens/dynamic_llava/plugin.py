"""Declaration of the Dynamic-LLaVA plug-in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from vllm_plugins.errors import PluginError
from vllm_plugins.plugin import (
    SCHEDULER_HOST,
    Options,
    Paper,
    Requirements,
    SchedulerPlugin,
    WorkerPlugin,
)
from vllm_plugins.settings import requested
from vllm_plugins.visual_tokens.dynamic_llava import refusals
from vllm_plugins.visual_tokens.dynamic_llava.sparse_config import KEY, SparseConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_plugins.arguments import EngineArguments
    from vllm_plugins.engine.block_holes.plan import Hole, Span
    from vllm_plugins.engine.policy import SchedulerPolicy
    from vllm_plugins.visual_tokens.dynamic_llava.listener import DynamicLlavaListener

NAME = "dynamic_llava"
ARCHITECTURE = "DynamicLlavaForConditionalGeneration"
MODEL = f"vllm_plugins.visual_tokens.dynamic_llava.model:{ARCHITECTURE}"
GUARD = "vllm_plugins.visual_tokens.dynamic_llava.guard:PromptLogprobsGuard"
DEFAULT_LAYER = 2
"""The published models' l (section 4.1)."""


class DynamicLlavaOptions(Options):
    """Options of Dynamic-LLaVA."""

    image_keep_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of each image's tokens that the upper layers see, rounded down to "
        "whole tokens and up to whole cache blocks. By default the checkpoint's; 1 if it has none.",
    )
    image_scorer: Literal["predictor", "attention", "norm", "random"] = Field(
        "predictor",
        description="What orders an image's tokens: the checkpoint's predictor; without training, "
        "attention that the question pays them; or, to compare with, their norm or nothing.",
        # Attention is read in the lower half.
        json_schema_extra={"graph": True},
    )
    prune_layer: int | None = Field(
        None,
        ge=1,
        description="First decoder layer, counted from 0, that sees fewer tokens. By default the "
        f"checkpoint's, or {DEFAULT_LAYER}.",
        json_schema_extra={"graph": True},
    )
    text_keep: bool = Field(
        False,
        description="Whether the upper layers forget answer tokens that the checkpoint's text "
        "predictor does not keep. Turns prefix caching off.",
        json_schema_extra={"graph": True},
    )
    free_hole_blocks: bool = Field(
        False,
        description="Whether cache blocks of dropped image tokens are given back to other "
        "requests, and with text_keep none are taken for forgotten tokens. Turns prefix caching "
        "off.",
    )


@dataclass(frozen=True)
class Pruning:
    """What an engine drops.

    Attributes:
        layer: First layer that sees fewer tokens, l.
        keep_rate: Share of an image's tokens to keep, r_I.
        scorer: What orders them.
        text: Whether answer tokens are forgotten.
        frees: Whether tokens that are dropped or forgotten keep no blocks.
        trained: What the checkpoint says of its predictors, where one is used.
    """

    layer: int
    keep_rate: float
    scorer: str
    text: bool
    frees: bool
    trained: SparseConfig | None

    @property
    def drops(self) -> bool:
        """Whether image tokens are dropped at all."""
        return self.keep_rate < 1

    @property
    def cache_key(self) -> str:
        """What cached blocks depend on beside the prompt; empty where they are stock vLLM's."""
        return f"{NAME} {self.keep_rate} {self.layer} {self.scorer}" if self.drops else ""

    def plan_span(self, span: Span, block_size: int) -> Hole:
        """Plan the hole of an image: the floor of the keep rate times its tokens are wanted.

        Args:
            span: Positions of its tokens.
            block_size: Tokens of a block.
        """
        from vllm_plugins.engine.block_holes.plan import plan_hole

        start, end = span
        wanted = int((end - start) * self.keep_rate)
        hole = plan_hole(start, end, wanted, block_size, keep_last=True)
        if hole.blocks and not hole.first_block and self.text and self.frees:
            # By a request's first block its forgotten tokens are counted: it is never given back.
            return replace(hole, first_block=1, blocks=hole.blocks - 1)
        return hole


def pruning_of(config: VllmConfig) -> Pruning:
    """Return what the engine of a configuration drops.

    Raises:
        PluginError: The checkpoint's ``sparse_config`` is invalid.
    """
    [spec] = [s for s in requested(config.additional_config) if s.name == NAME]
    return _pruning(DynamicLlavaOptions.model_validate(spec.options), config)


def _pruning(options: DynamicLlavaOptions, config: VllmConfig) -> Pruning:
    values = getattr(config.model_config.hf_config, KEY, None)
    trained = None if values is None else SparseConfig.of(values, f"config.json: {KEY}")
    layer = options.prune_layer or (trained.sparse_layer if trained else DEFAULT_LAYER)
    rate = options.image_keep_rate
    if rate is None:
        rate = trained.image_keep_rate if trained else 1.0
    predicts = options.text_keep or (rate < 1 and options.image_scorer == "predictor")
    return Pruning(
        layer,
        rate,
        options.image_scorer,
        options.text_keep,
        options.free_hole_blocks and (rate < 1 or options.text_keep),
        trained if predicts else None,
    )


class DynamicLlavaPlugin(WorkerPlugin, SchedulerPlugin):
    """LLaVA that drops image tokens after its first decoder layers."""

    name = NAME
    family = "visual tokens"
    summary = "Drops image tokens after LLaVA's first layers, by trained predictors or attention."
    papers = (
        Paper(
            "Dynamic-LLaVA: Efficient Multimodal Large Language Models via Dynamic Vision-language "
            "Context Sparsification",
            "2412.00876",
        ),
    )
    exactness = "approximate by image_keep_rate and text_keep; exact at 1 and false"
    requires = Requirements(vllm=">=0.31", platforms=frozenset({"cpu", "cuda"}))
    conflicts: ClassVar[dict[str, str]] = {
        "hip": "it selects key blocks by where they are, and holes move them",
        "kvshare": "it moves KV, and pages of the upper layers have holes",
        "pd": "pages of the upper layers have holes, which are not handed over",
        "specvlm": "its drafter reads hidden states of rows that were not computed",
        "zipcache": "it packs blocks that the upper layers may not have written",
    }
    Options: ClassVar[type[Options]] = DynamicLlavaOptions

    def configure(self, options: DynamicLlavaOptions, arguments: EngineArguments) -> None:
        """Choose both hosts and the model, and have images come whole.

        Raises:
            PluginError: The user has set one of the arguments to something else.
        """
        super().configure(options, arguments)
        overrides = arguments.get("hf_overrides") or {}
        if not isinstance(overrides, dict) or "architectures" in overrides:
            raise PluginError(
                f"--plugin {NAME} with --hf-overrides",
                "both choose the model's class",
                "drop one of the two",
            )
        arguments.extend("hf_overrides", {**overrides, "architectures": [ARCHITECTURE]})
        arguments.set("disable_chunked_mm_input", True)
        if options.text_keep or options.free_hole_blocks:
            arguments.set("enable_prefix_caching", False)
        # vLLM's own flag leaves a gap, which the policy closes.
        arguments.set("scheduler_cls", SCHEDULER_HOST)
        guards = arguments.get("logits_processors") or []
        arguments.extend("logits_processors", [*guards, GUARD])

    def enter_process(self, options: DynamicLlavaOptions) -> None:
        """Tell this process's vLLM where the model's class is, without importing it."""
        from vllm import ModelRegistry

        if ARCHITECTURE not in ModelRegistry.models:
            ModelRegistry.register_model(ARCHITECTURE, MODEL)

    def check(self, options: DynamicLlavaOptions, config: VllmConfig) -> None:
        """Refuse models without the predictors that are asked for, and what drops cannot bear."""
        where, model = f"--plugin {NAME}", config.model_config
        refusals.check_model(where, model.hf_config)
        pruning, layers = _pruning(options, config), model.get_total_num_hidden_layers()
        if not pruning.layer < layers:
            raise PluginError(
                f"{where}: prune_layer={pruning.layer}",
                f"the model has {layers} layers",
                f"choose one from 1 to {layers - 1}",
            )
        if pruning.drops and options.image_scorer == "predictor":
            self._check_predictor(pruning, f"image_keep_rate={pruning.keep_rate}", "image")
        if pruning.text:
            self._check_predictor(pruning, "text_keep=true", "text")
        if pruning.frees:
            refusals.check_freeing(f"{where}: free_hole_blocks=true", config)
        for flag, reason, mend in refusals.unsupported(config):
            raise PluginError(f"{where} with {flag}", reason, mend)

    def _check_predictor(self, pruning: Pruning, asked: str, kind: str) -> None:
        trained = pruning.trained
        if trained is None or getattr(trained, f"{kind}_keep_rate") == 1:
            instead = ", or set image_scorer=attention" if kind == "image" else ""
            raise PluginError(
                f"--plugin {NAME}: {asked}",
                f"the model has no {kind} predictor: its config.json has no {KEY} for one",
                f"train one with `vllm-plugins train {NAME}`{instead}",
            )
        if pruning.layer != trained.sparse_layer:
            raise PluginError(
                f"--plugin {NAME}: prune_layer={pruning.layer}",
                f"the model's {kind} predictor was trained to read layer {trained.sparse_layer}",
                "drop prune_layer",
            )

    def policy(self, options: DynamicLlavaOptions, config: VllmConfig) -> SchedulerPolicy:
        """Make what has images come whole and, with free_hole_blocks, knows what needs no block."""
        from vllm_plugins.visual_tokens.dynamic_llava.whole_images import WholeImages

        pruning, size = _pruning(options, config), config.cache_config.block_size
        if not pruning.frees:
            return WholeImages(pruning.cache_key)
        from vllm_plugins.engine.block_holes.freeing import HolePolicy
        from vllm_plugins.visual_tokens.dynamic_llava.metrics import FORGOTTEN, FREED

        heard = (NAME, FORGOTTEN) if pruning.text else ()
        return HolePolicy(lambda span: pruning.plan_span(span, size), FREED, *heard)

    def listener(self, options: DynamicLlavaOptions, config: VllmConfig) -> DynamicLlavaListener:
        """Make the part of one worker."""
        from vllm_plugins.visual_tokens.dynamic_llava.listener import DynamicLlavaListener

        return DynamicLlavaListener(_pruning(options, config), config)
