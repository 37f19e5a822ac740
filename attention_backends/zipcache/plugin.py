"""Declaration of the ZipCache plug-in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from vllm_plugins.attention_backends.zipcache.page import BLOCK_SIZES, HEAD_MULTIPLE
from vllm_plugins.errors import PluginError
from vllm_plugins.plugin import AttentionPlugin, Options, Paper, Requirements

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_plugins.arguments import EngineArguments
    from vllm_plugins.attention_backends.zipcache.worker import ZipCacheListener

CUDA_BLOCK_SIZE = 64
# What the CPU kernels have room for on their stacks.
LARGEST_HEAD = 512
# The kernels keep a quarter of a head for each of 16 queries or 64 keys in registers.
CUDA_LARGEST_HEAD = 256


class ZipCacheOptions(Options):
    """Options of ZipCache."""

    bits: Literal["4/2", "4/4", "2/2"] = Field(
        "4/2",
        description="Bits of salient and of other tokens; 4/4 and 2/2 are one class, to compare.",
    )
    salient_ratio: float = Field(
        0.2,
        ge=0,
        le=1,
        description="With bits=4/2, share of the tokens whose values are salient, in whole tokens "
        "of a block. The paper has 0.6, for keys too.",
    )
    key_salient_ratio: float | None = Field(
        1.0,
        ge=0,
        le=1,
        description="The same for keys, which lose more by two bits than values do; null, as in "
        "the paper: that of values.",
    )
    probe_recent: float = Field(
        0.05,
        ge=0,
        le=0.5,
        description="Share of a prompt whose last queries score its tokens.",
    )
    probe_random: float = Field(
        0.05, ge=0, le=0.5, description="Share of a prompt whose random queries score its tokens."
    )
    normalizer: Literal["probe_nnz", "full_nnz"] = Field(
        "probe_nnz",
        description="What attention is divided by: the probes that saw the token, or all queries "
        "that did, as in the published code, which favours recent tokens.",
    )
    decode_score: Literal["last_query", "accumulate"] = Field(
        "last_query",
        description="Queries that score the tokens of a block which generated tokens fill: the "
        "last one, as in the published code, or all that saw them.",
    )
    always_salient_first: int = Field(
        4, ge=0, le=1024, description="First tokens of a sequence that are salient at any rate."
    )
    key_transform: str | None = Field(
        None,
        description="File of a basis for each layer's keys, in which they lose least; made by "
        "`vllm-plugins train zipcache`, not the paper's.",
    )
    v_scale: Literal["block", "none"] = Field(
        "block", description="Whether values are divided by a scale for each channel of a block."
    )
    skip_layers: tuple[int, ...] = Field(
        (),
        description="Layers that keep vLLM's own cache; negative ones count from the end.",
        # A packed layer writes its cache itself, another one by an operator of the graph.
        json_schema_extra={"graph": True},
    )
    staging_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens of unfinished prompts that may wait at four bits for their scores, "
        "besides one block for each request. By default twice --max-num-batched-tokens.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Of the random queries.")

    @model_validator(mode="after")
    def _consistent(self) -> ZipCacheOptions:
        for name in ("salient_ratio", "key_salient_ratio"):
            default = type(self).model_fields[name].default
            if self.bits != "4/2" and getattr(self, name) != default:
                raise ValueError(f"{name} has no meaning with bits={self.bits}")
        ratios = {self.salient_ratio, self.key_salient_ratio} - {None, 0, 1}
        if self.bits == "4/2" and ratios and self.probe_recent == self.probe_random == 0:
            raise ValueError("probe_recent=0 and probe_random=0 leave nothing to score tokens by")
        return self

    @property
    def shares(self) -> tuple[str, float, float | None]:
        """What decides how many tokens are salient: bits, and the share in general and of keys."""
        return self.bits, self.salient_ratio, self.key_salient_ratio

    def skipped(self, num_layers: int) -> frozenset[int]:
        """Return the layers that keep vLLM's own cache.

        Args:
            num_layers: Of the model, from whose end negative indices count.
        """
        return frozenset(x % num_layers for x in self.skip_layers)

    def staged_blocks(self, config: VllmConfig, block_size: int) -> int:
        """Return how many blocks may be staged.

        A step fills at most its budget of tokens in whole blocks, and one begun block of each
        request.

        Args:
            config: The engine's configuration.
            block_size: Tokens of a block.
        """
        scheduler = config.scheduler_config
        tokens = self.staging_tokens or 2 * scheduler.max_num_batched_tokens
        return -(-tokens // block_size) + scheduler.max_num_seqs


class ZipCachePlugin(AttentionPlugin):
    """A packed KV cache whose salient tokens have more bits than the others."""

    name = "zipcache"
    summary = "Packs the KV cache: four bits for keys and salient values, two for other values."
    papers = (
        Paper(
            "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token "
            "Identification",
            "2405.14256",
        ),
    )
    exactness = (
        "approximate by bits and salient ratios; exact with all layers in skip_layers, and for a "
        "sequence within one block"
    )
    requires = Requirements(
        vllm=">=0.30", platforms=frozenset({"cpu", "cuda"}), runners=frozenset({"V1", "V2"})
    )
    conflicts: ClassVar[dict[str, str]] = {
        "kvshare": "it moves KV, and packed pages depend on what else attended to them",
    }
    Options: ClassVar[type[Options]] = ZipCacheOptions
    backends: ClassVar[dict[str, str]] = {
        "cpu": "vllm_plugins.attention_backends.zipcache.cpu_backend.ZipCacheCpuBackend",
        "cuda": "vllm_plugins.attention_backends.zipcache.cuda_backend.ZipCacheCudaBackend",
    }
    kernel_cases = "vllm_plugins.attention_backends.zipcache.kernel_cases.kernel_cases"

    def configure(self, options: ZipCacheOptions, arguments: EngineArguments) -> None:
        """Choose the backend, and on CUDA, whose default is too small, the size of blocks."""
        from vllm.platforms import current_platform

        super().configure(options, arguments)
        if current_platform.device_type == "cuda" and not arguments.is_set("block_size"):
            arguments.set("block_size", CUDA_BLOCK_SIZE)

    def check(self, options: ZipCacheOptions, config: VllmConfig) -> None:
        """Refuse models and settings whose KV cache ZipCache cannot keep."""
        layers = config.model_config.get_total_num_hidden_layers()
        for layer in options.skip_layers:
            if not -layers <= layer < layers:
                raise PluginError(
                    f"--plugin zipcache: skip_layers={layer}",
                    f"the model has {layers} layers",
                    "drop it",
                )
        if options.key_transform is not None:
            from vllm_plugins.attention_backends.zipcache.key_transform import KeyTransformFile

            # Rather here, in one line, than from a worker; which layers it has is seen there.
            KeyTransformFile(options.key_transform)
        least = config.scheduler_config.max_num_batched_tokens
        if options.staging_tokens is not None and options.staging_tokens < least:
            raise PluginError(
                f"--plugin zipcache: staging_tokens={options.staging_tokens}",
                f"is below --max-num-batched-tokens, {least}, so that a step's tokens have no room",
                "raise it or lower --max-num-batched-tokens",
            )
        from vllm.platforms import current_platform

        is_cuda = current_platform.device_type == "cuda"
        found = [*_unsupported(config), *(_unsupported_on_cuda(config) if is_cuda else ())]
        for flag, reason, mend in found:
            raise PluginError(f"--plugin zipcache with {flag}", reason, mend)

    def listener(self, options: ZipCacheOptions, config: VllmConfig) -> ZipCacheListener:
        """Make the part of one worker."""
        from vllm_plugins.attention_backends.zipcache.worker import ZipCacheListener

        return ZipCacheListener(options, config)


def _unsupported(config: VllmConfig) -> list[tuple[str, str, str]]:
    """Return what the engine's configuration has that ZipCache cannot serve."""
    mend = "drop the plug-in for this model"
    models = [("this model", reason, mend) for reason in _of_model(config)]
    return [*models, *_of_cache(config), *_of_engine(config)]


