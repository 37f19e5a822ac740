"""Declaration of the KVShare plug-in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from vllm_plugins.errors import PluginError
from vllm_plugins.plugin import Options, Paper, Requirements, SchedulerPlugin, WorkerPlugin

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_plugins.arguments import EngineArguments
    from vllm_plugins.engine.policy import SchedulerPolicy
    from vllm_plugins.kv_connectors.kvshare.worker_side import KVShareListener

# As `--kv-transfer-config` takes it. Plain values, since a declaration does not import vLLM.
TRANSFER = {
    "kv_connector": "KVShareConnector",
    "kv_connector_module_path": "vllm_plugins.kv_connectors.kvshare.connector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}
FRONT_DOOR = "vllm_plugins.kv_connectors.kvshare.front_door.TenantFrontDoor"


class KVShareOptions(Options):
    """Options of KVShare."""

    mode: Literal["blend", "exact_only"] = Field(
        "blend",
        description="blend reuses any equal text and recomputes part of it; exact_only reuses only "
        "KV whose whole left context is identical, as a second tier of the prefix cache.",
    )
    selector: Literal["dhd", "cacheblend", "epic", "random", "none"] = Field(
        "dhd",
        description="Rule that chooses the reused tokens to recompute: dhd is KVShare's, "
        "cacheblend and epic are those methods', random and none are for comparison.",
    )
    sharing_scope: Literal["request_salt", "tenant", "public_canonical"] = Field(
        "request_salt",
        description="Whose KV a request may use. request_salt: that of requests with the same "
        "cache_salt, which a gateway sets; tenant: that of its tenant, whom the server itself "
        "tells by API key or by tenant_header; public_canonical: that and what the operator has "
        "registered for all.",
    )
    tenant_secret_file: Path | None = Field(
        None,
        description="File with a secret of at least 32 bytes, from which the tenants' domains "
        "follow.",
    )
    tenant_header: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9-]{1,64}$",
        description="HTTP header that names the tenant, which a gateway in front sets; by default "
        "the tenant is the API key.",
    )
    operator_key_file: Path | None = Field(
        None,
        description="File with the key, of at least 32 bytes, by which the operator may look at, "
        "register and evict what is stored.",
    )
    min_run: int = Field(32, ge=16, le=4096, description="Shortest text that is reused, in tokens.")
    min_reuse: int = Field(
        64, ge=1, description="Least tokens that a request must reuse, or it is left alone."
    )
    chunk_min: int = Field(64, ge=16, description="Shortest stored segment, in tokens.")
    chunk_max: int = Field(512, ge=16, description="Longest stored segment, in tokens.")
    check_layer: int = Field(
        1,
        ge=0,
        description="Layer whose keys and values are computed for every token, with all layers "
        "before it; deviation is measured there. In layer 0 values do not depend on the context "
        "yet, so nothing deviates.",
    )
    recompute_min: float = Field(
        0.05, ge=0, le=1, description="Least share of the reused tokens that is recomputed."
    )
    recompute_max: float = Field(
        0.15,
        ge=0,
        le=1,
        description="Largest share of the reused tokens that is recomputed; what stands between "
        "two of them comes on top where that is cheaper than a pass more.",
    )
    link_tokens: int = Field(
        16,
        ge=0,
        le=256,
        description="Tokens at the start of a reused text that dhd considers from skip_eps on, and "
        "that epic recomputes.",
    )
    skip_eps: float = Field(
        1e-3,
        gt=0,
        description="Squared deviation of a token, over the values' mean squared norm, below "
        "which dhd takes its KV for as good as new.",
    )
    theta: float = Field(
        2.0, gt=0, description="A token deviates highly from this many medians of deviation on."
    )
    decode_interval: int = Field(
        16,
        ge=0,
        description="Generated tokens after which the reused tokens that decoding looks at are "
        "computed again; 0 never does.",
    )
    decode_k: int = Field(
        32,
        ge=1,
        le=512,
        description="Most tokens of a request that are computed again at one such time, and never "
        "more than fix_tokens_per_step.",
    )
    decode_budget: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Largest share of the reused tokens that is computed again while decoding.",
    )
    fix_tokens_per_step: int | None = Field(
        None,
        ge=1,
        description="Tokens through all layers that blending, and computing again for requests "
        "that decode (half of it at most), may cost between two steps, so that other requests' "
        "decodes go on. By default 2048, or --max-num-batched-tokens if that is smaller.",
    )
    order: Literal["arrival", "hit_rate"] = Field(
        "arrival",
        description="Order of waiting requests: arrival leaves vLLM's own; hit_rate admits first "
        "who has most of the prompt stored, or with spf who has least left to compute.",
    )
    full_hit_ms: float = Field(
        5000.0,
        gt=0,
        description="With order=hit_rate and without spf, time of waiting that weighs as much as a "
        "whole prompt in the store, in ms.",
    )
    max_bypass: int = Field(
        8,
        ge=0,
        description="With order=hit_rate, no request is overtaken by later ones of its domain more "
        "often.",
    )
    host_gib: float = Field(
        4.0, gt=0, description="Host memory for stored KV in each worker, in GiB."
    )
    disk_path: Path | None = Field(
        None,
        description="Folder in which stored KV is kept on disk, also beyond the server's life; "
        "host memory is then a cache of it. By default nothing is written to disk.",
    )
    disk_gib: float = Field(
        16.0, gt=0, description="With disk_path, disk space for stored KV of each worker, in GiB."
    )
    device_gib: float = Field(
        0.0,
        ge=0,
        description="Device memory in each worker for stored KV that is used again and again, in "
        "GiB, taken from what vLLM would use for its KV cache.",
    )
    max_generation: int = Field(
        1,
        ge=0,
        description="KV that was computed beside reused KV is stored and reused itself up to this "
        "depth; 0 stores only what a full prefill computed.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> KVShareOptions:
        for low, high in (("chunk_min", "chunk_max"), ("recompute_min", "recompute_max")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low}={getattr(self, low)} exceeds {high}={getattr(self, high)}")
        if self.min_run > self.chunk_max:
            raise ValueError(f"min_run={self.min_run} exceeds chunk_max={self.chunk_max}")
        if self.link_tokens > self.min_run:
            raise ValueError(f"link_tokens={self.link_tokens} exceeds min_run={self.min_run}")
        _check_scope(self)
        _check_tiers(self)
        if self.mode == "exact_only":
            for name in ("selector", "recompute_min", "recompute_max", "decode_interval"):
                # Options travel with all their values: a default spelt out is no contradiction.
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"mode=exact_only recomputes nothing, so {name} has no meaning"
                    )
        return self


DEFAULT_FIX_TOKENS = 2048


def resolved(options: KVShareOptions, config: VllmConfig) -> KVShareOptions:
    """Return the options with those defaults filled in that follow from the engine's."""
    if options.fix_tokens_per_step is not None:
        return options
    most = min(DEFAULT_FIX_TOKENS, config.scheduler_config.max_num_batched_tokens)
    return options.model_copy(update={"fix_tokens_per_step": most})


