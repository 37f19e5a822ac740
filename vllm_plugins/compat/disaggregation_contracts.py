"""Rows of the table that splitting a model's work over instances relies on: pd, epd, the router."""

from __future__ import annotations

from dataclasses import replace

from vllm_plugins.compat import disaggregation_behaviours as handover
from vllm_plugins.compat import encoder_behaviours as encoder
from vllm_plugins.compat import state_behaviours as states
from vllm_plugins.compat.contract import (
    REST_OPTIONAL,
    Contract,
    behaves,
    has,
    is_class,
    method,
)
from vllm_plugins.registry import load

PD = "kv_connectors/pd"
PD_CONNECTOR = f"{PD}/connector.py"
PD_PREFILL, PD_DECODE = f"{PD}/prefill_scheduler.py", f"{PD}/decode_scheduler.py"
PD_WORKER, PD_PULLS, PD_SERVES = (
    f"{PD}/worker.py", f"{PD}/decode_worker.py", f"{PD}/prefill_worker.py",
)  # fmt: skip
_KV = "vllm.distributed.kv_transfer.kv_connector"
_CONNECTOR = f"{_KV}.v1.base:KVConnectorBase_V1"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_REQUEST = "vllm.v1.request:Request"
_GROUP = "vllm.distributed.parallel_state:GroupCoordinator"

PD_SIDES = (
    *(
        method(f"{_CONNECTOR}.{name}", parameters, why, PD_CONNECTOR)
        for name, parameters, why in (
            ("__init__", "vllm_config, role, kv_cache_config", "Extended."),
            ("get_required_kvcache_layout", "vllm_config", "Overridden: heads outside of slots."),
            ("requires_piecewise_for_cudagraph", "extra_config",
             "Overridden: layers leave from Python, which does not run in a replayed graph."),
            ("bind_kv_cache_manager", "kv_cache_manager", "Extended: the sides need the pool."),
            ("set_xfer_handshake_metadata_pp_aware", "metadata",
             "Overridden: learns where workers serve their blocks."),
            ("on_new_request", "request", "Overridden: queues what is to be pulled."),
            ("get_num_new_matched_tokens", "request, num_computed_tokens",
             "Overridden: promises a pull, or has a request wait."),
            ("update_state_after_alloc", "request, blocks, num_external_tokens",
             "Overridden: orders a pull into these blocks."),
            ("build_connector_meta", "scheduler_output", "Overridden: a step's orders."),
            ("update_connector_output", "connector_output", "Overridden: hears of transfers."),
            ("request_finished", "request, block_ids", "Overridden: keeps a prompt's blocks."),
            ("has_pending_push_work", "", "Overridden: orders wait for a step."),
            ("register_kv_caches", "kv_caches", "Overridden: serves the cache."),
            ("get_handshake_metadata", "", "Overridden: what a worker holds, and where."),
            ("handle_preemptions", "kv_connector_metadata",
             "Overridden: takes orders before a forward overwrites blocks."),
            ("start_load_kv", f"forward_context, {REST_OPTIONAL}", "Overridden: starts pulls."),
            ("wait_for_layer_load", "layer_name", "Overridden: nothing to wait for."),
            ("save_kv_layer", f"layer_name, kv_layer, attn_metadata, {REST_OPTIONAL}",
             "Overridden: a layer may leave."),
            ("wait_for_save", "", "Overridden: nothing to wait for."),
            ("get_transfer_results", "finished_req_ids", "Overridden: what moved."),
            ("build_connector_worker_meta", "", "Overridden: counts for the scheduler's side."),
            ("shutdown", "", "Overridden: ends the threads."),
        )
    ),
    method(f"{_KV}.v1.base:SupportsHMA.request_finished_all_groups", "request, block_ids",
           "Overridden: keeps a prompt's blocks.", PD_CONNECTOR),
    has(_CONNECTOR, "role _get_connector_metadata _kv_cache_config _kv_cache_manager",
        "Which side a connector is, this step's orders, and what it was made with."),
    is_class(f"{_KV}.v1.base:KVConnectorHandshakeMetadata", "Base of a worker's introduction."),
    has(f"{_KV}.v1.base:KVConnectorTransferResults",
        "finished_sending finished_recving failed_recving", "What moved.", PD_CONNECTOR),
    has("vllm.v1.outputs:KVConnectorOutput",
        "finished_sending finished_recving kv_connector_worker_meta", "What moved."),
    has("vllm.config:KVTransferConfig",
        "kv_connector kv_connector_module_path kv_role kv_load_failure_policy "
        "kv_connector_extra_config", "Names the connector.", f"{PD}/plugin.py"),
    is_class("vllm.v1.attention.backend:AttentionMetadata", "Handed to a connector, unread."),
    has("vllm.v1.core.block_pool:BlockPool", "num_gpu_blocks", "Size of the pool.", PD_CONNECTOR),
    method("vllm.v1.core.block_pool:BlockPool.get_num_free_blocks", "",
           "Admission of pulls.", PD_DECODE),
    method("vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids", "request_id",
           "Blocks of a prompt that is being computed.", PD_CONNECTOR),
    method("vllm.v1.core.kv_cache_manager:KVCacheBlocks.get_block_ids", REST_OPTIONAL,
           "Where a pull goes.", PD_DECODE),
    has("vllm.v1.kv_cache_interface:KVCacheConfig", "num_blocks kv_cache_groups",
        "Form of the cache.", PD_WORKER),
    has("vllm.v1.kv_cache_interface:KVCacheGroupSpec", "layer_names kv_cache_spec",
        "Form of the cache.", PD_WORKER, PD_CONNECTOR),
    has(_REQUEST, "status lora_request num_preemptions abort_immediately",
        "How a prompt ended, what its KV depends on, and whether anybody waits for it."),
    has("vllm.lora.request:LoRARequest", "lora_name", "What a prompt's KV depends on.", PD_PREFILL),
    has("vllm.multimodal.inputs:MultiModalFeatureSpec", "identifier mm_position",
        "What a prompt's KV depends on.", PD_PREFILL),
    has("vllm.config:ModelConfig", "is_hybrid is_attention_free use_mla", "What is refused."),
    has("vllm.config:LoadConfig", "load_format", "What KV depends on.", f"{PD}/fingerprint.py"),
    method("vllm.config:ModelConfig.get_total_num_kv_heads", "", "Which heads a worker has.",
           PD_WORKER),
    method("vllm.distributed.parallel_state:get_tp_group", "", "Which heads a worker has."),
    method("vllm.distributed.parallel_state:get_pp_group", "", "Number of a worker."),
    has(_GROUP, "rank_in_group world_size", "Which heads a worker has, and its number.", PD_WORKER),
)  # fmt: skip