def _of_model(config: VllmConfig) -> list[str]:
    """Return why a model's KV cache cannot be kept."""
    model = config.model_config
    head = 0 if model.use_mla else model.get_head_size()
    found: list[tuple[Any, str]] = [
        (model.use_mla, "its latent attention (MLA) keeps no keys and values of heads"),
        (
            head % HEAD_MULTIPLE,
            f"its heads have {head} channels, no multiple of {HEAD_MULTIPLE}",
        ),
        (
            head > LARGEST_HEAD,
            f"its heads have {head} channels, the kernels know {LARGEST_HEAD}",
        ),
        (model.is_mm_prefix_lm, "tokens of its images attend to later ones"),
        (model.is_hybrid, "some of its layers keep a state instead of keys and values"),
    ]
    return [reason for applies, reason in found if applies]


def _of_cache(config: VllmConfig) -> list[tuple[str, str, str]]:
    """Return what the cache's settings have that packed pages do not."""
    cache = config.cache_config
    # The model's own dtype is what "auto" stands for.
    own = str(config.model_config.dtype).removeprefix("torch.")
    found: list[tuple[Any, tuple[str, str, str]]] = [
        (
            cache.cache_dtype not in ("auto", own),
            ("--kv-cache-dtype", "the cache is quantised by the plug-in", "use 'auto'"),
        ),
        (
            cache.block_size is not None and cache.block_size not in BLOCK_SIZES,
            (
                f"--block-size {cache.block_size}",
                "ranges are kept for each block, so a small one saves little, and pages are known "
                f"for {', '.join(map(str, BLOCK_SIZES))} tokens",
                "use 64 or 128",
            ),
        ),
        (
            cache.prefix_match_unit not in (None, cache.block_size),
            (
                f"--prefix-match-unit {cache.prefix_match_unit}",
                "a packed block is found whole or not at all",
                "drop it",
            ),
        ),
        (
            config.kv_transfer_config is not None,
            (
                "--kv-transfer-config",
                "blocks that are not sealed yet lie where a connector does not look",
                "drop one of the two",
            ),
        ),
    ]
    return [problem for applies, problem in found if applies]


