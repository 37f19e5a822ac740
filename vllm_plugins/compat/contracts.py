"""The table of every upstream symbol that this package subclasses, wraps, calls or reads."""

from __future__ import annotations

from vllm_plugins.compat import behaviours, worker_behaviours
from vllm_plugins.compat.attention_contracts import ATTENTION_CONTRACTS
from vllm_plugins.compat.contract import (
    REST_ANY,
    REST_OPTIONAL,
    Contract,
    behaves,
    has,
    is_class,
    method,
)
from vllm_plugins.compat.disaggregation_contracts import DISAGGREGATION_CONTRACTS
from vllm_plugins.compat.specvlm_contracts import SPECVLM_CONTRACTS
from vllm_plugins.compat.visual_contracts import VISUAL_CONTRACTS
from vllm_plugins.compat.worker_contracts import WORKER_CONTRACTS

ACTIVATION = "activation.py"
HOST = "engine/scheduler_host.py"
REPORTS = "engine/step_reports.py"
METRICS = "metrics.py"
SETTINGS = "settings.py"
DOCTOR = "cli/doctor.py"
VERSIONS = "versions.py"
QUEUE = "engine/waiting_queue.py"

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_QUEUE = "vllm.v1.core.sched.request_queue:RequestQueue"
_OUTPUT = "vllm.v1.core.sched.output"


FLAG = (
    Contract(
        "vllm.engine.arg_utils",
        "module",
        "Looked up among the imported modules: only a process that parses arguments has it.",
    ),
    has(
        "vllm.engine.arg_utils:EngineArgs",
        "scheduler_cls additional_config",
        "A dataclass whose fields are the stock arguments that a plug-in sets.",
        ACTIVATION,
    ),
    method(
        "vllm.engine.arg_utils:EngineArgs.add_cli_args",
        "parser",
        "Wrapped: adds --plugin to every command that takes engine arguments.",
        ACTIVATION,
    ),
    method(
        "vllm.engine.arg_utils:EngineArgs.from_cli_args",
        "args",
        "Wrapped: expands --plugin to stock arguments before they are read.",
        ACTIVATION,
    ),
    method(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        f"{REST_OPTIONAL}",
        "Wrapped: lets the plug-ins that are on refuse the finished configuration.",
        ACTIVATION,
    ),
    behaves(
        "vllm.plugins:load_plugins_by_group",
        behaviours.entry_point_is_loaded,
        "vLLM finds our entry point among its general plug-ins.",
        ACTIVATION,
        DOCTOR,
    ),
    method(
        "vllm.plugins:load_general_plugins",
        "",
        "Called by vLLM before it builds its parser, and in engines and workers.",
        ACTIVATION,
    ),
    behaves(
        "vllm.engine.arg_utils:AsyncEngineArgs.add_cli_args",
        behaviours.server_parser_has_the_flag,
        "The server's own arguments go through the wrapped parser hook.",
        ACTIVATION,
    ),
    method(
        "vllm.entrypoints.cli.main:main",
        "",
        "The stock command, started by `vllm-plugins bench` and by the version matrix.",
    ),
)

