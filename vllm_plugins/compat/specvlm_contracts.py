"""Rows of the table that speculative decoding with images relies on."""

from __future__ import annotations

from dataclasses import replace

from vllm_plugins.compat.contract import (
    REST_ANY,
    REST_OPTIONAL,
    Contract,
    has,
    is_class,
    method,
)
from vllm_plugins.registry import load

HOST = "engine/worker_host.py"
MODEL = "spec_decode/specvlm/model.py"
PLUGIN = "spec_decode/specvlm/plugin.py"
_EAGLE = "vllm.model_executor.models.llama_eagle"
_UTILS = "vllm.model_executor.models.utils"
_LAYERS = "vllm.model_executor.layers"
_RUNNERS = (
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
)

REGISTRATION = (
    method("vllm.model_executor.models.registry:_ModelRegistry.register_model",
           "model_arch, model_cls", "Lets vLLM find the drafter's class.", PLUGIN),
    method("vllm.model_executor.models.registry:_ModelRegistry.get_supported_archs", "",
           "What vLLM knows is left alone.", PLUGIN),
    has("vllm:ModelRegistry", "register_model get_supported_archs",
        "Lets vLLM find the drafter's class.", PLUGIN, kind="object"),
    has("vllm.engine.arg_utils:EngineArgs", "speculative_config disable_chunked_mm_input",
        "Stock arguments that turn drafting on and let images arrive whole.", PLUGIN),
    has("vllm.config:SpeculativeConfig",
        "method model num_speculative_tokens draft_sample_method "
        "num_speculative_tokens_per_batch_size draft_model_config parallel_drafting "
        "disable_padded_drafter_batch",
        "EAGLE drafting, its sampling, and where it stops for large batches.", PLUGIN, MODEL),
    has("vllm.config:SchedulerConfig", "encoder_cache_size",
        "Refusal of an encoder cache that two images side by side do not fit into.", PLUGIN),
    method("vllm.config:ModelConfig.get_multimodal_config", "", "Images that a prompt may have.",
           PLUGIN),
    method("vllm.config.multimodal:MultiModalConfig.get_limit_per_prompt", "modality",
           "Images that a prompt may have.", PLUGIN),
    has("vllm.config:ModelConfig", "is_multimodal_model uses_mrope hf_text_config get_hidden_size "
        "get_vocab_size", "What is refused.", PLUGIN),
    method("vllm.config:ModelConfig.get_num_layers", "parallel_config",
           "The drafter's layers are numbered after the target's.", MODEL),
    has("vllm.config:LoRAConfig", "target_modules", "What is refused.", PLUGIN),
)  # fmt: skip

