"""Rows of the table that plug-ins which drop visual tokens, and block holes, rely on."""

from __future__ import annotations

from dataclasses import replace

from vllm_plugins.compat import visual_behaviours as behaviours
from vllm_plugins.compat.contract import (
    REST_ANY,
    REST_OPTIONAL,
    Contract,
    behaves,
    has,
    is_class,
    method,
)
from vllm_plugins.registry import load

VIEW = "engine/block_holes/view.py"
FREEING = "engine/block_holes/freeing.py"
MEDIA = "engine/whole_media.py"
MODEL = "visual_tokens/dynamic_llava/model.py"
SCORERS = "visual_tokens/dynamic_llava/scorers.py"
_BACKEND = "vllm.v1.attention.backend"
_CONTEXT = "vllm.forward_context"
_SPECS = "vllm.v1.kv_cache_spec_registry"
_MANAGERS = "vllm.v1.core.single_type_kv_cache_manager"
_LLAVA = "vllm.model_executor.models.llava:LlavaForConditionalGeneration"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"

HOLES = (
    is_class(f"{_BACKEND}:AttentionBackend", "What layers that see holes have.", VIEW),
    method(f"{_BACKEND}:subclass_attention_backend",
           "name_prefix, attention_backend_cls, builder_cls",
           "Gives layers a metadata builder of their own.", VIEW),
    has(f"{_BACKEND}:CommonAttentionMetadata",
        "req_idx max_query_len num_actual_tokens positions _num_computed_tokens_cache "
        "query_start_loc_cpu seq_lens_cpu_upper_bound",
        "A step's batch, and the rows of it that are left.", VIEW, "engine/worker_host.py"),
    has(f"{_BACKEND}:AttentionMetadataBuilder",
        "supports_update_block_table supports_draft_decode_metadata_update",
        "Keeps tables that another builder made away.", VIEW),
    method(f"{_CONTEXT}:get_forward_context", "", "The step whose forward pass is running."),
    has(f"{_CONTEXT}:ForwardContext", "attn_metadata slot_mapping cudagraph_runtime_mode",
        "What layers read while they run: metadata, slots, and whether a graph is replayed.",
        "engine/block_holes/compact.py"),
    has("vllm.config:CUDAGraphMode", "NONE", "Rows of no captured number run without a graph.",
        kind="object"),
    is_class("vllm.config:CUDAGraphMode", "Rows of no captured number run without a graph."),
    has("vllm.multimodal.inputs:PlaceholderRange", "extract_embeds_range",
        "Where a media item's embeddings are among a request's tokens.", "engine/worker_host.py"),
    behaves(f"{_RUNNER}.initialize_attn_backend", behaviours.a_backend_of_ones_own_is_a_group,
            "Layers with a backend class of their own get a builder of their own.", VIEW),
    behaves("vllm.model_executor.layers.attention.attention:get_attention_context",
            behaviours.layers_read_the_context_by_name,
            "Metadata and slots are replaced for some layers in the middle of a step.", VIEW),
)  # fmt: skip

FREED = (
    method("vllm.utils.math_utils:cdiv", "a, b", "Blocks of a request of full length."),
    is_class(f"{_MANAGERS}:FullAttentionManager", "Base of the manager that frees holes."),
    method(f"{_MANAGERS}:FullAttentionManager._remove_blocks_in_range",
           "request_id, first_block, last_block", "Gives blocks back and leaves null blocks."),
    method(f"{_MANAGERS}:FullAttentionManager.remove_skipped_blocks",
           "request_id, processed_computed_tokens, num_prompt_tokens",
           "Overridden: asked before each step of a request.", FREEING),
    method(f"{_MANAGERS}:FullAttentionManager.get_num_blocks_to_allocate",
           f"request_id, num_tokens, {REST_ANY}",
           "Overridden: forgotten tokens need no slot.", FREEING),
    method(f"{_MANAGERS}:FullAttentionManager.allocate_new_blocks",
           "request_id, num_tokens, num_tokens_main_model",
           "Overridden: forgotten tokens need no slot.", FREEING),
    method(f"{_MANAGERS}:FullAttentionManager.pop_blocks_for_free", "request_id",
           "Overridden: called whenever a request gives its blocks back.", FREEING),
    behaves(f"{_MANAGERS}:FullAttentionManager.free",
            behaviours.blocks_are_popped_before_they_are_freed,
            "A request that is preempted or gone is forgotten with its blocks.", FREEING),
    has("vllm.v1.request:Request", "resumable",
        "A session, to which more is added under its name.", FREEING),
    has("vllm.v1.core.sched.scheduler:Scheduler", "kv_holding_waiting",
        "Sessions, whose next media item has to fit into a step whole.", MEDIA),
    has("vllm.v1.request:Request", "mm_features",
        "Where media are that have to fit into a step whole.", MEDIA),
    is_class("vllm.v1.core.kv_cache_utils:KVCacheBlock", "What is allotted."),
    has("vllm.v1.core.kv_cache_manager:KVCacheManager", "coordinator",
        "Leads to the managers of each kind of layers.", FREEING),
    has("vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator", "single_type_managers",
        "Our manager among them is told of the holes.", FREEING),
    has("vllm.v1.kv_cache_interface:AttentionSpec", "page_size_bytes max_memory_usage_bytes",
        "Size of the layers' cache.", FREEING),
    is_class(f"{_SPECS}:KVCacheSpecRegistry", "Knows which manager serves a kind of cache."),
    method(f"{_SPECS}:KVCacheSpecRegistry._ensure_registered", REST_OPTIONAL,
           "vLLM's own kinds have to be there before ours."),
    method(f"{_SPECS}:register_kv_cache_spec", f"manager_class, {REST_OPTIONAL}",
           "Registers our kind."),
    behaves(f"{_SPECS}:KVCacheSpecRegistry.get_manager_class",
            behaviours.a_kind_of_cache_has_its_own_manager, "Holes are freed by our manager.",
            FREEING),
    has("vllm.v1.worker.block_table:BlockTable", "block_table",
        "Holes are taken out of a worker's own tables.", FREEING),
    has("vllm.v1.worker.gpu.block_table:BlockTables", "block_tables",
        "The same on model runner V2, whose tables are on the device.", FREEING),
    has("vllm.v1.worker.gpu.buffer_utils:StagedWriteTensor", "gpu",
        "Holds a table of model runner V2, and what is written to it stays.", FREEING),
    has("vllm.v1.worker.gpu_input_batch:CachedRequestState", "block_ids num_prompt_tokens",
        "A request that leaves the batch comes back with these.", FREEING),
    has("vllm.config:SchedulerConfig", "disable_hybrid_kv_cache_manager", "What is refused."),
)  # fmt: skip

