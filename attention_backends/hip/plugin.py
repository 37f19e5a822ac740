"""Declaration of the HiP attention plug-in."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from vllm_plugins.attention_backends.hip.plan import QUERY_BLOCK, LayerPlan, Stage
from vllm_plugins.errors import PluginError
from vllm_plugins.plugin import AttentionPlugin, Options, Paper, Requirements

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_plugins.attention_backends.hip.worker import HipListener

MAX_STAGES = 4


class StageOptions(Options):
    """One pruning stage; the last one's ``keep`` is ``top_k``."""

    chunk: int = Field(ge=1, le=4096, description="Keys of a chunk, a power of two.")
    keep: int | None = Field(default=None, ge=1, description="Keys that survive.")
    query_stride: int = Field(
        1, ge=1, le=QUERY_BLOCK, description="In prefill, every so many-th query is scored."
    )


class LayerOptions(Options):
    """What one layer has of its own."""

    top_k: int | None = Field(default=None, ge=0, description="As the plug-in's top_k.")
    window_tokens: int | None = Field(
        default=None, ge=64, description="As the plug-in's window_tokens."
    )


DEFAULT_STAGES = (
    StageOptions(chunk=256, keep=32768, query_stride=4),
    StageOptions(chunk=32, keep=8192, query_stride=4),
    StageOptions(chunk=8, query_stride=4),
)


class HipOptions(Options):
    """Options of HiP attention."""

    top_k: int = Field(
        2048,
        ge=0,
        description="Keys that a query attends to besides sink and window; 0 attends to those "
        "alone.",
    )
    sink_tokens: int = Field(256, ge=0, description="First tokens, which are always attended to.")
    window_tokens: int = Field(
        1024, ge=64, description="Last tokens, which are always attended to."
    )
    stages: tuple[StageOptions, ...] = Field(
        DEFAULT_STAGES,
        min_length=1,
        max_length=MAX_STAGES,
        description="Pruning stages from coarse to fine, as JSON: chunk, keep, query_stride.",
    )
    refresh: tuple[int, ...] = Field(
        (16, 8, 4),
        description="Tokens after which each stage runs again while a request decodes.",
    )
    overlap_tokens: int = Field(
        256,
        ge=1,
        description="Tokens of the window that are candidates too while decoding, so that what "
        "leaves the window between two refreshes is found.",
    )
    dense_layers: tuple[int, ...] = Field(
        (0, 1, 2), description="Layers that attend to everything; negative ones count from the end."
    )
    per_layer: dict[int, LayerOptions] = Field(
        {}, description="top_k and window_tokens of single layers, as JSON."
    )
    phases: Literal["decode", "prefill", "both"] = Field(
        "decode", description="Where attention is sparse; elsewhere it is dense."
    )
    dense_threshold: int = Field(
        8192, ge=0, description="Tokens of a sequence up to which attention is dense."
    )
    dense_tail_queries: int = Field(
        64,
        ge=0,
        description="Last tokens of each prompt chunk that attend to everything, where prefill "
        "is sparse.",
    )
    representative: Literal["centre", "first"] = Field(
        "centre", description="Key by which half a chunk is judged."
    )

    @model_validator(mode="after")
    def _consistent(self) -> HipOptions:
        _check_stages(self.stages, self.top_k)
        last = self.stages[-1].chunk
        if self.sink_tokens % last:
            raise ValueError(f"sink_tokens={self.sink_tokens} is not a multiple of chunk={last}")
        if len(self.refresh) != len(self.stages):
            raise ValueError(f"refresh={list(self.refresh)} is not one number for each stage")
        if min(self.refresh) < 1 or any(a % b for a, b in pairwise(self.refresh)):
            raise ValueError(f"refresh={list(self.refresh)}: each must divide the one before it")
        windows = [self.window_tokens] + [
            x.window_tokens for x in self.per_layer.values() if x.window_tokens is not None
        ]
        if not max(self.refresh) <= self.overlap_tokens <= min(windows):
            raise ValueError(
                f"overlap_tokens={self.overlap_tokens} is not between the longest refresh, "
                f"{max(self.refresh)}, and the window, {min(windows)}"
            )
        for layer in self.per_layer.values():
            if layer.top_k is not None:
                _check_stages(self.stages, layer.top_k)
        return self

    def plan(self, layer: int, num_layers: int) -> LayerPlan | None:
        """Return what a layer prunes, or None where it is dense.

        Args:
            layer: Its index.
            num_layers: Of the model, from whose end negative indices count.
        """
        if layer in {x % num_layers for x in self.dense_layers if -num_layers <= x < num_layers}:
            return None
        own = self.per_layer.get(layer) or self.per_layer.get(layer - num_layers) or LayerOptions()
        top_k = self.top_k if own.top_k is None else own.top_k
        stages = tuple(
            Stage(x.chunk, top_k if x.keep is None else x.keep, x.query_stride) for x in self.stages
        )
        window = self.window_tokens if own.window_tokens is None else own.window_tokens
        return LayerPlan(
            self.sink_tokens, window, self.overlap_tokens, stages, self.representative == "centre"
        )


