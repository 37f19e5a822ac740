"""Rows of the table that attention backends rely on."""

from __future__ import annotations

from dataclasses import replace

from vllm_plugins.compat import attention_behaviours as behaviours
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

HOST = "engine/attention_host.py"
CPU = "attention_backends/hip/cpu_backend.py"
WORKER = "attention_backends/hip/worker.py"
_REGISTRY = "vllm.v1.attention.backends.registry"
_ENUM = f"{_REGISTRY}:AttentionBackendEnum"
_CPU = "vllm.v1.attention.backends.cpu_attn"
_BACKEND = "vllm.v1.attention.backend"

ENTRY = (
    has(_ENUM, "CPU_ATTN CUSTOM", "The names under which a plug-in's backend is found.", HOST,
        kind="object"),
    has(f"{_ENUM}.CUSTOM", "get_path is_overridden clear_override",
        "A backend stands in for a while.", HOST, kind="object"),
    method(f"{_REGISTRY}:register_backend", f"backend, class_path, {REST_OPTIONAL}",
           "A backend stands in for a while."),
    has("vllm.v1.attention.selector:_cached_get_attn_backend", "cache_clear",
        "vLLM remembers its choice; that is undone before and after.", HOST, kind="object"),
    behaves("vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls",
            behaviours.the_cpu_backend_can_be_overridden,
            "The CPU's one backend can be stood in for.", HOST),
    behaves("vllm.model_executor.layers.attention:Attention.get_attn_backend",
            behaviours.layers_keep_their_backend,
            "What stands in for a backend is only there while a model loads.", HOST),
    has("vllm.engine.arg_utils:EngineArgs", "attention_backend", "Names the backend on CUDA.",
        "plugin.py"),
    method("vllm.model_executor.models.utils:extract_layer_index",
           f"layer_name, {REST_OPTIONAL}", "Which layer has which options."),
)  # fmt: skip

CPU_BACKEND = (
    is_class(f"{_CPU}:CPUAttentionBackend", "Base of the CPU backends.", CPU,
             bases=(f"{_BACKEND}:AttentionBackend",)),
    is_class(f"{_CPU}:CPUAttentionMetadata", "What a batch's layers see."),
    is_class(f"{_CPU}:CPUAttentionMetadataBuilder", "Base of the CPU metadata builders."),
    is_class(f"{_CPU}:CPUAttentionBackendImpl", "Base of the CPU layers.",
             bases=(f"{_BACKEND}:AttentionImpl",)),
    method(f"{_CPU}:CPUAttentionMetadataBuilder.__init__",
           "kv_cache_spec, layer_names, vllm_config, device", "Extended.", CPU),
    method(f"{_CPU}:CPUAttentionMetadataBuilder.build",
           "common_prefix_len, common_attn_metadata, fast_build", "Extended.", CPU),
    has(f"{_CPU}:CPUAttentionMetadataBuilder", "block_size", "Tokens of a cache block.", CPU),
    method(f"{_CPU}:CPUAttentionBackendImpl.forward",
           "layer, query, key, value, kv_cache, attn_metadata, output, output_scale, "
           "output_block_scale", "Replaced in sparse layers.", CPU),
    method(f"{_CPU}:CPUAttentionBackendImpl.do_kv_cache_update",
           "layer, key, value, kv_cache, slot_mapping", "Replaced in sparse layers.", CPU),
    has(f"{_CPU}:CPUAttentionBackendImpl",
        "scale sliding_window attn_type alibi_slopes logits_soft_cap sinks "
        "kv_sharing_target_layer_name", "What a layer computes, and what is refused.", WORKER),
    is_class(f"{_BACKEND}:CommonAttentionMetadata", "A batch."),
    has(f"{_BACKEND}:CommonAttentionMetadata",
        "num_reqs query_start_loc seq_lens block_table_tensor slot_mapping is_prefilling",
        "A batch."),
    method("vllm._custom_ops:cpu_attn_reshape_and_cache",
           f"key, value, key_cache, value_cache, slot_mapping, isa, {REST_OPTIONAL}",
           "Fills the stock kernel's cache in kernel benchmarks."),
    method("vllm._custom_ops:cpu_attn_get_scheduler_metadata",
           "num_reqs, num_heads, num_kv_heads, head_dim, seq_lens, dtype, query_start_loc, causal, "
           f"sliding_window_size, isa, enable_kv_split, {REST_OPTIONAL}",
           "The stock kernel in kernel benchmarks."),
    method("vllm._custom_ops:cpu_attention_with_kv_cache",
           "query, key_cache, value_cache, output, query_start_loc, seq_lens, scale, causal, "
           "alibi_slopes, sliding_window, block_table, softcap, scheduler_metadata, s_aux, "
           f"{REST_OPTIONAL}", "The stock kernel in kernel benchmarks."),
    method(f"{_CPU}:_get_attn_isa", f"dtype, block_size, head_size, {REST_OPTIONAL}",
           "The stock kernel in kernel benchmarks."),
    has("vllm.config:VllmConfig", "kv_transfer_config", "What is refused."),
    has("vllm.config:ModelConfig", "use_mla", "What is refused."),
    has("vllm.config:CacheConfig", "cache_dtype block_size", "What is refused."),
    has("vllm.config:ParallelConfig",
        "decode_context_parallel_size prefill_context_parallel_size use_ubatching",
        "What is refused."),
    has("vllm.config:SpeculativeConfig", "num_speculative_tokens",
        "Queries of a decode step.", CPU),
    has("vllm.config:SchedulerConfig", "max_num_seqs", "Rows of what is kept of requests."),
    has("vllm.envs", "VLLM_BATCH_INVARIANT", "What is refused.", "attention_backends/hip/plugin.py",
        "attention_backends/zipcache/plugin.py", kind="object"),
    has("vllm.distributed.parallel_state:GroupCoordinator", "is_first_rank is_last_rank",
        "One rank counts.", "attention_backends/hip/meter.py"),
    method("vllm.distributed:get_pp_group", "", "One stage of a pipeline counts.",
           "attention_backends/hip/meter.py"),
    is_class("vllm.v1.kv_cache_interface:FullAttentionSpec",
             "Layers that attend to less, or to keys of their own, stay dense.", WORKER),
    method("vllm.model_executor.layers.attention:Attention.get_kv_cache_spec", "vllm_config",
           "Tells which kind of layer it is.", WORKER),
)  # fmt: skip

