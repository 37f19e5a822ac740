"""Behaviours of vLLM that dropping visual tokens relies on."""

from __future__ import annotations

import inspect

from vllm_plugins.compat.behaviours import expect


def a_backend_of_ones_own_is_a_group() -> None:
    """The runner groups layers by their backend's class, within a KV cache group."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner.initialize_attn_backend)
    expect("get_attn_backend()" in source, "layers are not asked for their backend")
    expect("full_cls_name" in source, "groups are not made by the backend's class")


def layers_read_the_context_by_name() -> None:
    """An attention layer looks metadata and slots up under its name, each time it runs."""
    from vllm.model_executor.layers.attention import attention

    source = inspect.getsource(attention.get_attention_context)
    expect("attn_metadata_raw[layer_name]" in source, "metadata are not looked up by name")
    expect("slot_mapping.get(layer_name)" in source, "slots are not looked up with the metadata")


def a_kind_of_cache_has_its_own_manager() -> None:
    """A registered spec is served by its manager, and vLLM's own kinds by theirs."""
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_plugins.engine.block_holes.freeing import HoleManager, HoleSpec

    layer = {"block_size": 16, "num_kv_heads": 1, "head_size": 16, "dtype": _float()}
    found = KVCacheSpecRegistry.get_manager_class(HoleSpec(**layer))
    expect(found is HoleManager, f"our kind is served by {found}")
    stock = KVCacheSpecRegistry.get_manager_class(FullAttentionSpec(**layer))
    expect(stock is FullAttentionManager, f"full attention is served by {stock}")


def blocks_are_popped_before_they_are_freed() -> None:
    """A manager pops a request's blocks to free them, and others pop them to free them later."""
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    source = inspect.getsource(SingleTypeKVCacheManager.free)
    expect("self.pop_blocks_for_free(" in source, "blocks are freed without being popped")


def _float() -> object:
    import torch

    return torch.float32


def a_llava_calls_its_decoder_once() -> None:
    """LLaVA's forward pass is one call of the decoder, on embeddings that are merged before."""
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    source = inspect.getsource(LlavaForConditionalGeneration.forward)
    expect(source.count("self.language_model.model(") == 1, "the decoder is called otherwise")


def layers_carry_a_residual() -> None:
    """Decoder layers of the known backbones take and return hidden state and residual."""
    from vllm.model_executor.models.llama import LlamaDecoderLayer
    from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer

    wanted = ["self", "positions", "hidden_states", "residual"]
    for layer in (LlamaDecoderLayer, Qwen2DecoderLayer):
        found = list(inspect.signature(layer.forward).parameters)
        expect(found == wanted, f"{layer.__name__} takes {found}")