CONFIGURATION = (
    is_class("vllm.config:VllmConfig", "What every process receives.",
           "plugin.py"),
    has(
        "vllm.config:VllmConfig",
        "scheduler_config parallel_config model_config device_config additional_config "
        "use_v2_model_runner max_concurrent_batches",
        "Read by plug-ins to fill in defaults and to refuse; carries their options.",
    ),
    behaves(
        "vllm.config:VllmConfig.compute_hash",
        behaviours.options_change_the_hash_only_with_the_graph,
        "The compile-cache key holds the options that change the graph and no others.",
        SETTINGS,
    ),
    behaves(
        "vllm.config:VllmConfig.additional_config",
        behaviours.settings_survive_pickling,
        "Carries all options through the configuration's validation and to spawned processes.",
        SETTINGS,
    ),
    has(
        "vllm.config:SchedulerConfig",
        "async_scheduling policy max_num_batched_tokens max_num_seqs enable_chunked_prefill "
        "long_prefill_token_threshold scheduler_cls",
        "The stock limits that a policy narrows, and what it refuses to run beside.",
        "plugin.py",
    ),
    method(
        "vllm.config:SchedulerConfig.get_scheduler_cls",
        "",
        "Resolves --scheduler-cls.",
        HOST,
    ),
    behaves(
        "vllm.config:SchedulerConfig.get_scheduler_cls",
        behaviours.scheduler_class_may_be_a_function,
        "--scheduler-cls may name a function, which chooses between the two schedulers as vLLM "
        "does when no class is given.",
        HOST,
    ),
    has("vllm.config:ParallelConfig",
         "pipeline_parallel_size tensor_parallel_size data_parallel_index",
         "Labels of metrics, key of cost profiles, micro-batches of a pipeline."),
    has("vllm.config:ModelConfig",
         "dtype hf_config hf_text_config quantization served_model_name runner_type "
         "is_encoder_decoder",
         "Labels of metrics, key of cost profiles, models without decode steps."),
    has("vllm.config:DeviceConfig", "device_type", "Platform-dependent defaults."),
    has("vllm.platforms:current_platform", "device_type get_device_name is_cpu",
         "Refusal of plug-ins that do not run here; key of cost profiles.", kind="object"),
    has("vllm.envs", "VLLM_PLUGINS VLLM_USE_V2_MODEL_RUNNER",
         "Named in refusals and explained by `vllm-plugins doctor`.",
        SETTINGS,
        DOCTOR, kind="object"),
    method("vllm.logger:init_logger", "name",
            "Log lines under vLLM's own root logger, so that its levels apply."),
)  # fmt: skip

SCHEDULER = (
    is_class(_SCHEDULER, "Base of the scheduler host on CPU and of the mixin."),
    is_class("vllm.v1.core.sched.async_scheduler:AsyncScheduler",
           "Base of the scheduler host where steps overlap.", bases=(_SCHEDULER,)),
    behaves("vllm.v1.engine.core:EngineCore.__init__", behaviours.scheduler_is_made_by_keyword,
               "Makes the scheduler with keyword arguments, vllm_config among them.", HOST),
    method(f"{_SCHEDULER}.__init__", f"vllm_config, {REST_ANY}",
            "Extended; everything but the configuration is passed on."),
    method(f"{_SCHEDULER}._try_schedule_encoder_inputs",
           f"request, num_computed_tokens, num_new_tokens, encoder_compute_budget, {REST_OPTIONAL}",
           "Wrapped: no step ends inside a media item where a policy wants them whole."),
    method(f"{_SCHEDULER}.schedule", REST_OPTIONAL,
            "Wrapped: runs under the policies' plan; parameters are passed on."),
    method(f"{_SCHEDULER}.update_from_output", "scheduler_output, model_runner_output",
            "Wrapped: policies learn from a finished step."),
    method(f"{_SCHEDULER}.add_request", "request",
            "Wrapped: policies hear of a request before it is queued."),
    has(_SCHEDULER, "cache_config block_size",
         "Whether a prompt fits into the KV cache beside those that run."),
    has(_SCHEDULER, "connector", "Handed to policies that order by what it has stored."),
    method(f"{_SCHEDULER}.get_kv_cache_usage", "",
            "Whether a prompt fits into the KV cache beside those that run."),
    method(f"{_SCHEDULER}.get_request_counts", "",
            "Number of waiting requests, skipped ones included."),
    has(_SCHEDULER,
         "max_num_scheduled_tokens max_num_running_reqs running waiting policy num_spec_tokens "
         "num_waiting_for_streaming_input vllm_config scheduler_config parallel_config",
         "Set by the stock constructor; the host lowers the limits for the length of one call.",
         VERSIONS),
    behaves(f"{_SCHEDULER}.schedule", behaviours.schedule_reads_the_limits,
               "Reads token budget, running requests and an admission limit from the attributes "
               "that the host sets, in every step.", HOST, VERSIONS),
    is_class(_QUEUE, "Base of a waiting queue with an order of its own."),
    has(_QUEUE,
         "add_request pop_request peek_request prepend_request prepend_requests remove_request "
         "remove_requests __bool__ __len__ __iter__",
         "A new abstract method would stop our queue from being made.", QUEUE,
         kind="abstract methods"),
    *(
        method(f"{_QUEUE}.{name}", parameters, "Overridden; also called on stock queues.", QUEUE)
        for name, parameters in {
            "add_request": "request",
            "pop_request": "",
            "peek_request": "",
            "prepend_request": "request",
            "prepend_requests": "requests",
            "remove_request": "request",
            "remove_requests": "requests",
        }.items()
    ),
)  # fmt: skip