CUDA = "attention_backends/hip/cuda_backend.py"
CUDA_BATCH = "attention_backends/hip/cuda_batch.py"
PACKED_CUDA = "attention_backends/zipcache/cuda_backend.py"
_FLASH = "vllm.v1.attention.backends.flash_attn"

CUDA_BACKEND = (
    is_class(f"{_FLASH}:FlashAttentionBackend", "Base of the CUDA backend.", CUDA,
             bases=(f"{_BACKEND}:AttentionBackend",)),
    is_class(f"{_FLASH}:FlashAttentionImpl", "Base of the CUDA layers.",
             bases=(f"{_BACKEND}:AttentionImpl",)),
    has(f"{_FLASH}:FlashAttentionImpl",
        "head_size num_heads scale sliding_window attn_type alibi_slopes logits_soft_cap sinks "
        "kv_sharing_target_layer_name", "What a layer computes, and what is refused.", CUDA,
        WORKER),
    method(f"{_FLASH}:FlashAttentionImpl.__init__", REST_ANY, "Extended.", CUDA),
    method(f"{_FLASH}:FlashAttentionImpl.forward",
           "layer, query, key, value, kv_cache, attn_metadata, output, output_scale, "
           "output_block_scale", "Serves the dense rows.", CUDA),
    is_class(f"{_FLASH}:FlashAttentionMetadata", "What a batch's layers see."),
    has(f"{_FLASH}:FlashAttentionMetadata",
        "seq_lens max_seq_len block_table scheduler_metadata",
        "Rewritten, so that rows that are served elsewhere cost nothing.", CUDA),
    is_class(f"{_FLASH}:FlashAttentionMetadataBuilder", "Base of the CUDA metadata builder."),
    has(f"{_FLASH}:FlashAttentionMetadataBuilder", "block_size model_config",
        "Tokens of a cache block, and of the longest sequence.", CUDA),
    method(f"{_BACKEND}:AttentionMetadataBuilder.build_for_cudagraph_capture",
           "common_attn_metadata", "A graph serves sequences of every length.", CUDA),
    has("vllm.config:CompilationConfig", "cudagraph_mode max_cudagraph_capture_size",
        "Which steps are replayed as graphs.", CUDA_BATCH),
    has("vllm.config.compilation:CUDAGraphMode", "has_full_cudagraphs",
        "Which steps are replayed as graphs.", CUDA_BATCH, kind="object"),
    method(f"{_FLASH}:FlashAttentionMetadataBuilder.__init__",
           "kv_cache_spec, layer_names, vllm_config, device", "Extended.", CUDA),
    method(f"{_FLASH}:FlashAttentionMetadataBuilder.build",
           "common_prefix_len, common_attn_metadata, fast_build", "Extended.", CUDA),
    has(f"{_BACKEND}:AttentionCGSupport", "UNIFORM_SINGLE_TOKEN_DECODE",
        "Steps that only decode run as graphs.", CUDA, PACKED_CUDA, kind="object"),
    has(f"{_BACKEND}:CommonAttentionMetadata",
        "query_start_loc_cpu seq_lens_cpu_upper_bound max_query_len",
        "What the host knows of a batch.", CUDA_BATCH),
    method("vllm.config:get_current_vllm_config", REST_OPTIONAL, "Drafts of a decode step.", CUDA),
)  # fmt: skip