def _of_engine(config: VllmConfig) -> list[tuple[str, str, str]]:
    """Return what the engine's other settings have that ZipCache cannot serve."""
    import vllm.envs as envs

    parallel = config.parallel_config
    found: list[tuple[Any, tuple[str, str, str]]] = [
        (
            config.speculative_config is not None,
            (
                "--speculative-config",
                "a rejected draft could be part of a block that is packed already",
                "drop one of the two",
            ),
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            (
                "context parallelism",
                "a block's tokens would lie on several ranks",
                "use tensor parallelism",
            ),
        ),
        (
            parallel.enable_elastic_ep,
            ("--enable-elastic-ep", "ranks that come warm up on blocks of others", "drop it"),
        ),
        (
            envs.VLLM_BATCH_INVARIANT,
            ("VLLM_BATCH_INVARIANT=1", "it chooses attention kernels of its own", "unset it"),
        ),
    ]
    return [problem for applies, problem in found if applies]


def _unsupported_on_cuda(config: VllmConfig) -> list[tuple[str, str, str]]:
    """Return what the engine's configuration has that the Triton kernels cannot serve."""
    import torch
    from vllm.platforms import current_platform

    head, dtype = config.model_config.get_head_size(), config.model_config.dtype
    found: list[tuple[Any, tuple[str, str, str]]] = [
        (
            not config.model_config.use_mla and head > CUDA_LARGEST_HEAD,
            (
                "this model",
                f"its heads have {head} channels, the kernels know {CUDA_LARGEST_HEAD}",
                "drop the plug-in for this model",
            ),
        ),
        (
            dtype not in (torch.bfloat16, torch.float16),
            (f"--dtype {dtype}", "tensor cores multiply 16 bits", "use bfloat16 or float16"),
        ),
        (
            not current_platform.has_device_capability(80),
            ("this GPU", "the kernels need compute capability 8.0", "use an Ampere or newer GPU"),
        ),
        (
            config.parallel_config.use_ubatching,
            ("--enable-dbo", "both halves of a batch would share their buffers", "drop it"),
        ),
    ]
    return [problem for applies, problem in found if applies]
