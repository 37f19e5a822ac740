"""LLaVA whose image tokens are dropped between two decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm.compilation.backends import set_model_tag
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.utils import WeightsMapper

from vllm_plugins.engine.block_holes.compact import compact_rows, plan_current_step
from vllm_plugins.engine.block_holes.freeing import FreedBlocks, give_hole_spec
from vllm_plugins.engine.block_holes.view import HoleBuilder, HoleView, with_holes
from vllm_plugins.visual_tokens.dynamic_llava.checkpoint import PREDICTOR_FILES
from vllm_plugins.visual_tokens.dynamic_llava.halves import LowerHalf, UpperHalf, attention_names
from vllm_plugins.visual_tokens.dynamic_llava.metrics import Tally
from vllm_plugins.visual_tokens.dynamic_llava.plugin import NAME, pruning_of
from vllm_plugins.visual_tokens.dynamic_llava.predictors import Predictors
from vllm_plugins.visual_tokens.dynamic_llava.refusals import check_model
from vllm_plugins.visual_tokens.dynamic_llava.scorers import (
    AttentionScorer,
    NormScorer,
    PredictorScorer,
    RandomScorer,
    Scorer,
)
from vllm_plugins.visual_tokens.dynamic_llava.selection import source_rows
from vllm_plugins.visual_tokens.dynamic_llava.text_cache import TextBuilder, TextCache, TextView

PREDICTORS = ("image_predictor", "text_predictor")
"""First parts of their parameters' names in a checkpoint."""

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.multimodal.processing import InputProcessingContext
    from vllm.sequence import IntermediateTensors

    from vllm_plugins.engine.block_holes.plan import Hole, Span, StepPlan
    from vllm_plugins.engine.worker_host import RunnerView


class Middle(NamedTuple):
    """A step between the two halves.

    Attributes:
        positions: Of its rows, int64, shape (tokens,).
        hidden: Output of layer l - 1, shape (tokens, h).
        residual: Its residual, shape (tokens, h).
        summed: Input of layer l, their sum, shape (tokens, h).
        entered: Input of layer l - 1, shape (tokens, h), where the scorer reads it.
    """

    positions: torch.Tensor
    hidden: torch.Tensor
    residual: torch.Tensor
    summed: torch.Tensor
    entered: torch.Tensor | None = None


class DynamicLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """vLLM's LLaVA with its decoder in two halves.

    Everything up to the decoder's input and from its output on is inherited; the decoder's layers
    are vLLM's own modules. Its backbone may be any whose layers take positions, hidden state and
    residual: those that the plug-in's `check` lets through.

    Args:
        vllm_config: The engine's configuration.
        prefix: Of the parameters' names.
    """

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={f"{name}.": f"predictors.{name}." for name in PREDICTORS}
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.pruning = pruning_of(vllm_config)
        self.hole_view = HoleView()
        self.text_cache: TextCache | None = None
        self.freed: FreedBlocks | None = None
        self.managed_size = 0
        self.tally = Tally()
        decoder, cut = self.language_model.model, self.pruning.layer
        layers = list(decoder.layers)
        self.upper_names = attention_names(layers[cut:])
        if self.pruning.text:
            self.hole_view = TextView(leader=self.upper_names[0])
        self.predictors = self._make_predictors()
        if self.predictors is not None:
            model = vllm_config.model_config
            # Beside the weights of a plain LLaVA, which stock vLLM serves from the same folder.
            self.secondary_weights = [
                DefaultModelLoader.Source(
                    model.model, model.revision, allow_patterns_overrides=[PREDICTOR_FILES]
                )
            ]
        self.scorer = self._make_scorer(layers[cut - 1])
        with set_model_tag("lower_half"):
            self.lower = LowerHalf(
                vllm_config=vllm_config,
                layers=layers[:cut],
                reads_input=self.pruning.drops and self.scorer.reads_input,
            )
        with set_model_tag("upper_half"):
            self.upper = UpperHalf(vllm_config=vllm_config, layers=layers[cut:], norm=decoder.norm)
        if self.pruning.drops or self.pruning.text:
            self._give_views([layer.self_attn.attn for layer in layers[cut:]])

    def _give_views(self, attentions: Sequence[Any]) -> None:
        """Let layers see holes, before vLLM makes their metadata builders."""
        view, mixin = self.hole_view, HoleBuilder
        if self.predictors is not None and isinstance(view, TextView):
            assert self.predictors.text_predictor is not None
            self.text_cache = TextCache(view, self.upper_names, self.predictors.text_predictor)
            mixin = TextBuilder
        # One class, so that they are one attention group.
        [backend] = {attention.attn_backend for attention in attentions}
        seeing = with_holes(backend, view, mixin)
        for attention in attentions:
            attention.attn_backend = seeing
            if self.pruning.frees:
                give_hole_spec(attention)

    def on_kv_cache_ready(self, runner: RunnerView) -> None:
        """Take what the view needs of the KV cache, before any step is computed.

        Args:
            runner: The worker's.
        """
        self.hole_view.on_kv_cache_ready(runner)
        if self.pruning.frees:
            self.hole_view.null_is_hole = True
            # Only the manager's whole blocks can be given back.
            self.managed_size = runner.config.cache_config.block_size
            self.freed = FreedBlocks(runner, self.upper_names)

    def _make_predictors(self) -> Predictors | None:
        if self.pruning.trained is None:
            return None
        return Predictors(self.config.text_config.hidden_size, self.pruning.trained)

    def _make_scorer(self, layer: Any) -> Scorer:
        match self.pruning.scorer:
            case "predictor" if self.predictors is not None and self.predictors.image_predictor:
                return PredictorScorer(self.predictors.image_predictor)
            case "attention":
                return AttentionScorer(layer)
            case "random":
                return RandomScorer()
            case _:
                return NormScorer()

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """Run the decoder, its upper half on the rows that are left.

        Args:
            input_ids: int, shape (tokens,); read where there are no embeddings.
            positions: int64, shape (tokens,).
            intermediate_tensors: None: pipeline parallelism is refused.
            inputs_embeds: Shape (tokens, h).
            **kwargs: Media, which are embedded by now.

        Returns:
            What the head reads, shape (tokens, h); zero at rows that were dropped, which no
            sampler asks for.
        """
        if inputs_embeds is None:
            inputs_embeds = self.language_model.model.embed_input_ids(input_ids)
        hidden, residual, *entered = self.lower(positions, inputs_embeds)
        plan = self._plan()
        if plan is None and self.text_cache is None:
            return self.upper(positions, hidden, residual)
        step = Middle(positions, hidden, residual, hidden + residual, *entered)
        if self.text_cache is None:
            return self._upper_rows(step, plan)
        plan = self.text_cache.forget_again(plan, step.summed)
        with self.text_cache.own_slots():
            out = self._upper_rows(step, plan)
        self.text_cache.forget(positions, step.summed)
        return out

    def _upper_rows(self, step: Middle, plan: StepPlan | None) -> torch.Tensor:
        """Run the upper half on the rows of a plan, or on all, and return an output for all."""
        if plan is None:
            return self.upper(step.positions, step.hidden, step.residual)
        source = source_rows(plan, self.scorer, step.positions, step.summed, step.entered)
        with compact_rows(self.hole_view, self.upper_names, plan):
            left = self.upper(step.positions[source], step.hidden[source], step.residual[source])
        out = torch.zeros_like(step.hidden)
        # Rows of text are their own source; what lands on other rows is not read.
        out[source] = left
        return out

    def _plan_span(self, span: Span, block_size: int) -> Hole:
        if not self.pruning.frees:
            return self.pruning.plan_span(span, block_size)
        return self.pruning.plan_span(span, self.managed_size).in_blocks_of(block_size)

    def _plan(self) -> StepPlan | None:
        if not self.pruning.drops:
            return None
        plan = plan_current_step(self.hole_view, self.upper_names[0], self._plan_span)
        if plan is not None:
            self.tally.add(plan)
            if self.freed is not None:
                self.freed.take_out(plan, self.hole_view.step_of(self.upper_names[0]))
        return plan


def _checked_info(context: InputProcessingContext) -> Any:
    """Refuse a model of another kind before vLLM looks for a LLaVA's parts in it.

    Raises:
        PluginError: It is one.
    """
    check_model(f"--plugin {NAME}", context.model_config.hf_config)
    return _stock_factories.info(context)


_stock_factories = LlavaForConditionalGeneration._processor_factory  # noqa: SLF001
DynamicLlavaForConditionalGeneration._processor_factory = replace(  # noqa: SLF001
    _stock_factories, info=_checked_info
)