PD_BEHAVIOURS = (
    behaves(f"{_SCHEDULER}.schedule", handover.orders_are_asked_for_between_blocks_and_counts,
            "A chunk that leaves ends where this step's tokens end.", PD_PREFILL),
    behaves(f"{_SCHEDULER}.schedule", handover.a_request_can_be_held_back,
            "Back-pressure, and prompts that wait for room, hold up nobody else.", PD_CONNECTOR),
    behaves(f"{_SCHEDULER}.schedule", handover.a_pull_gets_blocks_and_then_the_last_token_runs,
            "A whole prompt can be pulled.", PD_DECODE),
    behaves(f"{_SCHEDULER}.schedule", handover.blocks_of_a_pull_are_not_zeroed,
            "A worker does not clear what a pull has written.", PD_CONNECTOR),
    behaves(f"{_SCHEDULER}.update_from_output", handover.a_failed_pull_starts_over,
            "Whatever goes wrong with a pull costs a prefill.", PD_PULLS, PD_DECODE),
    behaves(f"{_SCHEDULER}.update_from_output", handover.a_failed_pull_can_fail_its_request,
            "on_failure=fail.", f"{PD}/plugin.py"),
    behaves(f"{_SCHEDULER}.finish_requests", handover.an_aborted_pull_keeps_its_blocks,
            "A pull may write into its blocks until it has reported.", PD_PULLS),
    behaves(f"{_SCHEDULER}.update_from_output", handover.kept_blocks_are_freed_on_the_workers_word,
            "Blocks are held from a prompt's end until they are pulled or their lease ends, and "
            "the orders to hold them reach the workers in the step that says it ended.",
            PD_PREFILL, PD_SERVES),
    behaves(f"{_SCHEDULER}.has_requests", handover.an_idle_engine_steps_for_orders,
            "Orders reach the workers of an idle engine.", PD_CONNECTOR),
    behaves(f"{_SCHEDULER}.schedule", handover.orders_of_a_step_know_who_was_preempted,
            "Nobody reads the blocks of a prompt that lost them.", PD_PREFILL),
    behaves("vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model",
            handover.orders_reach_workers_before_blocks_are_written,
            "Nobody reads blocks that a forward writes anew.", PD_WORKER),
    behaves("vllm.v1.worker.gpu.kv_connector:ActiveKVConnector.no_forward",
            handover.runners_report_ended_requests_after_the_loads,
            "Pulls start and are given up in steps without tokens too.", PD_CONNECTOR),
    behaves(f"{_KV}.utils:KVOutputAggregator.aggregate",
            handover.a_pull_is_over_when_all_workers_say_so,
            "Each worker reports its own part of a pull.", PD_PULLS),
    behaves("vllm.v1.engine.core:EngineCore.__init__", handover.workers_introduce_themselves,
            "The scheduler's side names all workers' addresses.", PD_CONNECTOR),
    behaves(f"{_KV}.utils:get_kv_connector_cache_layout", handover.a_connector_chooses_the_layout,
            "A few heads of a block lie together.", PD_CONNECTOR),
    behaves("vllm.v1.kv_cache_interface:compute_layer_kv_cache_shape_bytes",
            handover.caches_are_blocks_by_heads_by_slots, "Heads and blocks are cut out by index.",
            f"{PD}/pages.py"),
    behaves("vllm.model_executor.layers.attention.kv_transfer_utils:maybe_transfer_kv_layer",
            handover.layers_are_told_of_once_attention_has_run,
            "A layer leaves once its KV is written.", PD_SERVES),
)  # fmt: skip