DATA = (
    is_class("vllm.v1.request:Request", "What a scheduler handles."),
    has("vllm.v1.request:Request",
         "request_id is_prefill_chunk num_computed_tokens num_tokens num_tokens_with_spec "
         "num_output_placeholders arrival_time sampling_params resumable",
         "How far a request is, when it came, and what it asked for."),
    has("vllm.sampling_params:SamplingParams", "extra_args",
         "Latency targets of a single request."),
    is_class(f"{_OUTPUT}:SchedulerOutput", "A scheduled step."),
    has(f"{_OUTPUT}:SchedulerOutput",
         "scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens "
         "total_num_scheduled_tokens finished_req_ids",
         "What a step contains, for the cost model and the counters.", HOST),
    has(f"{_OUTPUT}:NewRequestData", "req_id num_computed_tokens",
         "Requests in their first step."),
    has(f"{_OUTPUT}:CachedRequestData", "req_ids resumed_req_ids num_computed_tokens",
         "Requests that come back after preemption are prefills again."),
    is_class("vllm.v1.outputs:ModelRunnerOutput",
             "A step's result, passed on to the stock method.", HOST, REPORTS),
    has("vllm.v1.outputs:EMPTY_MODEL_RUNNER_OUTPUT", "req_ids",
        "The result of steps without requests, which they share.", REPORTS, kind="object"),
    is_class("vllm.v1.outputs:AsyncModelRunnerOutput", "A result on its way to the host.", REPORTS),
    method("vllm.v1.outputs:AsyncModelRunnerOutput.get_output", "",
           "Overridden: reports are read where vLLM waits for a step's tokens.", REPORTS),
    behaves("vllm.v1.outputs:ModelRunnerOutput", worker_behaviours.results_carry_reports,
            "A result keeps an attribute of ours on its way between processes.", REPORTS),
    is_class("vllm.v1.engine:EngineCoreOutputs", "What a finished step gives each client."),
    has("vllm.v1.engine:EngineCoreOutputs", "outputs", "Finished and emitting requests."),
    has("vllm.v1.engine:EngineCoreOutput", "request_id new_token_ids",
         "Which requests got tokens, and when."),
)  # fmt: skip

PROMETHEUS = (
    method("prometheus_client.mmap_dict:mmap_key",
            "metric_name, name, labelnames, labelvalues, help_text",
            "Key of a value in a metric file."),
    is_class("prometheus_client.mmap_dict:MmapedDict", "A metric file."),
    method("prometheus_client.mmap_dict:MmapedDict.read_value", "key", "Reads a value."),
    method("prometheus_client.mmap_dict:MmapedDict.write_value", "key, value, timestamp",
            "Writes a value; the timestamp decides which of several gauges is shown.", METRICS),
    method("prometheus_client.multiprocess:MultiProcessCollector",
            f"registry, path, {REST_OPTIONAL}",
            "Shows metric files in a registry; None registers it with none."),
    has("prometheus_client:REGISTRY", "register unregister",
         "The registry of the server's /metrics.", kind="object"),
    behaves("prometheus_client.multiprocess:MultiProcessCollector.collect",
               behaviours.metric_files_are_read,
               "Shows counters, gauges and histograms that an engine writes into its files.",
               METRICS),
    behaves("vllm.v1.metrics.prometheus:get_prometheus_registry",
               behaviours.collector_survives_vllm,
               "Without several API servers /metrics shows the default registry, and "
               "unregister_vllm_metrics, which vLLM calls at start, leaves our collector in it.",
               METRICS),
)  # fmt: skip

