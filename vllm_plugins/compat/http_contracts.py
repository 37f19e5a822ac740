"""Rows of the table that KVShare's part in the HTTP server relies on, and its tiers."""

from __future__ import annotations

from vllm_plugins.compat.contract import REST_OPTIONAL, has, is_class, method

FRONT_DOOR = "kv_connectors/kvshare/front_door.py"
OPERATOR_API = "kv_connectors/kvshare/operator_api.py"
_CLIENT = "vllm.engine.protocol:EngineClient"
_RENDERER = "vllm.renderers.base:BaseRenderer"
_ENDPOINTS = "vllm.plugins.endpoint_plugins.interface"

HTTP_SIDE = (
    method("vllm.entrypoints.serve.middleware.register:init_entrypoints_middleware",
           f"args, app, supported_tasks, {REST_OPTIONAL}",
           "Loads --middleware by name, outside the check of API keys.", FRONT_DOOR),
    has("vllm.entrypoints.serve.middleware.authenticate", "GUARDED_PREFIX",
        "The paths that the front door covers at least.", FRONT_DOOR, kind="object"),
    method("vllm.entrypoints.generate.base.protocol:validate_cache_salt", "cache_salt",
           "What a signed salt has to be.", "kv_connectors/kvshare/tenancy.py"),
    is_class(_CLIENT, "How every endpoint reaches the engine."),
    method(f"{_CLIENT}.generate",
           "prompt, sampling_params, request_id, prompt_text, lora_request, tokenization_kwargs, "
           f"trace_headers, priority, data_parallel_rank, {REST_OPTIONAL}",
           "Orders travel with requests, to each rank.", OPERATOR_API),
    method(f"{_RENDERER}.tokenize_prompt_async", "prompt, params",
           "Tokenises a text to register as vLLM does a prompt.", OPERATOR_API),
    method(f"{_RENDERER}.get_bos_token_id", "", "The default context of a registered text.",
           OPERATOR_API),
    is_class("vllm.renderers.params:TokenizeParams", "Bounds on a text to register."),
    has("vllm.renderers.params:TokenizeParams",
        "max_total_tokens max_output_tokens add_special_tokens", "Bounds on a text to register.",
        OPERATOR_API),
    method("vllm.inputs.engine:tokens_input", f"prompt_token_ids, {REST_OPTIONAL}",
           "The prompt of a request that carries an order."),
    is_class("vllm.sampling_params:RequestOutputKind", "An order's answer is the last output."),
    has("vllm.sampling_params:RequestOutputKind", "FINAL_ONLY",
        "An order's answer is the last output.", kind="object"),
    has("vllm.outputs:RequestOutput", "kv_transfer_params", "Carries an order's answer.",
        OPERATOR_API),
    method("vllm.entrypoints.serve.utils.api_utils:validate_json_request", "raw_request",
           "Refuses what is not JSON, as at every endpoint."),
    has("vllm.config:ParallelConfig",
        "data_parallel_size data_parallel_size_local local_engines_only",
        "The ranks that an order goes to."),
    has(f"{_ENDPOINTS}:EndpointPlugin", "attach_router init_state",
        "vLLM finds the operator's endpoints by this protocol.", OPERATOR_API),
)  # fmt: skip

DEVICE_TIER = "kv_connectors/kvshare/device_tier.py"

TIERS = (
    method("vllm.config:ModelConfig.get_num_layers", "parallel_config",
           "Size of the device tier, before there is a KV cache.", DEVICE_TIER),
    method("vllm.config:ModelConfig.get_num_kv_heads", f"parallel_config, {REST_OPTIONAL}",
           "Size of the device tier, before there is a KV cache.", DEVICE_TIER),
    method("vllm.config:ModelConfig.get_head_size", REST_OPTIONAL,
           "Size of the device tier, before there is a KV cache.", DEVICE_TIER),
    has("vllm.config:ModelConfig", "model revision", "What stored KV depends on."),
    has("vllm.config:VllmConfig", "load_config", "What stored KV depends on."),
    method("vllm.distributed:get_tp_group", "", "Ranks agree on what all of them can load."),
    has("vllm.distributed.parallel_state:GroupCoordinator", "world_size rank_in_group cpu_group",
        "Ranks agree on what all of them can load.", "kv_connectors/kvshare/worker_side.py"),
    has("vllm.v1.request:RequestStatus", "FINISHED_STOPPED FINISHED_LENGTH_CAPPED",
        "An order is carried out where its answer reaches somebody.", kind="object"),
)  # fmt: skip