PD_GROUPS, PD_ROTARY = f"{PD}/groups.py", "engine/rotary_heads.py"
_CACHE = "vllm.v1.core.kv_cache_manager:KVCacheManager"
_SPECS = "vllm.v1.kv_cache_interface"
_ROTARY = "vllm.model_executor.layers.rotary_embedding:RotaryEmbedding"

# Recurrent states.
PD_STATES = (
    has(_CONNECTOR, "supports_divergent_local_hybrid_hits",
        "Overridden: a pull brings the state, so attention's own KV may reach further.",
        PD_CONNECTOR),
    method(f"{_CACHE}.get_computed_blocks", "request",
           "Behind how many tokens a request could go on without a pull.", PD_CONNECTOR),
    is_class(f"{_SPECS}:MambaSpec", "Groups with one state in place of a block per position."),
    is_class(f"{_SPECS}:FullAttentionSpec", "Groups that keep all positions."),
    has(f"{_SPECS}:UniformTypeKVCacheSpecs", "first_spec block_size", "Groups of several widths.",
        PD_GROUPS),
    has(_REQUEST, "prompt_token_ids num_prompt_tokens max_tokens mm_features prompt_embeds "
        "block_hashes skip_reading_prefix_cache _all_token_ids",
        "A prompt ends one token early, where the decode instance goes on.", PD_GROUPS),
    method(f"{_REQUEST}.update_block_hashes", "", "A shortened prompt's own hashes.", PD_GROUPS),
    has("vllm.v1.request:RequestStatus", "FINISHED_STOPPED FINISHED_LENGTH_CAPPED",
        "How a prompt ended.", PD_PREFILL, kind="object"),
    has("vllm.config:VllmConfig", "speculative_config", "What is refused.", f"{PD}/plugin.py"),
    method("vllm.model_executor.layers.mamba.mamba_utils:is_conv_state_dim_first", "",
           "The layout within a state.", f"{PD}/fingerprint.py"),
    behaves(f"{_CACHE}.allocate_slots",
            states.a_pulled_state_gets_the_block_behind_its_last_token,
            "A state is pulled into the block that the next step reads.", PD_GROUPS),
    behaves(f"{_CACHE}.get_block_ids_for_computed_tokens",
            states.a_computed_state_stands_in_the_block_behind_its_last_token,
            "The state that is handed over is the one behind the prompt.", PD_GROUPS),
    behaves(_REQUEST, states.a_prompt_can_be_shortened_before_it_starts,
            "A prompt ends one token early, where the decode instance goes on.", PD_GROUPS),
    is_class("vllm.model_executor.custom_op:CustomOp",
             "A right embedding takes a wrong one's place on CPU."),
    method("vllm.model_executor.custom_op:CustomOp.register_oot", REST_OPTIONAL,
           "A right embedding takes a wrong one's place on CPU.", PD_ROTARY),
    has("vllm.model_executor.custom_op:op_registry_oot", "",
        "Whether another took its place already.", PD_ROTARY, kind="object"),
    is_class(_ROTARY, "Base of the right embedding."),
    has(_ROTARY, "name __name__", "The name that the right one takes over.", PD_ROTARY,
        kind="object"),
    method(f"{_ROTARY}.forward_cpu", "positions, query, key", "Extended: flattens heads.",
           PD_ROTARY),
    has("vllm.platforms:current_platform", "is_cpu import_kernels", "Where the kernel is tried.",
        PD_ROTARY, kind="object"),
    method("vllm._custom_ops:rotary_embedding",
           f"positions, query, key, head_size, cos_sin_cache, is_neox, {REST_OPTIONAL}",
           "The kernel that is tried.", PD_ROTARY),
)  # fmt: skip