def _check_stages(stages: tuple[StageOptions, ...], top_k: int) -> None:
    """Refuse chunks that do not nest and lists of survivors that cannot be cut."""
    for stage in stages:
        if stage.chunk & (stage.chunk - 1):
            raise ValueError(f"stages: chunk={stage.chunk} is not a power of two")
    for before, after in pairwise(stages):
        if before.keep is None or before.keep % before.chunk or before.keep == 0:
            raise ValueError(
                f"stages: keep={before.keep} is not a multiple of chunk={before.chunk}"
            )
        if after.chunk >= before.chunk:
            raise ValueError(f"stages: chunk={after.chunk} is not below chunk={before.chunk}")
    if stages[-1].keep is not None:
        raise ValueError("stages: the last stage keeps top_k tokens, so it has no keep")
    if top_k % stages[-1].chunk:
        raise ValueError(f"top_k={top_k} is not a multiple of the last chunk={stages[-1].chunk}")


class HipPlugin(AttentionPlugin):
    """Sparse attention over key blocks that a tree search finds."""

    name = "hip"
    summary = "Attends to few key blocks, found by a tree search, in long contexts."
    papers = (
        Paper(
            "InfiniteHiP: Extending Language Model Context Up to 3 Million Tokens on a Single GPU",
            "2502.08910",
        ),
        Paper(
            "A Training-Free Sub-quadratic Cost Transformer Model Serving Framework with "
            "Hierarchically Pruned Attention",
            "2406.09827",
        ),
    )
    exactness = (
        "approximate by top_k; exact with dense_threshold at --max-model-len or all layers in "
        "dense_layers"
    )
    requires = Requirements(
        vllm=">=0.30", platforms=frozenset({"cpu", "cuda"}), runners=frozenset({"V1", "V2"})
    )
    conflicts: ClassVar[dict[str, str]] = {
        "kvshare": "KV that hip computes depends on what it selects, and another request would "
        "select something else"
    }
    Options: ClassVar[type[Options]] = HipOptions
    backends: ClassVar[dict[str, str]] = {
        "cpu": "vllm_plugins.attention_backends.hip.cpu_backend.HipCpuBackend",
        "cuda": "vllm_plugins.attention_backends.hip.cuda_backend.HipCudaBackend",
    }

    kernel_cases = "vllm_plugins.attention_backends.hip.kernel_cases.kernel_cases"

    def check(self, options: HipOptions, config: VllmConfig) -> None:
        """Refuse models and settings whose attention HiP cannot serve."""
        _check_layers(options, config.model_config.get_total_num_hidden_layers())
        for flag, reason, mend in _unsupported(options, config):
            raise PluginError(f"--plugin hip with {flag}", reason, mend)

    def listener(self, options: HipOptions, config: VllmConfig) -> HipListener:
        """Make the part of one worker."""
        from vllm_plugins.attention_backends.hip.worker import HipListener

        return HipListener(options, config)


def _check_layers(options: HipOptions, layers: int) -> None:
    """Refuse numbers of layers that the model does not have, and options of layers without use.

    Args:
        options: The plug-in's.
        layers: How many the model has.

    Raises:
        PluginError: There is such a layer.
    """
    named = [*options.per_layer]
    if options.dense_layers != HipOptions.model_fields["dense_layers"].default:
        named += options.dense_layers
    for layer in named:
        if not -layers <= layer < layers:
            raise PluginError(
                f"--plugin hip: layer {layer}", f"the model has {layers} layers", "drop it"
            )
    for layer in options.per_layer:
        if options.plan(layer % layers, layers) is None:
            raise PluginError(
                f"--plugin hip: per_layer={layer}",
                "the layer is in dense_layers, so it selects nothing",
                "take it out of one of the two",
            )
        if layer < 0 and layer + layers in options.per_layer:
            raise PluginError(
                f"--plugin hip: per_layer={layer}", f"it is layer {layer + layers} too", "drop one"
            )


def _unsupported(options: HipOptions, config: VllmConfig) -> list[tuple[str, str, str]]:
    """Return what the engine's configuration has that HiP cannot serve."""
    import vllm.envs as envs

    parallel, cache = config.parallel_config, config.cache_config
    last = options.stages[-1].chunk
    found: list[tuple[Any, tuple[str, str, str]]] = [
        (
            config.model_config.use_mla,
            (
                "this model",
                "its latent attention (MLA) has backends of its own",
                "use a model with grouped-query attention",
            ),
        ),
        (
            cache.cache_dtype not in ("auto", str(config.model_config.dtype).rpartition(".")[2]),
            (
                f"--kv-cache-dtype {cache.cache_dtype}",
                "its kernels read keys and values in the model's own type alone",
                "use 'auto'",
            ),
        ),
        (
            cache.prefix_match_unit not in (None, cache.block_size),
            (
                f"--prefix-match-unit {cache.prefix_match_unit}",
                "what is known of a request is found by the blocks that it wrote itself",
                "drop it",
            ),
        ),
        (
            config.kv_transfer_config is not None,
            (
                "--kv-transfer-config",
                "KV that sparse layers computed would be taken for a dense server's",
                "drop one of the two",
            ),
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            (
                "context parallelism",
                "a query block would see part of the keys only",
                "use tensor parallelism",
            ),
        ),
        (
            cache.block_size is not None and cache.block_size % last,
            (
                f"--block-size {cache.block_size}",
                f"a key block of {last} tokens would lie in two cache blocks",
                f"use a multiple of {last}",
            ),
        ),
        (
            parallel.use_ubatching,
            (
                "--enable-dbo",
                "both halves of a batch would keep their selections in the same place",
                "drop it",
            ),
        ),
        (
            envs.VLLM_BATCH_INVARIANT,
            (
                "VLLM_BATCH_INVARIANT=1",
                "it chooses attention kernels of its own",
                "unset it",
            ),
        ),
    ]
    return [problem for applies, problem in found if applies]
