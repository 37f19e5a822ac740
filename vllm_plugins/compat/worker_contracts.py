"""Rows of the table that only plug-ins with a part in the workers, or with KV, rely on.

So far that is KVShare, so the rows are about the versions that it runs on and no others.
"""

from __future__ import annotations

from dataclasses import replace

from vllm_plugins.compat import worker_behaviours as behaviours
from vllm_plugins.compat.contract import (
    REST_ANY,
    REST_OPTIONAL,
    Contract,
    behaves,
    has,
    is_class,
    method,
)
from vllm_plugins.compat.http_contracts import HTTP_SIDE, TIERS
from vllm_plugins.registry import load

HOST = "engine/worker_host.py"
FORWARD = "engine/partial_forward.py"
CHECK = "kv_connectors/kvshare/check_pass.py"
PAGES = "engine/kv_pages.py"
CONNECTOR = "kv_connectors/kvshare/connector.py"
REQUEST_STATE = "kv_connectors/kvshare/request_state.py"
SCHEDULER_SIDE = "kv_connectors/kvshare/scheduler_side.py"
WORKER_SIDE = "kv_connectors/kvshare/worker_side.py"
PLUGIN = "kv_connectors/kvshare/plugin.py"
ROPE = "kv_connectors/kvshare/rope.py"
TAINTED = "kv_connectors/kvshare/tainted.py"
TRANSFER = "kv_connectors/kvshare/transfer.py"

_WORKER = "vllm.v1.worker.gpu_worker:Worker"
_BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
_CONNECTOR = f"{_BASE}:KVConnectorBase_V1"
_REQUEST = "vllm.v1.request:Request"
_MODELS = "vllm.model_executor.models"
_ROTARY = "vllm.model_executor.layers.rotary_embedding"
_BACKENDS = "vllm.v1.attention.backends"

WORKER = (
    is_class(_WORKER, "Base of the worker host on CUDA.", HOST),
    is_class("vllm.v1.worker.cpu_worker:CPUWorker", "Base of the worker host on CPU.", HOST,
             bases=(_WORKER,)),
    behaves("vllm.platforms:Platform.check_and_update_config",
            behaviours.platforms_choose_the_known_workers,
            "The host takes the place of the worker that vLLM would have chosen.", HOST),
    method("vllm.utils.import_utils:resolve_obj_by_qualname", "qualname",
           "Looks up the platform's worker, and in vLLM the name in --worker-cls."),
    behaves("vllm.utils.import_utils:resolve_obj_by_qualname",
            behaviours.worker_class_is_made_on_demand,
            "--worker-cls may name a class that its module makes on first use.", HOST),
    method(f"{_WORKER}.__init__", f"vllm_config, {REST_ANY}",
           "Extended; everything but the configuration is passed on.", HOST),
    method(f"{_WORKER}.init_device", "", "Wrapped: listeners hear of the device.", HOST),
    method("vllm.v1.worker.cpu_worker:CPUWorker.init_device", "",
           "Wrapped: listeners hear of the device.", HOST),
    method(f"{_WORKER}.load_model", REST_OPTIONAL, "Wrapped: listeners hear of the model.", HOST),
    method(f"{_WORKER}.initialize_from_config", "kv_cache_config",
           "Wrapped: listeners hear of the KV cache.", HOST),
    behaves(f"{_WORKER}.initialize_from_config",
            behaviours.connector_exists_before_the_cache_is_ready,
            "A listener hands the KV cache to the connector of its worker.", WORKER_SIDE),
    method(f"{_WORKER}.execute_model", "scheduler_output",
           "Wrapped: listeners enclose a step.", HOST),
    method(f"{_WORKER}.sample_tokens", "grammar_output",
           "Wrapped: listeners' reports go to the scheduler with a step's result.", HOST),
    has("vllm.v1.outputs:ModelRunnerOutput", "req_ids", "Whose results they are, in order.",
        "visual_tokens/dynamic_llava/text_cache.py"),
    method(f"{_WORKER}.shutdown", "", "Wrapped: listeners release what they hold.", HOST),
    has(_WORKER, "device model_runner", "Where the model is, and who holds it.", HOST),
    behaves("vllm.v1.worker.gpu_model_runner:GPUModelRunner",
            behaviours.runners_keep_groups_and_configuration,
            "Attention groups, KV cache configuration and model, on either runner.", HOST),
    behaves("vllm.v1.worker.gpu.warmup:warmup_kernels", behaviours.warm_up_names_its_requests,
            "Metrics count no step of requests that V2 made up.", HOST),
    is_class("vllm.v1.worker.utils:AttentionGroup", "Layers with one attention backend."),
    has("vllm.v1.worker.utils:AttentionGroup", "layer_names",
        "Which layers share a metadata builder.", FORWARD),
    method("vllm.v1.worker.utils:AttentionGroup.get_metadata_builder", REST_OPTIONAL,
           "The builder that a partial forward presents virtual requests to.", FORWARD),
    has("vllm.config:VllmConfig", "compilation_config", "Leads to the attention layers.", HOST),
    has("vllm.config:CompilationConfig", "static_forward_context",
        "Attention layers by name.", HOST),
    has("vllm.config:ParallelConfig", "worker_cls", "Names the worker's class.", HOST),
    has("vllm.engine.arg_utils:EngineArgs", "worker_cls kv_transfer_config",
        "Set by plug-ins.", "plugin.py", PLUGIN),
)  # fmt: skip