class KVSharePlugin(SchedulerPlugin, WorkerPlugin):
    """Reuse of KV across requests, in the middle of prompts."""

    name = "kvshare"
    family = "kv connector"
    summary = "Reuses KV of equal text anywhere in a prompt, and recomputes what deviates most."
    papers = (
        Paper(
            "KVShare: An LLM Service System with Efficient and Effective Multi-Tenant KV Cache "
            "Reuse",
            "2503.16525",
        ),
    )
    exactness = (
        "approximate by recompute_max; exact with recompute_min=1,recompute_max=1 or "
        "mode=exact_only"
    )
    requires = Requirements(
        vllm=">=0.31", platforms=frozenset({"cpu", "cuda"}), runners=frozenset({"V1", "V2"})
    )
    Options: ClassVar[type[Options]] = KVShareOptions
    # It knows how much of a prompt reuse leaves to compute.
    refines_order_of = frozenset({"spf"})

    def configure(self, options: KVShareOptions, arguments: EngineArguments) -> None:
        """Choose the worker host, the connector and, where it orders, the scheduler host."""
        WorkerPlugin.configure(self, options, arguments)
        if options.sharing_scope != "request_salt":
            _open_front_door(options, arguments)
        if self.orders_waiting(options):
            SchedulerPlugin.configure(self, options, arguments)
        theirs = arguments.get("kv_transfer_config")
        if theirs is None:
            arguments.set("kv_transfer_config", dict(TRANSFER))
        elif any(getattr(theirs, name, None) != value for name, value in TRANSFER.items()):
            raise PluginError(
                "--plugin kvshare",
                "is a KV connector, and --kv-transfer-config names another",
                "drop one of the two",
            )

    def check(self, options: KVShareOptions, config: VllmConfig) -> None:
        """Refuse models and settings under which KV cannot be moved or recomputed."""
        from vllm_plugins.engine.partial_forward import check_architecture
        from vllm_plugins.kv_connectors.kvshare.refusals import unsupported

        check_architecture("--plugin kvshare", config.model_config.architectures)
        _check_files(options)
        if options.device_gib and config.device_config.device_type == "cpu":
            raise PluginError(
                f"--plugin kvshare: device_gib={options.device_gib:g}",
                "there is no device memory apart from the host's",
                "drop it and raise host_gib",
            )
        most = config.scheduler_config.max_num_batched_tokens
        if options.fix_tokens_per_step is not None and options.fix_tokens_per_step > most:
            raise PluginError(
                f"--plugin kvshare: fix_tokens_per_step={options.fix_tokens_per_step}",
                f"exceeds --max-num-batched-tokens, {most}, so that a step would be longer than "
                "any other",
                "lower it or raise --max-num-batched-tokens",
            )
        layers = config.model_config.get_total_num_hidden_layers()
        if options.check_layer > layers - 2:
            raise PluginError(
                f"--plugin kvshare: check_layer={options.check_layer}",
                f"leaves no layer to save work in; the model has {layers}",
                f"choose at most {layers - 2}",
            )
        for flag, reason, mend in unsupported(options, config):
            raise PluginError(f"--plugin kvshare with {flag}", reason, mend)

    def orders_waiting(self, options: KVShareOptions) -> bool:
        """Only by hit rate."""
        return options.order == "hit_rate"

    def policy(self, options: KVShareOptions, config: VllmConfig) -> SchedulerPolicy:
        """Make the policy of one engine; it does nothing where the order is vLLM's own."""
        from vllm_plugins.engine.policy import SchedulerPolicy
        from vllm_plugins.kv_connectors.kvshare.hit_rate_order import HitRatePolicy

        if not self.orders_waiting(options):
            return SchedulerPolicy()
        return HitRatePolicy(options.full_hit_ms / 1000, options.max_bypass)

    def listener(self, options: KVShareOptions, config: VllmConfig) -> KVShareListener:
        """Make the part of one worker."""
        from vllm_plugins.kv_connectors.kvshare.device_tier import ArenaSize
        from vllm_plugins.kv_connectors.kvshare.worker_side import KVShareListener

        arena = ArenaSize.of(config, options.device_gib) if options.device_gib else None
        return KVShareListener(arena)