NIXL = f"{PD}/nixl.py"
_NIXL = f"{_KV}.v1.nixl:NixlConnector"

PD_OVER_NIXL = (
    is_class(_NIXL, "Base of the connector of transport=nixl.", bases=(_CONNECTOR,)),
    *(
        method(f"{_NIXL}.{name}", parameters, "Extended: the rule of acceptance around it.")
        for name, parameters in {
            "__init__": "vllm_config, role, kv_cache_config",
            "bind_gpu_block_pool": "gpu_block_pool",
            "on_new_request": "request",
            "get_num_new_matched_tokens": "request, num_computed_tokens",
            "update_state_after_alloc": "request, blocks, num_external_tokens",
            "build_connector_meta": "scheduler_output",
            "update_connector_output": "connector_output",
            "request_finished": "request, block_ids",
            "request_finished_all_groups": "request, block_ids",
        }.items()
    ),
    has(_NIXL, "_kv_cache_config", "Blocks of so many tokens."),
    behaves(f"{_CONNECTOR}.bind_kv_cache_manager", handover.a_connector_gets_the_pool,
            "The pool is there before any request.", NIXL),
)  # fmt: skip

EPD = "kv_connectors/epd"
EPD_CONNECTOR, EPD_RULE = f"{EPD}/connector.py", f"{EPD}/early_prefill.py"
EPD_SCHEDULER, EPD_WORKER = f"{EPD}/scheduler_side.py", f"{EPD}/worker_side.py"
EPD_ENCODES, EPD_PREFILLS = f"{EPD}/encode_side.py", f"{EPD}/prefill_side.py"
EPD_ASSEMBLY, EPD_PLUGIN = f"{EPD}/assembly.py", f"{EPD}/plugin.py"
_EC = "vllm.distributed.ec_transfer.ec_connector"
_EC_CONNECTOR = f"{_EC}.base:ECConnectorBase"
_MANAGER = "vllm.v1.core.encoder_cache_manager:EncoderCacheManager"
_FEATURE = "vllm.multimodal.inputs:MultiModalFeatureSpec"

