"""Declaration of the EPD plug-in."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from vllm_plugins.errors import PluginError
from vllm_plugins.plugin import Options, Paper, Requirements, SchedulerPlugin
from vllm_plugins.wire.options import ListenerOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_plugins.arguments import EngineArguments
    from vllm_plugins.engine.policy import SchedulerPolicy

ROLES = {"encode": "ec_producer", "prefill": "ec_consumer", "colocated": "ec_both"}
CONNECTOR = "EpdConnector"
MODULE = "vllm_plugins.kv_connectors.epd.connector"
MANAGER = "vllm_plugins.kv_connectors.epd.early_prefill.EpdEncoderCacheManager"


class EpdOptions(ListenerOptions):
    """Options of EPD."""

    meanings: ClassVar[dict[str, str]] = {
        "bind_host": "IP address that an encode server listens on and tells others.",
        "port": "TCP port that it listens on; 0 takes a free one.",
        "allow_remote": "Whether embeddings may travel between hosts: bind_host may be other than "
        "loopback, and a prefill server connects to other than loopback.",
        "secret_file": "File with the secret, of at least 32 bytes, that servers prove to each "
        "other; by default one of the user's own on this host.",
    }

    role: Literal["encode", "prefill", "colocated"] = Field(
        description="What this server does: encode images (or other media) and nothing else; "
        "prefill (and decode) with embeddings from elsewhere; or colocated, both, so that a "
        "router can change its role while it runs."
    )
    arena_bytes: int = Field(
        2 << 30, ge=1, description="Host memory for embeddings, in bytes, taken as it is used."
    )
    tokens_per_block: int = Field(
        64, ge=1, le=1 << 16, description="Embeddings in one block of that memory."
    )
    lease_s: float = Field(
        30.0,
        gt=0,
        description="Time for which an encode server keeps the items of a request after its "
        "answer, in seconds.",
    )
    fetch_timeout_s: float = Field(
        20.0, gt=0, description="Longest time that fetching one item may take, in seconds."
    )
    on_missing: Literal["fail", "encode_local"] = Field(
        "fail",
        description="What becomes of a request whose item cannot be had: fail fails it; "
        "encode_local encodes the item here if the request brought its pixels.",
    )
    early_prefill: bool = Field(
        True, description="Compute the text before an item while the item is on its way."
    )

    @model_validator(mode="after")
    def _consistent(self) -> EpdOptions:
        if self.fetch_timeout_s >= self.lease_s:
            raise ValueError(
                f"fetch_timeout_s={self.fetch_timeout_s:g} must be below "
                f"lease_s={self.lease_s:g}: an item may be gone before it is given up"
            )
        if self.role == "encode" and self.on_missing == "encode_local":
            raise ValueError("on_missing=encode_local has no meaning with role=encode")
        _check_bind_host(self)
        return self


def _check_bind_host(options: EpdOptions) -> None:
    try:
        address = ipaddress.ip_address(options.bind_host)
    except ValueError as error:
        raise ValueError(f"bind_host={options.bind_host} is not an IP address") from error
    if address.is_unspecified:
        raise ValueError(
            f"bind_host={options.bind_host} is no address that others can connect to: name the "
            "one of the network they are in"
        )
    options.check_reach("bind_host")


class EpdPlugin(SchedulerPlugin):
    """Encoding of media on servers of its own."""

    name = "epd"
    family = "kv connector"
    summary = "Encodes images on servers of their own and prefills the text before they arrive."
    papers = (
        Paper("Efficiently Serving Large Multimodal Models Using EPD Disaggregation", "2501.05460"),
    )
    exactness = "exact"
    requires = Requirements(
        vllm=">=0.32", platforms=frozenset({"cpu", "cuda"}), runners=frozenset({"V1", "V2"})
    )
    conflicts: ClassVar[dict[str, str]] = {
        "kvshare": "what it reuses ends where the first image begins; it was never run with epd"
    }
    Options: ClassVar[type[Options]] = EpdOptions

    def configure(self, options: EpdOptions, arguments: EngineArguments) -> None:
        """Choose the connector, the encoder cache manager and, where it helps, the scheduler host.

        The host tells of a request as soon as it arrives; vLLM's own scheduler asks for one only
        once there is a slot for it.
        """
        if options.role != "encode":
            SchedulerPlugin.configure(self, options, arguments)
        connector = {
            "ec_connector": CONNECTOR,
            "ec_connector_module_path": MODULE,
            "ec_role": ROLES[options.role],
        }
        theirs = arguments.get("ec_transfer_config")
        if theirs is None:
            arguments.set("ec_transfer_config", connector)
        elif any(getattr(theirs, name, None) != value for name, value in connector.items()):
            raise PluginError(
                "--plugin epd",
                "is an EC connector, and --ec-transfer-config names another",
                "drop one of the two",
            )
        manager = getattr(arguments.get("ec_manager_config"), "encoder_cache_manager_cls", None)
        if manager is None:
            arguments.set("ec_manager_config", {"encoder_cache_manager_cls": MANAGER})
        elif manager != MANAGER:
            raise PluginError(
                "--plugin epd",
                "has an encoder cache manager, and --ec-manager-config names another",
                "drop one of the two",
            )

    def check(self, options: EpdOptions, config: VllmConfig) -> None:
        """Refuse models and settings under which embeddings cannot be handed over."""
        super().check(options, config)
        for applies, reason, mend in _unsupported(options, config):
            if applies:
                raise PluginError(f"--plugin epd:role={options.role}", reason, mend)
        _check_memory(options)
        if options.secret_file is not None:
            from vllm_plugins.wire.secret import load_secret

            load_secret(options.secret_file)

    def policy(self, options: EpdOptions, config: VllmConfig) -> SchedulerPolicy:
        """Make what tells the scheduler's side of arrivals."""
        from vllm_plugins.engine.policy import SchedulerPolicy
        from vllm_plugins.kv_connectors.epd.arrivals import ArrivalPolicy

        if options.role == "encode":
            return SchedulerPolicy()
        return ArrivalPolicy(config.ec_transfer_config.engine_id)


