"""The drafter as vLLM loads it: EAGLE's layer, with an image's rows compressed before it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsMultiModalEmbeddings
from vllm.model_executor.models.llama_eagle import EagleLlamaForCausalLM, LlamaDecoderLayer
from vllm.model_executor.models.llama_eagle import LlamaModel as EagleLlamaModel
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    _merge_multimodal_embeddings,
    get_draft_quant_config,
    maybe_prefix,
)

from vllm_plugins.engine.block_holes.compact import compact_rows, plan_current_step
from vllm_plugins.engine.block_holes.view import HoleView, with_holes
from vllm_plugins.errors import PluginError
from vllm_plugins.settings import enabled_plugins
from vllm_plugins.spec_decode.specvlm.compressor import VisualCompressor
from vllm_plugins.spec_decode.specvlm.draft_rows import StepImages, plan_image
from vllm_plugins.spec_decode.specvlm.gate import QuestionGate
from vllm_plugins.spec_decode.specvlm.image_rows import ImageRows
from vllm_plugins.spec_decode.specvlm.metrics import DraftTally

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.models.interfaces import MultiModalEmbeddings

    from vllm_plugins.engine.block_holes.plan import StepPlan
    from vllm_plugins.engine.worker_host import RunnerView
    from vllm_plugins.spec_decode.specvlm.plugin import SpecVlmOptions
    from vllm_plugins.spec_decode.specvlm.settings import SpecVLMSettings


LENT = "embed_tokens."
"""What the target lends; everything else is the checkpoint's."""
STACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Projections that vLLM stacks, of which a checkpoint has each by itself."""


@support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden_states": 0})
class DraftLayers(nn.Module):
    """The drafter's decoder layers, each with its input norm, which EAGLE leaves out of the first.

    Args:
        vllm_config: The engine's configuration.
        prefix: Of the layers' names.
        start_layer_id: Number of the first; the target's layers have those below.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str, start_layer_id: int) -> None:
        super().__init__()
        config = draft_config(vllm_config)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(
                vllm_config,
                disable_input_layernorm=False,
                prefix=maybe_prefix(prefix, f"layers.{start_layer_id + i}"),
                config=config,
            )
            for i in range(config.num_hidden_layers)
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the layers' output with its residual, no norm after it; shape (rows, hidden)."""
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states + residual

    def write_cache(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Leave in the KV cache what `forward` leaves there, and compute no more than that takes.

        Of the last layer, which is the only one of a drafter that was trained here, these are keys
        and values: no attention, no feed-forward. Shapes as those of `forward`.
        """
        residual = None
        *before, last = self.layers
        for layer in before:
            hidden_states, residual = layer(positions, hidden_states, residual)
        if residual is not None:
            hidden_states = hidden_states + residual
        attention = last.self_attn
        qkv, _ = attention.qkv_proj(last.input_layernorm(hidden_states))
        query, key, value = qkv.split([attention.q_size, *[attention.kv_size] * 2], dim=-1)
        query, key = attention.rotary_emb(positions, query, key)
        inner = attention.attn
        if inner.attn_backend.forward_includes_kv_cache_update:
            inner(query, key, value)
            return
        key, value = (x.view(-1, inner.num_kv_heads, inner.head_size) for x in (key, value))
        unified_kv_cache_update(key, value, inner.layer_name)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the layers, whose projections vLLM stacks; the resampler's stay as they are."""
        return AutoWeightsLoader(self).load_weights(
            weights, mapper=EagleLlamaModel.hf_to_vllm_mapper
        )


class SpecVlmModel(nn.Module):
    """Fuses embeddings with the target's features, compresses images, and runs the layers.

    Args:
        vllm_config: The engine's configuration.
        prefix: Of the parameters' names.
        start_layer_id: Number of the first layer.
    """

    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"layers.": "decoder.layers."})

    def __init__(self, *, vllm_config: VllmConfig, prefix: str, start_layer_id: int) -> None:
        super().__init__()
        self.config = config = draft_config(vllm_config)
        hidden = config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, hidden, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        self.fc = ReplicatedLinear(
            2 * hidden,
            hidden,
            bias=False,
            params_dtype=vllm_config.model_config.dtype,
            quant_config=get_draft_quant_config(vllm_config),
            prefix=maybe_prefix(prefix, "fc"),
            return_bias=False,
        )
        self.decoder = DraftLayers(
            vllm_config=vllm_config, prefix=prefix, start_layer_id=start_layer_id
        )
        self.settings = settings = _settings(vllm_config)
        heads = config.num_attention_heads
        # As EagleDrafter has it: the layer's heads may not divide the width.
        heads = heads if hidden % heads == 0 else 1
        self.compressor = VisualCompressor(hidden, settings, heads)
        self.gate = QuestionGate(hidden, settings.gate_width)
        self.tally = DraftTally(settings.select_from)
        self.image_rows = ImageRows(self.compressor, self.gate, settings, self.tally)
        self.view = HoleView()
        self.is_drafting = True
        """Whether the present step's drafts will be used; otherwise only the cache is kept up."""
        self.attention = [_give_holes(layer, self.view) for layer in self.decoder.layers]

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, under the name by which vLLM looks for them."""
        return self.decoder.layers

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of tokens, shape (rows, hidden), as they are without an adapter."""
        lent = self.embed_tokens
        if isinstance(lent, BaseLayerWithLoRA):
            # V1 lends it with the adapters, which are mapped to the rows of the target's step.
            lent = lent.base_layer
        return lent(input_ids)

    def forward(
        self,
        positions: torch.Tensor,
        embeddings: torch.Tensor,
        features: torch.Tensor,
        has_images: bool,
    ) -> torch.Tensor:
        """Draft from every row.

        Args:
            positions: int64, shape (rows,).
            embeddings: Of each row's next token, shape (rows, hidden).
            features: The target's, or the drafter's own; shape (rows, hidden).
            has_images: Whether embeddings of an image may be among the rows.

        Returns:
            Shape (rows, hidden); rows of an image that were dropped are zero. Without meaning in
            steps that draft nothing.
        """
        fused = self.fc(torch.cat((embeddings, features), -1))
        plan = None
        if has_images and self.settings.mode != "off":
            plan_span = functools.partial(plan_image, self.settings)
            plan = plan_current_step(self.view, self.attention[0], plan_span)
        if plan is None:
            return self._decode(positions, fused)
        return self._forward_compact(plan, positions, fused, features)

    def _decode(self, positions: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
        if self.is_drafting:
            return cast("torch.Tensor", self.decoder(positions, fused))
        self.decoder.write_cache(positions, fused)
        return fused

    def _forward_compact(
        self,
        plan: StepPlan,
        positions: torch.Tensor,
        fused: torch.Tensor,
        features: torch.Tensor,
    ) -> torch.Tensor:
        rows = torch.from_numpy(plan.rows).to(fused.device, non_blocking=True)
        own, places = fused[rows], positions[rows]
        self.image_rows.fill(plan, own, places, fused, positions, features)
        with compact_rows(self.view, self.attention, plan):
            # All that a step holds may lie in holes; kernels may not accept zero rows.
            drafted = self._decode(places, own) if len(rows) else own
        return fused.new_zeros(fused.shape).index_copy_(0, rows, drafted)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load what a checkpoint holds; what the target lends is not among it.

        Raises:
            PluginError: It lacks weights, which vLLM does not look for in a drafter.
        """
        held: set[str] = set()

        def noted() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                held.add(name)
                yield name, weight

        # Before anything is loaded: quantisation may name parameters anew afterwards.
        wanted = self._checkpoint_names()
        loaded = AutoWeightsLoader(self).load_weights(noted(), mapper=self.hf_to_vllm_mapper)
        missing = sorted(wanted - held)
        if missing:
            raise PluginError(
                "--plugin specvlm: model",
                f"lacks weights, {missing[0]} among them",
                "train it: vllm-plugins train specvlm",
            )
        return loaded

    def _checkpoint_names(self) -> set[str]:
        """Return the weights and biases that a checkpoint has to hold, under its names."""
        names = set()
        for name, _ in self.named_parameters():
            # Scales of quantised layers need not be there.
            if name.startswith(LENT) or not name.endswith((".weight", ".bias", ".queries")):
                continue
            stack = next((x for x in STACKED if f".{x}." in name), "")
            parts = STACKED.get(stack, (stack,))
            names |= {name.replace(stack, part) for part in parts}
        return {name.removeprefix("decoder.") for name in names}


class SpecVlmDrafter(EagleLlamaForCausalLM, SupportsMultiModalEmbeddings):
    """vLLM's EAGLE drafter, with images.

    Args:
        vllm_config: The engine's configuration.
        prefix: Of the parameters' names.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        self.config = draft_config(vllm_config)
        self.model = SpecVlmModel(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "model"),
            start_layer_id=vllm_config.model_config.get_num_layers(vllm_config.parallel_config),
        )
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self._has_images = False

    def on_kv_cache_ready(self, runner: RunnerView) -> None:
        """Let the layers see holes from now on."""
        self.model.view.on_kv_cache_ready(runner)
        images = StepImages(runner)
        self.model.view.spans = images.spans
        self.model.image_rows.images = images

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the embeddings of a pass's next tokens, images merged in.

        Args:
            input_ids: int, shape (rows,).
            multimodal_embeddings: Of the images among them.
            is_multimodal: Which rows these are; bool on the host, shape (rows,).
        """
        embeddings = self.model.embed_input_ids(input_ids)
        self._has_images = bool(multimodal_embeddings)
        if not multimodal_embeddings:
            return embeddings
        assert is_multimodal is not None
        return _merge_multimodal_embeddings(embeddings, multimodal_embeddings, is_multimodal)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows' predicted features, once for the logits and once for the next step."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.model.embed_input_ids(input_ids)
        has_images, self._has_images = self._has_images, False
        drafted = self.model(positions, inputs_embeds, hidden_states, has_images)
        return drafted, drafted


def draft_config(vllm_config: VllmConfig) -> Any:
    """Return the drafter's configuration as vLLM's Llama layer reads it."""
    assert vllm_config.speculative_config is not None
    config = vllm_config.speculative_config.draft_model_config.hf_config
    # The drafter's layers are numbered after the target's; a list of their kinds has them alone.
    config.target_layer_count = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
    if "EagleSpecVLMQwen2ForCausalLM" in config.architectures and config.attention_bias:
        # Llama's attention_bias means the output too; Qwen2 has a bias before attention alone.
        config.qkv_bias, config.attention_bias = True, False
    return config


def _settings(vllm_config: VllmConfig) -> SpecVLMSettings:
    assert vllm_config.speculative_config is not None
    draft = vllm_config.speculative_config.draft_model_config
    [options] = [x.options for x in enabled_plugins(vllm_config) if x.plugin.name == "specvlm"]
    return cast("SpecVlmOptions", options).settings(draft)


def _give_holes(layer: Any, view: HoleView) -> str:
    attention = layer.self_attn.attn
    attention.attn_backend = with_holes(attention.attn_backend, view)
    return str(attention.layer_name)