DRAFTER = (
    method(f"{_LAYERS}.attention.attention:unified_kv_cache_update", "key, value, layer_name",
           "Steps that draft nothing write keys and values alone.", MODEL),
    has("vllm.v1.core.sched.output:SchedulerOutput", "num_spec_tokens_to_schedule",
        "Whether a step drafts.", "spec_decode/specvlm/listener.py"),
    has("vllm.v1.attention.backend:AttentionBackend", "forward_includes_kv_cache_update",
        "Whether keys and values can be written alone.", MODEL),
    is_class(f"{_EAGLE}:EagleLlamaForCausalLM", "Base of the drafter: its head, its loading.",
             MODEL),
    method(f"{_EAGLE}:LlamaDecoderLayer.__init__",
           "vllm_config, disable_input_layernorm, prefix, config",
           "The drafter's layer, whose input norm stays.", MODEL),
    is_class(f"{_EAGLE}:LlamaDecoderLayer", "The drafter's layer.", MODEL),
    is_class(f"{_EAGLE}:LlamaModel", "How the layer's weights are stacked.", MODEL),
    has(f"{_EAGLE}:LlamaModel", "hf_to_vllm_mapper", "How the layer's weights are stacked.",
        MODEL, kind="object"),
    is_class("vllm.model_executor.models.interfaces:SupportsMultiModalEmbeddings",
             "Tells the proposer to hand image embeddings over.", MODEL),
    has("vllm.model_executor.models.interfaces:MultiModalEmbeddings", "", "Image embeddings.",
        MODEL, kind="object"),
    method("vllm.compilation.decorators:support_torch_compile",
           f"dynamic_arg_dims, {REST_OPTIONAL}",
           "The layers are compiled; what is before them is not.", MODEL),
    method(f"{_UTILS}:_merge_multimodal_embeddings",
           "inputs_embeds, multimodal_embeddings, is_multimodal", "Image embeddings.", MODEL),
    method(f"{_UTILS}:get_draft_quant_config", "vllm_config", "The drafter's own format.", MODEL),
    method(f"{_UTILS}:maybe_prefix", "prefix, name", "Names of parameters.", MODEL),
    is_class(f"{_UTILS}:AutoWeightsLoader", "Loads the checkpoint.", MODEL),
    is_class(f"{_UTILS}:WeightsMapper", "Names of parameters.", MODEL),
    method(f"{_LAYERS}.linear:ReplicatedLinear.__init__", f"input_size, output_size, {REST_ANY}",
           "Fuses embeddings and features.", MODEL),
    is_class(f"{_LAYERS}.linear:ReplicatedLinear", "Fuses embeddings and features.", MODEL),
    is_class(f"{_LAYERS}.logits_processor:LogitsProcessor", "Draft logits.", MODEL),
    is_class(f"{_LAYERS}.vocab_parallel_embedding:VocabParallelEmbedding",
             "Stands where the target's embedding is put.", MODEL),
    is_class("vllm.lora.layers.base:BaseLayerWithLoRA",
             "The target's embedding where it has adapters.", MODEL),
    has("vllm.lora.layers.vocab_parallel_embedding:VocabParallelEmbeddingWithLoRA", "base_layer",
        "The target's embedding without its adapters.", MODEL),
)  # fmt: skip

STEP = (
    *(
        method(f"{runner}.get_draft_model", "", "The drafter, without wrappers for graphs.", HOST)
        for runner in _RUNNERS
    ),
    has("vllm.v1.worker.gpu_input_batch:CachedRequestState", "num_prompt_tokens mm_features",
        "Where a prompt ends, and its images (V1).", HOST),
    has("vllm.v1.worker.gpu.states:RequestState", "prompt_len index_to_req_id",
        "Where a prompt ends (V2).", HOST),
    has("vllm.multimodal.inputs:MultiModalFeatureSpec", "identifier mm_position",
        "Which picture it is, for pruning, and where.", "spec_decode/specvlm/draft_rows.py"),
    has("vllm.triton_utils:HAS_TRITON", "", "Whether kernels are Triton's on CPU too.",
        "engine/draft_sampling.py", kind="object"),
    method("vllm.triton_utils.dispatcher:register_kernels", "overrides",
           "Stands in for a CPU kernel that loses its output.", "engine/draft_sampling.py"),
    method("vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
           f"x, cu_num_tokens, num_tokens, {REST_OPTIONAL}", "What uses that kernel.",
           "engine/draft_sampling.py"),
    has("vllm.v1.sample.rejection_sampler:expand_kernel", "",
        "Repeats temperatures for every draft.", "engine/draft_sampling.py", kind="object"),
    is_class("vllm:LLM", "Engines of the drafting benchmark.", "bench/drafting_engine.py"),
    has("prometheus_client:REGISTRY", "collect", "Rows that the drafting benchmark saves.",
        "bench/drafting_engine.py", kind="object"),
    method("prometheus_client:REGISTRY.collect", "", "Rows that the drafting benchmark saves.",
           "bench/drafting_engine.py"),
    method("vllm.distributed:get_tp_group", "", "Ranks take the first one's picks."),
    has("vllm.distributed.parallel_state:GroupCoordinator", "broadcast world_size is_first_rank",
        "Ranks take the first one's picks.", "spec_decode/specvlm/image_rows.py"),
)  # fmt: skip

SPECVLM_CONTRACTS: tuple[Contract, ...] = tuple(
    replace(contract, vllm=load("specvlm").requires.vllm)
    for contract in (*REGISTRATION, *DRAFTER, *STEP)
)
