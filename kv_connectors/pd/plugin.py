"""Declaration of the pd plug-in."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from vllm_plugins.errors import PluginError
from vllm_plugins.plugin import Options, Paper, Requirements, SchedulerPlugin
from vllm_plugins.wire.address import is_loopback
from vllm_plugins.wire.options import ListenerOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_plugins.arguments import EngineArguments
    from vllm_plugins.engine.policy import SchedulerPolicy
    from vllm_plugins.kv_connectors.pd.reference import Reference
    from vllm_plugins.wire.address import Address

ROLES = {"prefill": "kv_producer", "decode": "kv_consumer", "both": "kv_both"}
HEARTBEATS_PER_LEASE = 6
NIXL_OPTIONS = frozenset(
    {"role", "transport", "waiting_block_prop_threshold", "saturating_tokens", "on_failure"}
)
# Class and module.
CONNECTOR = ("PdConnector", "connector")
WILDCARDS = frozenset({"0.0.0.0", "::", ""})


class PdOptions(ListenerOptions):
    """Options of prefill/decode disaggregation."""

    meanings: ClassVar[dict[str, str]] = {
        "bind_host": "prefill: address on which KV is served.",
        "port": "prefill: port of the first worker, the others take the following; 0 lets the "
        "system choose.",
        "advertise_host": "prefill: address under which others reach bind_host, by default "
        "bind_host.",
        "allow_remote": "Whether KV may leave this host: prefill serves on other than loopback "
        "addresses, decode pulls from them.",
        "secret_file": "File with the secret of at least 32 bytes that all instances share; by "
        "default one of this user on this host.",
    }

    role: Literal["prefill", "decode", "both"] = Field(
        description="What this instance does: prefill computes prompts and keeps their KV for "
        "others to pull, decode pulls it and generates, both does either as each request says."
    )
    transport: Literal["auto", "shm", "tcp", "cuda_ipc", "nixl"] = Field(
        "auto",
        description="How KV moves: auto copies between the devices of one host where CUDA IPC "
        "can, and otherwise goes through shared memory there, and TCP between hosts; shm, tcp and "
        "cuda_ipc allow only the one; nixl is vLLM's NixlConnector, by RDMA, of which "
        "only waiting_block_prop_threshold, saturating_tokens and on_failure are options here.",
    )
    waiting_block_prop_threshold: float = Field(
        0.05,
        gt=0,
        le=1,
        description="decode: no further prompt is pulled while those that do not run yet hold "
        "this share of all blocks.",
    )
    min_pull_tokens: int = Field(
        64, ge=0, description="decode: fewer tokens than these are computed here, not pulled."
    )
    max_held_fraction: float = Field(
        0.8,
        gt=0,
        le=1,
        description="prefill: share of all blocks that prompts may take, from their start until "
        "they are pulled; others wait, in order.",
    )
    saturating_tokens: int | None = Field(
        None,
        ge=1,
        description="prefill: L_m, the prompt tokens that keep the device busy, as "
        "`vllm-plugins profile` prints them; prompts then run whole, in batches of at most so "
        "many tokens. By default vLLM's own chunked prefill.",
    )
    lease_s: float = Field(
        30.0,
        gt=0,
        description="prefill: blocks that nobody pulls, and whose lease nobody renews for so "
        "long, are freed; nor may a pull take longer once the prompt is computed, in s.",
    )
    heartbeat_s: float | None = Field(
        None,
        gt=0,
        description="decode: time between renewals of queued prompts' leases, in s; by default a "
        "sixth of lease_s.",
    )
    stream_layers: bool = Field(
        False,
        description="prefill: layers may leave while the prompt is still being computed, where "
        "the router asks for it; CUDA graphs are then piecewise.",
    )
    on_failure: Literal["recompute", "fail"] = Field(
        "recompute",
        description="decode: whether a prompt whose KV cannot be pulled is computed here, or its "
        "request fails.",
    )
    connect_timeout_s: float = Field(3.0, gt=0, description="Time for connecting, in s.")
    read_timeout_s: float = Field(
        20.0, gt=0, description="Time in which the other side must take or send a message, in s."
    )
    advertise_host: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> PdOptions:
        if self.heartbeat_s is not None and self.heartbeat_s >= self.lease_s / 2:
            raise ValueError(
                f"heartbeat_s={self.heartbeat_s:g} must be below half of "
                f"lease_s={self.lease_s:g}, or one late renewal loses the lease"
            )
        self.check_reach("bind_host", "advertise_host")
        if self.bind_host in WILDCARDS and self.advertise_host is None:
            raise ValueError(
                f"bind_host={self.bind_host} is no address to connect to; set advertise_host"
            )
        if self.allow_remote and self.transport in ("shm", "cuda_ipc"):
            raise ValueError(
                f"transport={self.transport} does not reach other hosts, and allow_remote=true"
            )
        if self.transport == "nixl":
            for name in type(self).model_fields.keys() - NIXL_OPTIONS:
                # Options travel with all their values: a default spelt out is no contradiction.
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} has no meaning with transport=nixl")
        return self

    @property
    def heartbeat(self) -> float:
        """Time between renewals, in s."""
        return self.heartbeat_s or self.lease_s / HEARTBEATS_PER_LEASE

    def announced(self, address: Address) -> Address:
        """Return the address that others are told."""
        return replace(address, host=self.advertise_host or self.bind_host)

    def check_peers(self, reference: Reference) -> None:
        """Refuse to connect where the operator did not say that one may.

        Raises:
            BadReferenceError: A peer is on another host, and ``allow_remote`` is off.
        """
        from vllm_plugins.kv_connectors.pd.reference import BadReferenceError

        if not self.allow_remote:
            for peer in reference.peers:
                if not is_loopback(peer.address.host):
                    raise BadReferenceError(f"{peer.address} is remote; set allow_remote=true")


class PdPlugin(SchedulerPlugin):
    """Prefill on some instances, decode on others."""

    name = "pd"
    family = "kv connector"
    summary = "Prefills on some instances and decodes on others, which pull the KV when they can."
    papers = (
        Paper(
            "DistServe: Disaggregating Prefill and Decoding for Goodput-optimized Large Language "
            "Model Serving",
            "2401.09670",
        ),
    )
    exactness = "exact"
    requires = Requirements(
        vllm=">=0.31", platforms=frozenset({"cpu", "cuda"}), runners=frozenset({"V1", "V2"})
    )
    conflicts: ClassVar[dict[str, str]] = {
        "hip": "KV that its sparse layers computed would be taken for a dense instance's",
        "kvshare": "both are KV connectors",
        "zipcache": "its packed pages go with state of its own that is not handed over",
    }
    Options: ClassVar[type[Options]] = PdOptions

    def enter_process(self, options: PdOptions) -> None:
        """Let models whose heads are rotated apart, LFM2's, be computed rightly on CPU."""
        from vllm_plugins.engine.rotary_heads import repair_rotary_embedding

        repair_rotary_embedding()

    def configure(self, options: PdOptions, arguments: EngineArguments) -> None:
        """Choose the connector and, where it forms batches, the scheduler host."""
        if options.saturating_tokens is not None:
            super().configure(options, arguments)
        name, module = ("PdNixlConnector", "nixl") if options.transport == "nixl" else CONNECTOR
        if options.transport == "nixl" and find_spec("nixl") is None:
            raise PluginError(
                "--plugin pd: transport=nixl", "the package nixl is missing", "pip install nixl"
            )
        wanted: dict[str, Any] = {
            "kv_connector": name,
            "kv_connector_module_path": f"vllm_plugins.kv_connectors.pd.{module}",
            "kv_role": ROLES[options.role],
            "kv_load_failure_policy": options.on_failure,
            "kv_connector_extra_config": {"stream_layers": options.stream_layers},
        }
        theirs = arguments.get("kv_transfer_config")
        if theirs is None:
            arguments.set("kv_transfer_config", wanted)
        elif any(getattr(theirs, name, None) != value for name, value in wanted.items()):
            raise PluginError(
                "--plugin pd",
                "is a KV connector, and --kv-transfer-config names another",
                "drop one of the two",
            )

    def check(self, options: PdOptions, config: VllmConfig) -> None:
        """Refuse models and settings under which blocks cannot be handed over."""
        most = config.scheduler_config.max_num_batched_tokens
        if options.saturating_tokens is not None and options.saturating_tokens > most:
            raise PluginError(
                f"--plugin pd: saturating_tokens={options.saturating_tokens}",
                f"exceeds --max-num-batched-tokens, {most}, so that prompts would not run whole",
                "lower it or raise --max-num-batched-tokens",
            )
        device = config.device_config.device_type
        if options.transport == "cuda_ipc" and device != "cuda":
            raise PluginError(
                "--plugin pd: transport=cuda_ipc",
                f"maps KV caches of CUDA devices, and this is {device}",
                "use transport=auto",
            )
        for flag, reason, mend in (*_unsupported(config), *_unsupported_states(options, config)):
            raise PluginError(f"--plugin pd with {flag}", reason, mend)

    def policy(self, options: PdOptions, config: VllmConfig) -> SchedulerPolicy:
        """Make the policy of one engine; it does nothing where batches are vLLM's own."""
        from vllm_plugins.engine.policy import SchedulerPolicy
        from vllm_plugins.kv_connectors.pd.prefill_batch import PrefillBatchPolicy

        if options.saturating_tokens is None:
            return SchedulerPolicy()
        return PrefillBatchPolicy(options.saturating_tokens)


def _unsupported(config: VllmConfig) -> list[tuple[str, str, str]]:
    parallel = config.parallel_config
    found = []
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        found.append(
            (
                "context parallelism",
                "a block's tokens are spread over ranks",
                "drop --decode-context-parallel-size and --prefill-context-parallel-size",
            )
        )
    return found


def _unsupported_states(options: PdOptions, config: VllmConfig) -> list[tuple[str, str, str]]:
    """Return what stands against handing a model's recurrent states over."""
    model = config.model_config
    found = []
    if model.is_attention_free:
        found.append(
            (
                f"--model {model.model}",
                "a model without attention has no KV to hand over",
                "use a model with attention layers",
            )
        )
    if model.is_hybrid and config.speculative_config is not None:
        found.append(
            (
                "--speculative-config",
                f"recurrent states of {model.model} are handed over without those of drafts",
                "drop --speculative-config",
            )
        )
    if model.is_hybrid and options.transport == "nixl":
        found.append(
            (
                "transport=nixl",
                f"NixlConnector does not hand the recurrent states of {model.model} over exactly "
                "in every mode of the router",
                "use another transport",
            )
        )
    return found