def _check_scope(options: KVShareOptions) -> None:
    """Refuse options of a scope that is not chosen, and a scope without what it needs."""
    scope = options.sharing_scope
    if scope != "request_salt" and options.tenant_secret_file is None:
        raise ValueError(f"sharing_scope={scope} needs tenant_secret_file")
    if scope == "public_canonical" and options.operator_key_file is None:
        raise ValueError("sharing_scope=public_canonical needs operator_key_file")
    for name in ("tenant_secret_file", "tenant_header"):
        if scope == "request_salt" and getattr(options, name) is not None:
            raise ValueError(f"{name} has no meaning with sharing_scope=request_salt")


def _check_tiers(options: KVShareOptions) -> None:
    """Refuse a tier that is smaller than its cache, and a size without its tier."""
    default = KVShareOptions.model_fields["disk_gib"].default
    if options.disk_path is None and options.disk_gib != default:
        raise ValueError("disk_gib has no meaning without disk_path")
    if options.disk_path is not None and options.disk_gib < options.host_gib:
        raise ValueError(
            f"disk_gib={options.disk_gib:g} is below host_gib={options.host_gib:g}, which is a "
            "cache of it"
        )
    if options.device_gib > options.host_gib:
        raise ValueError(
            f"device_gib={options.device_gib:g} exceeds host_gib={options.host_gib:g}, of which it "
            "is a cache"
        )


def _open_front_door(options: KVShareOptions, arguments: EngineArguments) -> None:
    """Let the server tell its requests' tenants.

    Raises:
        PluginError: Nobody vouches for the tenants' names.
    """
    arguments.add_middleware(FRONT_DOOR)
    # As vLLM reads them: an empty key is none, and hides the environment's.
    keys = [k for k in arguments.get("api_key") or [os.environ.get("VLLM_API_KEY")] if k]
    if arguments.is_http_server and options.tenant_header is None and not keys:
        raise PluginError(
            f"--plugin kvshare: sharing_scope={options.sharing_scope}",
            "tells tenants by their API keys, and the server checks none",
            "set --api-key, or tenant_header behind a gateway that sets it",
        )


def _check_files(options: KVShareOptions) -> None:
    """Refuse secrets and folders that cannot be used, before the engine starts."""
    from vllm_plugins.kv_connectors.kvshare.disk import private_folder
    from vllm_plugins.kv_connectors.kvshare.tenancy import read_key

    if options.disk_path is not None:
        private_folder(options.disk_path)
    for name in ("tenant_secret_file", "operator_key_file"):
        path = getattr(options, name)
        if path is not None:
            read_key(f"--plugin kvshare: {name}", path)