LLAVA = (
    is_class(_LLAVA, "Base of the model."),
    method(f"{_LLAVA}.__init__", "vllm_config, prefix", "Extended: the decoder in two halves."),
    method(f"{_LLAVA}.forward",
           "input_ids, positions, intermediate_tensors, inputs_embeds, kwargs",
           "Replaced: what is between the halves.", MODEL),
    has(_LLAVA, "_processor_factory config hf_to_vllm_mapper language_model",
        "Inherited: processing of images, names of weights, the decoder."),
    behaves(_LLAVA, behaviours.a_llava_calls_its_decoder_once,
            "The decoder's layers are run by the halves and by nothing else.", MODEL),
    behaves("vllm.model_executor.models.llama:LlamaDecoderLayer.forward",
            behaviours.layers_carry_a_residual,
            "Layers take positions, hidden state and residual, on both backbones.", MODEL),
    has("vllm.model_executor.models.llama:LlamaAttention",
        "qkv_proj _init_rotary_emb q_size kv_size head_dim scaling num_heads total_num_heads",
        "Attention that the question pays is computed anew.", SCORERS),
    method("vllm.compilation.decorators:support_torch_compile",
           f"dynamic_arg_dims, {REST_OPTIONAL}",
           "Each half is a compiled graph."),
    method("vllm.compilation.backends:set_model_tag", f"tag, {REST_OPTIONAL}",
           "Keeps the halves' compile caches apart."),
    is_class("vllm.model_executor.model_loader.default_loader:DefaultModelLoader",
             "Reads the predictors too."),
    has("vllm.model_executor.model_loader.default_loader:DefaultModelLoader", "Source",
        "Reads the predictors too."),
    is_class("vllm.model_executor.models.utils:WeightsMapper", "Names of the predictors' weights."),
    is_class("vllm.multimodal.processing:InputProcessingContext", "Refuses other models early."),
    has("vllm.multimodal.processing:InputProcessingContext", "model_config",
        "Refuses other models early."),
    is_class("vllm.sequence:IntermediateTensors", "Type of an argument that is None here."),
    has("vllm:ModelRegistry", "models register_model", "Where vLLM looks a model's class up.",
        kind="object"),
    method("vllm.model_executor.models.registry:_ModelRegistry.register_model",
           "model_arch, model_cls", "The class is named and not imported.",
           "visual_tokens/dynamic_llava/plugin.py"),
    has("vllm.config:CacheConfig", "kv_sharing_fast_prefill", "What is refused."),
    has("vllm.engine.arg_utils:EngineArgs",
        "hf_overrides disable_chunked_mm_input logits_processors enable_prefix_caching",
        "Set by the plug-in.", "visual_tokens/dynamic_llava/plugin.py"),
    is_class("vllm.v1.sample.logits_processor:LogitsProcessor",
             "Sees each request's parameters in the front end."),
    is_class("vllm.v1.worker.gpu.sample.logits_processor:LogitsProcessor",
             "The same for model runner V2."),
    has("vllm.v1.worker.gpu.sample.logits_processor:LogitsProcessor",
        "validate_params add_request apply", "Overridden.",
        "visual_tokens/dynamic_llava/guard.py"),
    method("vllm.v1.sample.logits_processor:LogitsProcessor.validate_params", "sampling_params",
           "Overridden: refuses prompt log-probabilities.",
           "visual_tokens/dynamic_llava/guard.py"),
    has("vllm:SamplingParams", "prompt_logprobs prompt_logprob_token_ids",
        "What is refused of a single request."),
    method("vllm.distributed:tensor_model_parallel_all_reduce", f"input_, {REST_OPTIONAL}",
           "Sums attention over all ranks' heads.", SCORERS),
    method("vllm.distributed.parallel_state:GroupCoordinator.broadcast", f"input_, {REST_OPTIONAL}",
           "The first rank's choice holds for all.",
           "visual_tokens/dynamic_llava/selection.py"),
)  # fmt: skip

VISUAL_CONTRACTS: tuple[Contract, ...] = tuple(
    replace(contract, vllm=load("dynamic_llava").requires.vllm)
    for contract in (*HOLES, *FREED, *LLAVA)
)