PARTIAL_FORWARD = (
    is_class("vllm.v1.attention.backend:CommonAttentionMetadata", "A batch of virtual requests."),
    method("vllm.v1.attention.backend:CommonAttentionMetadata",
           "query_start_loc, query_start_loc_cpu, seq_lens, num_reqs, num_actual_tokens, "
           f"max_query_len, max_seq_len, block_table_tensor, slot_mapping, {REST_OPTIONAL}",
           "Made for a batch of virtual requests.", FORWARD),
    has("vllm.v1.attention.backend:CommonAttentionMetadata",
        "is_prefilling seq_lens_cpu_upper_bound",
        "Says that rows are prefill, and how far they see, without a copy from the device.",
        FORWARD),
    method("vllm.v1.attention.backend:AttentionMetadataBuilder.build",
           f"common_prefix_len, common_attn_metadata, {REST_OPTIONAL}",
           "Makes a backend's own metadata of virtual requests.", FORWARD),
    has("vllm.v1.attention.backend:AttentionMetadataBuilder", "kv_cache_spec",
        "Size of the blocks that the kernel sees.", FORWARD),
    method("vllm.forward_context:set_forward_context",
           "attn_metadata, vllm_config, num_tokens, num_tokens_across_dp, cudagraph_runtime_mode, "
           f"batch_descriptor, ubatch_slices, slot_mapping, {REST_OPTIONAL}",
           "Metadata and slots that the layers of a pass read."),
    is_class("vllm.forward_context:ForwardContext", "Handed to a connector.", CONNECTOR),
    method("vllm.distributed:tensor_model_parallel_all_reduce", "input_",
           "Deviations are summed over ranks, which hold different heads."),
    has("vllm.v1.kv_cache_interface:FullAttentionSpec",
        "block_size sliding_window page_size_bytes",
        "Refusal of models with other attention; size of stored KV.", FORWARD, CONNECTOR),
    has("vllm.v1.kv_cache_interface:KVCacheConfig", "kv_cache_groups",
        "Refusal of models whose layers do not share block tables.", FORWARD),
    has("vllm.v1.kv_cache_interface:KVCacheGroupSpec", "kv_cache_spec layer_names",
        "Refusal of models with other attention; number of layers.", FORWARD, CONNECTOR),
    *(
        method(f"{_MODELS}.{module}:{name}DecoderLayer.forward",
               f"positions, hidden_states, residual, {REST_OPTIONAL}",
               "Called layer by layer.", FORWARD)
        for module, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"),
                             ("qwen3", "Qwen3"))
    ),
    *(
        has(f"{_MODELS}.{module}:{name}DecoderLayer", "self_attn",
            "Leads to a layer's attention and position embedding.", FORWARD)
        for module, name in (("llama", "Llama"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
    ),
    *(
        has(f"{_MODELS}.{module}:{name}Attention", "attn", "A layer's attention.", FORWARD)
        for module, name in (("llama", "Llama"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
    ),
    behaves(f"{_MODELS}.llama:LlamaAttention", behaviours.attention_has_a_rotary_embedding,
            "A layer's position embedding, by which keys are moved.", FORWARD),
    behaves(f"{_MODELS}.llama:LlamaAttention.forward",
            behaviours.attention_is_called_with_queries_keys_and_values,
            "A layer's keys and values are taken where its attention would begin.", CHECK),
    *(
        method(f"{_MODELS}.{module}:{name}Model.embed_input_ids", "input_ids",
               "What a pass from the first layer on begins with.", FORWARD)
        for module, name in (("llama", "Llama"), ("qwen2", "Qwen2"))
    ),
    *(
        has(f"{_MODELS}.{module}:{name}ForCausalLM", "model",
            "The decoder stack of a model.", FORWARD)
        for module, name in (("llama", "Llama"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
    ),
    is_class(f"{_MODELS}.mistral:MistralForCausalLM", "Built as Llama is.", FORWARD,
             bases=(f"{_MODELS}.llama:LlamaForCausalLM",)),
    is_class(f"{_MODELS}.qwen3:Qwen3Model", "Built as Qwen2 is.", FORWARD,
             bases=(f"{_MODELS}.qwen2:Qwen2Model",)),
    method(f"{_MODELS}.interfaces:SupportsMultiModal.get_language_model", "",
           "The decoder of a model that takes images as well.", FORWARD),
    is_class(f"{_MODELS}.qwen3_vl:Qwen3LLMModel", "Built as Qwen3 is.", FORWARD,
             bases=(f"{_MODELS}.qwen3:Qwen3Model",)),
    behaves(f"{_MODELS}.qwen3_vl:Qwen3LLMModel", behaviours.layers_of_qwen3_vl_are_those_of_qwen3,
            "Called layer by layer.", FORWARD),
    has(f"{_MODELS}.qwen3_vl:Qwen3LLMForCausalLM", "model", "The decoder stack of a model.",
        FORWARD),
    behaves(f"{_MODELS}.interfaces:SupportsMRoPE.get_mrope_input_positions",
            behaviours.axes_count_the_tokens_of_text,
            "Text is given the same positions on all axes of M-RoPE.", FORWARD, ROPE),
    has("vllm.config:ModelConfig", "is_multimodal_model uses_mrope mrope_num_dims",
        "Where the decoder is, and what positions its layers take.", FORWARD),
    has("vllm.model_executor.layers.attention:Attention", "layer_name kv_cache impl",
        "A layer's name, cache and backend.", FORWARD, PAGES),
    *(
        method(f"{_BACKENDS}.{module}:{name}.do_kv_cache_update",
               "layer, key, value, kv_cache, slot_mapping",
               "Writes KV in the backend's own layout.", PAGES)
        for module, name in (("cpu_attn", "CPUAttentionBackendImpl"),
                             ("flash_attn", "FlashAttentionImpl"))
    ),
    has("vllm.config:CacheConfig", "cache_dtype", "Refusal of a quantised KV cache."),
    has("vllm.config:ModelConfig", "architectures", "Refusal of models with other layers."),
)  # fmt: skip

KV_CONNECTOR = (
    behaves("vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory",
            behaviours.connectors_may_name_their_module,
            "The connector is found without being registered.", PLUGIN),
    is_class("vllm.config:KVTransferConfig", "What --kv-transfer-config holds.", PLUGIN),
    has("vllm.config:KVTransferConfig",
        "kv_connector kv_connector_module_path kv_role kv_load_failure_policy",
        "Names the connector, and asks for what failed to load to be computed.", PLUGIN),
    is_class(_CONNECTOR, "Base of the connector."),
    has(_CONNECTOR,
        "start_load_kv wait_for_layer_load save_kv_layer wait_for_save "
        "get_num_new_matched_tokens update_state_after_alloc build_connector_meta",
        "A new abstract method would stop the connector from being made.", CONNECTOR,
        kind="abstract methods"),
    has(_CONNECTOR, "role _get_connector_metadata",
        "Which side a connector is, and this step's orders."),
    method(f"{_CONNECTOR}.__init__", "vllm_config, role, kv_cache_config", "Extended."),
    *(
        method(f"{_CONNECTOR}.{name}", parameters, "Overridden.", CONNECTOR)
        for name, parameters in {
            "bind_kv_cache_manager": "kv_cache_manager",
            "get_num_new_matched_tokens": "request, num_computed_tokens",
            "update_state_after_alloc": "request, blocks, num_external_tokens",
            "build_connector_meta": "scheduler_output",
            "update_connector_output": "connector_output",
            "request_finished": "request, block_ids",
            "reset_cache": "",
            "start_load_kv": f"forward_context, {REST_OPTIONAL}",
            "wait_for_layer_load": "layer_name",
            "wait_for_save": "",
            "get_transfer_results": "finished_req_ids",
            "get_block_ids_with_load_errors": "",
            "build_connector_worker_meta": "",
        }.items()
    ),
    is_class(f"{_BASE}:SupportsHMA", "Lets a connector run beside the hybrid KV cache manager."),
    method(f"{_BASE}:SupportsHMA.request_finished_all_groups", "request, block_ids",
           "Overridden.", CONNECTOR),
    is_class(f"{_BASE}:KVConnectorMetadata", "Base of a step's orders."),
    is_class(f"{_BASE}:KVConnectorWorkerMetadata", "Base of a worker's report."),
    has(f"{_BASE}:KVConnectorWorkerMetadata", "aggregate",
        "A new abstract method would stop the report from being made.", TRANSFER,
        kind="abstract methods"),
    method(f"{_BASE}:KVConnectorWorkerMetadata.aggregate", "other",
           "Overridden: joins two ranks' reports.", TRANSFER),
    is_class(f"{_BASE}:KVConnectorRole", "Which side a connector is."),
    has(f"{_BASE}:KVConnectorRole", "SCHEDULER WORKER", "Which side a connector is.",
        kind="object"),
    is_class(f"{_BASE}:KVConnectorTransferResults", "What is loaded by now."),
    has(f"{_BASE}:KVConnectorTransferResults", "finished_recving", "What is loaded by now.",
        CONNECTOR),
    method("vllm.distributed.kv_transfer:get_kv_transfer_group", "",
           "The connector of this worker."),
    behaves("vllm.v1.worker.gpu.kv_connector:ActiveKVConnector.pre_forward",
            behaviours.loads_between_steps_follow_the_forward,
            "KV is put together between two steps, and not while a step waits.", CONNECTOR),
    behaves("vllm.v1.core.sched.scheduler:Scheduler.schedule",
            behaviours.orders_are_asked_for_before_tokens_count,
            "A step's orders hold what it admitted, and a prompt is stored in the step that "
            "completes it.", SCHEDULER_SIDE),
    behaves("vllm.v1.metrics.cache_hit_source:CacheHitSource",
            behaviours.hits_have_a_source_where_vllm_tells_them_apart,
            "vLLM's own count of hits.", CONNECTOR, "kv_connectors/pd/connector.py"),
    is_class("vllm.v1.outputs:KVConnectorOutput", "What the workers report."),
    has("vllm.v1.outputs:KVConnectorOutput", "finished_recving kv_connector_worker_meta",
        "Requests that are loaded, and our own report."),
)  # fmt: skip

CACHE = (
    is_class("vllm.v1.core.kv_cache_manager:KVCacheManager", "Knows the requests' blocks."),
    method("vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids", "request_id",
           "A request's blocks, by group.", SCHEDULER_SIDE),
    has("vllm.v1.core.kv_cache_manager:KVCacheManager", "block_pool", "Leads to the size.",
        SCHEDULER_SIDE),
    has("vllm.v1.core.block_pool:BlockPool", "hash_block_size",
        "Tokens of a block as the prefix cache hashes them.", TAINTED),
    has("vllm.v1.core.block_pool:BlockPool", "num_gpu_blocks", "A bound.", TAINTED),
    method("vllm.v1.core.block_pool:BlockPool.get_cached_block",
           "block_hash, kv_cache_group_ids", "Whether an approximate block is still there.",
           TAINTED),
    is_class("vllm.v1.core.kv_cache_manager:KVCacheBlocks", "A request's blocks.", CONNECTOR),
    has("vllm.v1.core.kv_cache_utils:BlockHash", "", "Type of a block's hash.", kind="object"),
    has(_REQUEST,
        "block_hashes cache_salt kv_transfer_params mm_features num_preemptions prompt_embeds "
        "is_finished num_output_tokens num_prompt_tokens",
        "Domain and wishes of a request; hashes that keep its blocks out of the prefix cache."),
    has("vllm.multimodal.inputs:MultiModalFeatureSpec", "mm_position",
        "Where a prompt's first image begins.", REQUEST_STATE),
    has("vllm.multimodal.inputs:PlaceholderRange", "offset",
        "Where a prompt's first image begins.", REQUEST_STATE),
    method(f"{_REQUEST}.update_block_hashes", "", "Hashes the blocks after those that are."),
    behaves(f"{_REQUEST}.update_block_hashes", behaviours.block_hashes_are_a_chain,
            "Who asks for exact KV never finds approximate blocks.", TAINTED),
    has("vllm.config:VllmConfig", "lora_config speculative_config", "What is refused."),
    has("vllm.config:ParallelConfig", "decode_context_parallel_size", "What is refused."),
    method("vllm.config:ModelConfig.get_total_num_hidden_layers", "",
           "Refusal of a check layer that the model does not have."),
    has(f"{_ROTARY}.base:RotaryEmbedding", "cos_sin_cache rotary_dim is_neox_style",
        "Keys are moved by the rows of this table.", ROPE),
    is_class(f"{_ROTARY}:MRotaryEmbedding", "All its axes share a table.", ROPE,
             bases=(f"{_ROTARY}.base:RotaryEmbeddingBase",)),
    has(f"{_ROTARY}:MRotaryEmbedding", "cos_sin_cache rotary_dim is_neox_style",
        "Keys are moved by the rows of this table.", ROPE),
    *(
        is_class(f"{_ROTARY}:{name}", "Its table holds for all requests and positions.", ROPE,
                 bases=(f"{_ROTARY}.base:RotaryEmbedding",))
        for name in ("LinearScalingRotaryEmbedding", "Llama3RotaryEmbedding",
                     "NTKScalingRotaryEmbedding", "YaRNScalingRotaryEmbedding",
                     "DynamicNTKScalingRotaryEmbedding", "DynamicNTKAlphaRotaryEmbedding")
    ),
)  # fmt: skip

WORKER_CONTRACTS: tuple[Contract, ...] = (
    # Attention backends need least of all that have a part in the worker.
    *(replace(row, vllm=load("hip").requires.vllm) for row in WORKER),
    *(
        replace(row, vllm=load("kvshare").requires.vllm)
        for row in (*PARTIAL_FORWARD, *KV_CONNECTOR, *CACHE, *HTTP_SIDE, *TIERS)
    ),
)