EPD_SIDES = (
    is_class(_EC_CONNECTOR, "Base of the connector."),
    has(_EC_CONNECTOR,
        "start_load_caches save_caches has_cache_item update_state_after_alloc "
        "build_connector_meta",
        "A new abstract method would stop the connector from being made.", EPD_CONNECTOR,
        kind="abstract methods"),
    has(_EC_CONNECTOR, "role is_producer is_consumer _get_connector_metadata",
        "Which side a connector is, what its server does, and this step's orders."),
    *(
        method(f"{_EC_CONNECTOR}.{name}", parameters, why, EPD_CONNECTOR)
        for name, parameters, why in (
            ("__init__", "vllm_config, role", "Extended."),
            ("has_cache_item", "identifier", "Overridden: whether an item is here."),
            ("ensure_cache_available", "request, num_computed_tokens",
             "Overridden: whether a request can go on."),
            ("update_state_after_alloc", "request, index", "Overridden: orders a copy."),
            ("build_connector_meta", "scheduler_output", "Overridden: a step's orders."),
            ("take_unavailable_requests", "", "Overridden: who cannot be served."),
            ("request_finished", "request", "Overridden: leases what was encoded."),
            ("shutdown", "", "Overridden: ends the threads."),
            ("start_load_caches", f"encoder_cache, {REST_OPTIONAL}", "Overridden: copies in."),
            ("start_save_caches", REST_OPTIONAL, "Overridden: a server that only encodes."),
            ("save_caches", f"encoder_cache, mm_hash, {REST_OPTIONAL}", "Overridden: copies out."),
            ("get_finished", "finished_req_ids", "Overridden: the end of a step."),
        )
    ),
    is_class(f"{_EC}.base:ECConnectorMetadata", "Base of a step's orders."),
    is_class(f"{_EC}.base:ECConnectorRole", "Which side a connector is."),
    has(f"{_EC}.base:ECConnectorRole", "SCHEDULER", "Which side a connector is.", kind="object"),
    is_class(_MANAGER, "Base of the encoder cache manager."),
    method(f"{_MANAGER}.create_manager", "cache_size, vllm_config", "Overridden: finds its engine.",
           EPD_RULE),
    method(f"{_MANAGER}.__init__", "cache_size", "Called by create_manager.", EPD_RULE),
    method(f"{_MANAGER}.check_and_update_cache", "request, input_id",
           "Extended: an item that is cached already may have to be published."),
    method(f"{_MANAGER}.can_allocate",
           "request, input_id, encoder_compute_budget, num_embeds_to_schedule",
           "Extended: there is no room for an item that is not here."),
    method(f"{_MANAGER}.reset", "", "Extended: the arena forgets too."),
    has("vllm.engine.arg_utils:EngineArgs", "ec_transfer_config ec_manager_config",
        "Set by the plug-in.", EPD_PLUGIN),
    has("vllm.config:ECTransferConfig",
        "ec_connector ec_connector_module_path ec_role engine_id mm_encoder_output_widths",
        "Names the connector and its engine; widths that were measured.", EPD_PLUGIN, EPD_ASSEMBLY),
    has("vllm.config.ec_manager_config:EncoderCacheManagerConfig", "encoder_cache_manager_cls",
        "Names the encoder cache manager.", EPD_PLUGIN),
    has("vllm.config:VllmConfig", "ec_transfer_config num_prefill_lookahead_tokens",
        "Names the engine; tokens that a drafter reads ahead."),
    has("vllm.config:ModelConfig", "multimodal_config", "What is refused."),
    has("vllm.config:MultiModalConfig", "limit_per_prompt language_model_only",
        "What is refused.", EPD_PLUGIN),
    method("vllm.config:ModelConfig.get_inputs_embeds_size", "", "Width of an embedding.",
           EPD_ASSEMBLY),
    method(f"{_EC}.encoder_output_width:get_encoder_output_width", "vllm_config, modality",
           "Width of an embedding, as measured."),
    is_class(f"{_EC}.utils:PlaceholderMetadataResolver", "What lays out a prompt without pixels."),
    method(f"{_EC}.utils:PlaceholderMetadataResolver", "model_config",
           "What lays out a prompt without pixels.", EPD_ASSEMBLY),
    method(f"{_EC}.utils:PlaceholderMetadataResolver.fields_for", "modality",
           "What lays out a prompt without pixels.", EPD_ASSEMBLY),
    method(f"{_EC}.utils:collect_ec_item_metadata", "mm_features, resolver",
           "What lays out a prompt without pixels."),
    method("vllm.multimodal.encoder_budget:MultiModalBudget",
           "vllm_config, mm_registry, enable_cache", "The largest item of a model."),
    has("vllm.multimodal.encoder_budget:MultiModalBudget", "mm_max_toks_per_item",
        "The largest item of a model.", EPD_ASSEMBLY),
    has("vllm.multimodal:MULTIMODAL_REGISTRY", "create_processor", "The largest item of a model.",
        kind="object"),
    is_class(_FEATURE, "An item."),
    has(_FEATURE, "data identifier mm_position modality", "An item."),
    method("vllm.multimodal.inputs:MultiModalKwargsItem.get_data", "",
           "Whether an item came with its pixels.", EPD_ASSEMBLY),
    has("vllm.multimodal.inputs:PlaceholderRange", "offset length get_num_embeds",
        "Where an item stands and how many embeddings it has.", EPD_RULE, EPD_PREFILLS),
    has(_REQUEST, "ec_transfer_params status mm_features", "Where items are, and how it ended."),
    method(f"{_REQUEST}.get_num_encoder_embeds", "input_id", "Size of an item.", EPD_ENCODES),
    method("vllm.distributed:get_tensor_model_parallel_rank", "", "One worker saves."),
    has("vllm.platforms:current_platform", "is_cuda_alike current_device",
        "The worker's own device.", kind="object"),
)  # fmt: skip

