"""Puts the scheduler's side of an engine together from its configuration."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, cast

from vllm.distributed.ec_transfer.ec_connector.encoder_output_width import get_encoder_output_width
from vllm.distributed.ec_transfer.ec_connector.utils import (
    PlaceholderMetadataResolver,
    collect_ec_item_metadata,
)
from vllm.logger import init_logger
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget

from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.epd import metrics
from vllm_plugins.kv_connectors.epd.arena import Arena
from vllm_plugins.kv_connectors.epd.encode_side import EncodeSide
from vllm_plugins.kv_connectors.epd.fetcher import Fetcher
from vllm_plugins.kv_connectors.epd.media import Shape
from vllm_plugins.kv_connectors.epd.prefill_side import PrefillRules, PrefillSide
from vllm_plugins.kv_connectors.epd.protocol import SERVER_LIMITS
from vllm_plugins.kv_connectors.epd.publisher import Publisher
from vllm_plugins.kv_connectors.epd.scheduler_side import SchedulerSide
from vllm_plugins.kv_connectors.epd.shared_memory import SharedMemory
from vllm_plugins.metrics import ACTIVE, Metrics, engine_labels
from vllm_plugins.plugin import SCHEDULER_HOST
from vllm_plugins.settings import enabled_plugins
from vllm_plugins.wire.secret import load_secret
from vllm_plugins.wire.server import Server

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    from vllm_plugins.kv_connectors.epd.plugin import EpdOptions

logger = init_logger("vllm.vllm_plugins.epd")

# Every prefill server has one connection for each of its fetching threads.
MOST_CONNECTIONS = 1024


def options_of(config: VllmConfig) -> EpdOptions:
    """Return the plug-in's options.

    Raises:
        PluginError: The connector was named without the plug-in.
    """
    for item in enabled_plugins(config):
        if item.plugin.name == "epd":
            return cast("EpdOptions", item.options)
    raise PluginError(
        "--ec-transfer-config", "EpdConnector works only as a plug-in", "use --plugin epd"
    )


def make_scheduler_side(config: VllmConfig, options: EpdOptions) -> SchedulerSide:
    """Make an engine's arena, its threads and its sides, and say so in the log.

    Raises:
        PluginError: The arena does not hold one item, or the server cannot listen.
    """
    shapes = _Shapes(config)
    block_bytes = options.tokens_per_block * Shape(1, shapes.widest, shapes.dtype).row_bytes
    num_blocks = options.arena_bytes // block_bytes
    check_largest_item(config, options, num_blocks)
    arena = Arena(num_blocks, block_bytes)
    writer = Metrics([ACTIVE, *metrics.ALL], engine_labels(config))
    writer.set(ACTIVE.name, 1, "epd")
    ledger = metrics.Ledger(writer)
    workers = config.parallel_config.tensor_parallel_size
    side = SchedulerSide(arena, SharedMemory.create(workers, num_blocks, block_bytes), ledger)
    secret = load_secret(options.secret_file)
    media = _Media(config)
    if options.role != "prefill":
        _add_encode_side(side, options, secret, shapes, media, ledger)
    if options.role != "encode":
        _add_prefill_side(side, config, options, secret, shapes, media, ledger)
    where = (
        f"publishes at {side.server.address}" if side.server is not None else "publishes nothing"
    )
    arena_text = f"role {options.role}, {num_blocks} blocks of {block_bytes} bytes, {where}"
    if config.scheduler_config.scheduler_cls == SCHEDULER_HOST:
        # The scheduler host says of all plug-ins that they are on.
        logger.info("vllm-plugins: epd: %s", arena_text)
    else:
        logger.info(
            "vllm-plugins: epd is on (EC connector): %s; %s", options.model_dump(), arena_text
        )
    return side


class _Shapes:
    """Shapes of embeddings as this engine's model makes or wants them."""

    def __init__(self, config: VllmConfig) -> None:
        self._config = config
        self.dtype = str(config.model_config.dtype).removeprefix("torch.")
        self._measured = dict(config.ec_transfer_config.mm_encoder_output_widths)
        self.widest = max([_wanted_width(config), *self._measured.values()])

    def __call__(self, num_tokens: int, modality: str) -> Shape:
        width = self.widest
        if self._measured:
            width = get_encoder_output_width(self._config, modality)
        return Shape(num_tokens, width, self.dtype)


def _wanted_width(config: VllmConfig) -> int:
    """Return the width of an embedding that the language model takes.

    Models with deep stacks of visual features take several vectors per embedding, side by side.
    """
    vision = getattr(config.model_config.hf_config, "vision_config", None)
    stacked = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    return int(config.model_config.get_inputs_embeds_size()) * (1 + stacked)


class _Media:
    """What is known of the media of a request's items."""

    def __init__(self, config: VllmConfig) -> None:
        self._resolver = PlaceholderMetadataResolver(config.model_config)

    def describe(self, request: Any) -> dict[str, dict[str, Any]]:
        """Return the placeholder metadata of a request's items, by media id."""
        return dict(collect_ec_item_metadata(request.mm_features, self._resolver))

    def is_here(self, feature: MultiModalFeatureSpec) -> bool:
        """Whether an item came with more than the metadata that sizes its place."""
        if feature.data is None:
            return False
        return not set(feature.data.get_data()) <= self._resolver.fields_for(feature.modality)


def _add_encode_side(
    side: SchedulerSide,
    options: EpdOptions,
    secret: bytes,
    shapes: _Shapes,
    media: _Media,
    ledger: metrics.Ledger,
) -> None:
    generation = secrets.token_hex(16)
    publisher = Publisher(side.arena, side.memory, generation, options.lease_s, ledger)
    side.server = Server(
        publisher.serve,
        secret,
        host=options.bind_host,
        port=options.port,
        limits=SERVER_LIMITS,
        timeout_s=options.fetch_timeout_s,
        max_connections=MOST_CONNECTIONS,
        name="epd encode",
    )
    side.server.start()
    side.encode = EncodeSide(
        side.arena,
        side.memory,
        shapes,
        side.server.address,
        generation,
        options.lease_s,
        media.describe,
        options.role == "encode",
        ledger,
    )


def _add_prefill_side(
    side: SchedulerSide,
    config: VllmConfig,
    options: EpdOptions,
    secret: bytes,
    shapes: _Shapes,
    media: _Media,
    ledger: metrics.Ledger,
) -> None:
    rules = PrefillRules(
        fetch_timeout_s=options.fetch_timeout_s,
        lease_s=options.lease_s,
        encode_locally=options.on_missing == "encode_local",
        early=options.early_prefill,
        lookahead=config.num_prefill_lookahead_tokens,
        allow_remote=options.allow_remote,
    )
    side.fetcher = Fetcher(side.memory, secret)
    side.prefill = PrefillSide(side.arena, side.fetcher, rules, shapes, media.is_here, ledger)


def check_largest_item(config: VllmConfig, options: EpdOptions, num_blocks: int) -> None:
    """Refuse an arena of so many blocks that cannot hold one item of the model's largest.

    Raises:
        PluginError: It cannot.
    """
    most = MultiModalBudget(config, MULTIMODAL_REGISTRY, enable_cache=False).mm_max_toks_per_item
    largest = max(most.values(), default=1)
    needed = -(-largest // options.tokens_per_block)
    if needed > num_blocks:
        raise PluginError(
            f"--plugin epd: arena_bytes={options.arena_bytes}",
            f"holds {num_blocks * options.tokens_per_block} embeddings, and one item of this "
            f"model may have {largest}",
            "raise it",
        )