SIMULATOR = (
    is_class("vllm.sampling_params:SamplingParams", "Made for simulated requests."),
    method("vllm.utils.hashing:get_hash_fn_by_name", "hash_fn_name", "Prefix caching as served."),
    method("vllm.v1.core.kv_cache_utils:get_request_block_hasher",
            f"hash_block_size, caching_hash_fn, {REST_OPTIONAL}", "Prefix caching as served."),
    method("vllm.v1.core.kv_cache_utils:init_none_hash", "hash_fn", "Prefix caching as served."),
    method("vllm.v1.core.kv_cache_utils:resolve_kv_cache_block_sizes",
            f"kv_cache_config, vllm_config, {REST_OPTIONAL}", "Arguments of the scheduler."),
    is_class("vllm.v1.engine:EngineCoreRequest", "A request as it reaches the engine."),
    is_class("vllm.v1.kv_cache_interface:FullAttentionSpec", "A KV cache without memory."),
    is_class("vllm.v1.kv_cache_interface:KVCacheConfig", "A KV cache without memory."),
    is_class("vllm.v1.kv_cache_interface:KVCacheGroupSpec", "A KV cache without memory."),
    is_class("vllm.v1.structured_output:StructuredOutputManager", "Argument of the scheduler."),
    is_class("vllm.v1.request:RequestStatus", "Aborts."),
    has("vllm.v1.request:RequestStatus", "FINISHED_ABORTED", "Aborts of simulated clients."),
    has("vllm.v1.request:Request", "num_prompt_tokens prompt_token_ids from_engine_core_request",
         "What a simulated step computes."),
    has("vllm.config:VllmConfig", "cache_config", "Whether prefixes are cached."),
    has("vllm.config:CacheConfig", "enable_prefix_caching prefix_caching_hash_algo block_size",
         "Prefix caching as served."),
    has(_SCHEDULER, "requests kv_cache_manager use_v2_model_runner",
         "State that the simulator looks at, and the runner that it pretends."),
    method(f"{_SCHEDULER}.has_requests", "", "Whether there is a step to do."),
    method(f"{_SCHEDULER}.finish_requests", f"request_ids, finished_status, {REST_OPTIONAL}",
            "Aborts."),
)  # fmt: skip

PROFILER = (
    is_class("vllm:SamplingParams", "Made for the requests of a measurement."),
    is_class("vllm.utils.argparse_utils:FlexibleArgumentParser", "Reads `vllm serve` arguments."),
    is_class("vllm.v1.engine.llm_engine:LLMEngine", "The engine that is measured."),
    has("vllm.v1.engine.llm_engine:LLMEngine", "engine_core vllm_config from_engine_args",
         "Reaches the live scheduler of an engine in this process."),
    method("vllm.v1.engine.llm_engine:LLMEngine.add_request",
            f"request_id, prompt, params, {REST_OPTIONAL}", "Fills the steps that are measured."),
    method("vllm.v1.engine.llm_engine:LLMEngine.abort_request",
            f"request_ids, {REST_OPTIONAL}", "Ends a phase."),
    method("vllm.v1.engine.llm_engine:LLMEngine.has_unfinished_requests", "", "Ends a phase."),
    method("vllm.v1.engine.llm_engine:LLMEngine.step", "", "Runs one step."),
    has("vllm.config:ModelConfig", "get_vocab_size max_model_len", "Random prompts."),
    has("vllm.config:CacheConfig", "num_gpu_blocks", "Set for a simulated cache."),
)  # fmt: skip

CONTRACTS: tuple[Contract, ...] = (
    *FLAG,
    *CONFIGURATION,
    *SCHEDULER,
    *DATA,
    *PROMETHEUS,
    *SIMULATOR,
    *PROFILER,
    *WORKER_CONTRACTS,
    *ATTENTION_CONTRACTS,
    *DISAGGREGATION_CONTRACTS,
    *VISUAL_CONTRACTS,
    *SPECVLM_CONTRACTS,
)