EPD_BEHAVIOURS = (
    behaves(f"{_EC}.factory:ECConnectorFactory.get_connector_class", encoder.epd_is_found_by_name,
            "Connector and manager are found without being registered.", EPD_PLUGIN),
    behaves(f"{_SCHEDULER}.schedule", encoder.a_request_that_misses_an_item_is_passed_over,
            "A request waits for its items without holding up others.", EPD_RULE),
    behaves(f"{_SCHEDULER}.schedule", encoder.a_chunk_ends_before_an_item_without_room,
            "The text before a missing item is computed, and no more.", EPD_RULE),
    behaves(f"{_SCHEDULER}.schedule", encoder.an_item_that_is_here_is_loaded,
            "An item is either copied in or encoded and copied out.", EPD_SCHEDULER),
    behaves(f"{_SCHEDULER}.schedule", encoder.the_manager_is_asked_before_the_connector,
            "The three pieces of early prefill are asked in this order.", EPD_RULE),
    behaves(f"{_SCHEDULER}.update_from_output", encoder.a_request_whose_item_is_gone_fails,
            "A request whose item cannot be had ends.", EPD_PREFILLS, EPD_ENCODES),
    behaves(f"{_SCHEDULER}.update_from_output", encoder.an_answer_carries_where_its_items_are,
            "A lease reaches the client with the answer.", EPD_ENCODES),
    behaves(f"{_SCHEDULER}.reset_encoder_cache", encoder.the_manager_forgets_when_told_to,
            "New weights make all embeddings worthless.", EPD_RULE),
    behaves(f"{_SCHEDULER}.__init__", encoder.an_encode_server_and_its_widths_come_first,
            "The manager finds the connector, and the connector the widths.", EPD_RULE,
            EPD_ASSEMBLY),
    behaves("vllm.v1.worker.gpu.ec_connector:ActiveECConnector.maybe_get_output",
            encoder.runners_load_before_the_encoder_and_end_behind_it,
            "Copies are made before the model reads, and reported behind it.", EPD_CONNECTOR,
            EPD_WORKER),
)  # fmt: skip

ROUTER = (
    is_class("prometheus_client:CollectorRegistry", "The router's own metrics."),
    is_class("prometheus_client:Counter", "The router's own metrics."),
    is_class("prometheus_client:Gauge", "The router's own metrics."),
    is_class("prometheus_client:Histogram", "The router's own metrics."),
    method("prometheus_client:generate_latest", REST_OPTIONAL, "The router's /metrics."),
)

DISAGGREGATION_CONTRACTS: tuple[Contract, ...] = (
    *(
        replace(row, vllm=load("pd").requires.vllm)
        for row in (*PD_SIDES, *PD_BEHAVIOURS, *PD_STATES, *PD_OVER_NIXL)
    ),
    *(replace(row, vllm=load("epd").requires.vllm) for row in (*EPD_SIDES, *EPD_BEHAVIOURS)),
    *ROUTER,
)