def _unsupported(options: EpdOptions, config: VllmConfig) -> list[tuple[Any, str, str]]:
    """Return what cannot be served: whether it applies, why, and what to do."""
    model, drafter = config.model_config, config.speculative_config
    media, early = model.multimodal_config, options.early_prefill and options.role != "encode"
    return [
        (media is None, "the model takes text alone", "use a multimodal model"),
        (
            model.is_encoder_decoder,
            "an encoder-decoder model does not keep its encoder's output as embeddings",
            "serve it without --plugin epd",
        ),
        (
            config.parallel_config.pipeline_parallel_size > 1,
            "with --pipeline-parallel-size only the first stage's workers take embeddings",
            "use tensor parallelism",
        ),
        (
            config.parallel_config.prefill_context_parallel_size > 1,
            "with --prefill-context-parallel-size workers cannot tell when they have copied",
            "drop it",
        ),
        (
            options.port and config.parallel_config.data_parallel_size > 1,
            f"with --data-parallel-size every engine listens, and there is one port={options.port}",
            "drop port",
        ),
        (
            options.role == "encode" and drafter is not None,
            "a server that encodes decodes nothing, so --speculative-config has no meaning",
            "drop it",
        ),
        (
            options.on_missing == "encode_local" and media is not None and _skips_encoder(media),
            "on_missing=encode_local needs the encoder, whose weights are not loaded",
            "drop on_missing, or --language-model-only and limits of 0 in --limit-mm-per-prompt",
        ),
        (
            early and model.is_hybrid,
            "early_prefill cuts chunks where a hybrid model's state has no boundary",
            "set early_prefill=false",
        ),
        (
            early and not config.scheduler_config.enable_chunked_prefill,
            "early_prefill needs chunked prefill",
            "set early_prefill=false, or drop --no-enable-chunked-prefill",
        ),
        (
            early and config.num_prefill_lookahead_tokens > 1,
            "early_prefill and a drafter that reads several tokens ahead do not go together",
            "set early_prefill=false",
        ),
    ]


def _skips_encoder(media: Any) -> bool:
    limits = media.limit_per_prompt or {}
    counts = [getattr(limit, "count", limit) for limit in limits.values()]
    return bool(media.language_model_only or (counts and not any(counts)))


def _check_memory(options: EpdOptions) -> None:
    free = available_memory(Path("/proc/meminfo").read_text())
    if options.arena_bytes > free:
        raise PluginError(
            f"--plugin epd: arena_bytes={options.arena_bytes}",
            f"exceeds the {free} bytes of memory that are free",
            "lower it",
        )


def available_memory(meminfo: str) -> int:
    """Return the bytes that can be taken without swapping, as Linux estimates them.

    Args:
        meminfo: Contents of ``/proc/meminfo``.
    """
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    raise ValueError("/proc/meminfo does not tell the available memory")