BLOCKS = "attention_backends/zipcache/blocks.py"
_SPEC = "vllm.v1.kv_cache_interface:AttentionSpec"
_OUTPUT = "vllm.v1.core.sched.output"

PAGES = (
    is_class(_SPEC, "Says how large pages are."),
    has(_SPEC, "block_size head_size dtype state_content_bytes",
        "A packed page is asked for by its bytes.", "attention_backends/zipcache/cpu_backend.py"),
    method(f"{_BACKEND}:AttentionBackend.customize_spec", "spec",
           "A packed page is asked for by its bytes.",
           "attention_backends/zipcache/cpu_backend.py"),
    behaves("vllm.v1.worker.gpu.block_table:BlockTables", behaviours.dummy_batches_have_no_slots,
            "A step of no requests changes no page of those that wait.",
            "attention_backends/zipcache/cpu_backend.py", PACKED_CUDA),
    has("vllm.config:ModelConfig", "is_hybrid is_mm_prefix_lm", "What is refused."),
    has("vllm.config:CacheConfig", "prefix_match_unit", "What is refused.",
        "attention_backends/hip/plugin.py", "attention_backends/zipcache/plugin.py"),
    has("vllm.config:ParallelConfig", "enable_elastic_ep", "What is refused."),
    is_class("vllm.model_executor.layers.attention:Attention",
             "Layers of a kind of their own are refused.", "attention_backends/zipcache/worker.py"),
    method("vllm.distributed:get_pp_group", "", "One rank counts."),
    has(f"{_OUTPUT}:SchedulerOutput",
        "finished_req_ids preempted_req_ids num_scheduled_tokens scheduled_new_reqs "
        "scheduled_cached_reqs", "The life of blocks follows the scheduler.", BLOCKS),
    has(f"{_OUTPUT}:NewRequestData",
        "req_id block_ids num_computed_tokens prefill_token_ids prompt_token_ids prompt_embeds",
        "The life of blocks follows the scheduler.", BLOCKS),
    has(f"{_OUTPUT}:CachedRequestData",
        "req_ids new_block_ids num_computed_tokens num_output_tokens",
        "The life of blocks follows the scheduler.", BLOCKS),
)  # fmt: skip

KEYS = "attention_backends/zipcache/train.py"

KEY_TRANSFORMS = (
    method("vllm:LLM.from_engine_args", "engine_args", "Keys are looked at with a server's flags."),
    method("vllm:LLM.apply_model", "func", "Hooks are set in the workers.", KEYS),
    method("vllm.model_executor.layers.attention:Attention.forward",
           f"query, key, value, {REST_OPTIONAL}", "Hooks see a layer's queries and keys.", KEYS),
    method("vllm.config:ModelConfig.get_total_num_kv_heads", "", "Which heads a rank has."),
)  # fmt: skip

_UTILS = "vllm.v1.attention.backends.fa_utils"

PACKED_CUDA_BACKEND = (
    has(f"{_FLASH}:FlashAttentionImpl", "num_kv_heads", "Heads of a packed page.", PACKED_CUDA),
    has(f"{_BACKEND}:CommonAttentionMetadata", "max_seq_len", "A batch.", PACKED_CUDA),
    has("vllm.v1.kv_cache_interface:KVCacheLayout", "LBHNC", "Pages are whole for each layer.",
        PACKED_CUDA, kind="object"),
    is_class("vllm.platforms.interface:DeviceCapability", "What is refused.", PACKED_CUDA),
    has("vllm.platforms.interface:DeviceCapability", "major", "What is refused.", PACKED_CUDA),
    method("vllm.platforms.interface:Platform.has_device_capability",
           f"capability, {REST_OPTIONAL}", "What is refused.",
           "attention_backends/zipcache/plugin.py"),
    has("vllm.platforms:current_platform", "has_device_capability", "What is refused.",
        "attention_backends/zipcache/plugin.py", kind="object"),
    method(f"{_UTILS}:get_flash_attn_version", REST_OPTIONAL,
           "The stock kernel in kernel benchmarks."),
    behaves(f"{_UTILS}:flash_attn_varlen_func", behaviours.flash_attention_takes_pages,
            "The stock kernel in kernel benchmarks."),
)  # fmt: skip

ATTENTION_CONTRACTS: tuple[Contract, ...] = tuple(
    replace(contract, vllm=load("hip").requires.vllm)
    for contract in (
        *ENTRY,
        *CPU_BACKEND,
        *CUDA_BACKEND,
        *PAGES,
        *KEY_TRANSFORMS,
        *PACKED_CUDA_BACKEND,
    )
)
