"""ZipCache's options, and what it refuses."""

import copy

import pytest
from pydantic import ValidationError

from tests.models import tiny_llama
from vllm_plugins.attention_backends.zipcache.plugin import ZipCacheOptions, ZipCachePlugin
from vllm_plugins.attention_backends.zipcache.worker import _check_layer
from vllm_plugins.errors import PluginError


@pytest.fixture(scope="module")
def config():
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "block_size": 64,
                 "max_num_batched_tokens": 2048, "max_num_seqs": 16}  # fmt: skip
    return EngineArgs(model=str(tiny_llama(layers=4)), **arguments).create_engine_config()


def check(config, **options) -> str:
    """Return what the plug-in says to a configuration; empty where it is content."""
    try:
        ZipCachePlugin().check(ZipCacheOptions(**options), config)
    except PluginError as error:
        return str(error)
    return ""


def changed(config, part, name, value):
    other = copy.deepcopy(config)
    object.__setattr__(getattr(other, part) if part else other, name, value)
    return other


def test_a_plain_configuration_is_served(config):
    assert check(config, skip_layers=[0, -1]) == ""


@pytest.mark.parametrize("size", [16, 48, 512])
def test_blocks_of_other_sizes_are_refused(config, size):
    assert check(changed(config, "cache_config", "block_size", size)) == (
        f"--plugin zipcache with --block-size {size}: ranges are kept for each block, so a small "
        "one saves little, and pages are known for 32, 64, 128, 256 tokens; use 64 or 128"
    )


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        (
            "cache_config",
            "cache_dtype",
            "fp8",
            "--kv-cache-dtype: the cache is quantised by the plug-in; use 'auto'",
        ),
        (
            # Of a model in float32.
            "cache_config",
            "cache_dtype",
            "bfloat16",
            "--kv-cache-dtype: the cache is quantised by the plug-in; use 'auto'",
        ),
        (
            "cache_config",
            "prefix_match_unit",
            16,
            "--prefix-match-unit 16: a packed block is found whole or not at all; drop it",
        ),
        (
            "",
            "kv_transfer_config",
            object(),
            "--kv-transfer-config: blocks that are not sealed yet lie where a connector does not "
            "look; drop one of the two",
        ),
        (
            "",
            "speculative_config",
            object(),
            "--speculative-config: a rejected draft could be part of a block that is packed "
            "already; drop one of the two",
        ),
        (
            "parallel_config",
            "enable_elastic_ep",
            True,
            "--enable-elastic-ep: ranks that come warm up on blocks of others; drop it",
        ),
        (
            "parallel_config",
            "decode_context_parallel_size",
            2,
            "context parallelism: a block's tokens would lie on several ranks; use tensor "
            "parallelism",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) and "_" in x else "",
)
def test_settings_that_it_cannot_serve_are_refused(config, part, name, value, message):
    assert check(changed(config, part, name, value)) == f"--plugin zipcache with {message}"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "use_mla",
            True,
            "its latent attention (MLA) keeps no keys and values of heads; drop the plug-in for "
            "this model",
        ),
        (
            "is_hybrid",
            True,
            "some of its layers keep a state instead of keys and values; drop the plug-in for this "
            "model",
        ),
        (
            "get_head_size",
            lambda self: 72,
            "its heads have 72 channels, no multiple of 16; drop the plug-in for this model",
        ),
        (
            "get_head_size",
            lambda self: 528,
            "its heads have 528 channels, the kernels know 512; drop the plug-in for this model",
        ),
        (
            "is_mm_prefix_lm",
            property(lambda self: True),
            "tokens of its images attend to later ones; drop the plug-in for this model",
        ),
    ],
)
def test_models_that_it_cannot_serve_are_refused(config, monkeypatch, name, value, message):
    monkeypatch.setattr(type(config.model_config), name, value)
    assert check(config) == f"--plugin zipcache with this model: {message}"


def test_batch_invariance_is_refused(config, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert check(config) == (
        "--plugin zipcache with VLLM_BATCH_INVARIANT=1: it chooses attention kernels of its own; "
        "unset it"
    )


@pytest.mark.parametrize("kind", ["ChunkedLocalAttention", "PrefillPrefixLMAttention", "Attention"])
def test_layers_with_attention_of_their_own_are_refused(config, kind):
    """Their backends are made around the platform's, and would be lost."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers import attention
    from vllm.model_executor.layers.attention import prefill_prefix_lm_attention

    extra = {"attention_chunk_size": 64} if kind == "ChunkedLocalAttention" else {}
    made = getattr(attention, kind, None) or getattr(prefill_prefix_lm_attention, kind)
    with set_current_vllm_config(copy.deepcopy(config)):
        layer = made(4, 32, 1.0, cache_config=config.cache_config, prefix="layers.0.attn", **extra)
    if kind == "Attention":
        _check_layer("layers.0.attn", layer)
        return
    with pytest.raises(PluginError, match=rf"layers.0.attn has attention of its own \({kind}\)"):
        _check_layer("layers.0.attn", layer)


def test_layers_that_do_not_exist_are_refused(config):
    assert check(config, skip_layers=[4]) == (
        "--plugin zipcache: skip_layers=4: the model has 4 layers; drop it"
    )
    assert ZipCacheOptions(skip_layers=[0, -1]).skipped(4) == {0, 3}


def test_staging_holds_what_a_step_fills(config):
    assert check(config, staging_tokens=1024) == (
        "--plugin zipcache: staging_tokens=1024: is below --max-num-batched-tokens, 2048, so that "
        "a step's tokens have no room; raise it or lower --max-num-batched-tokens"
    )
    assert ZipCacheOptions().staged_blocks(config, 64) == 64 + 16
    assert ZipCacheOptions(staging_tokens=2049).staged_blocks(config, 64) == 33 + 16


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"bits": "4/4", "salient_ratio": 0.5}, "salient_ratio has no meaning with bits=4/4"),
        ({"bits": "2/2", "key_salient_ratio": 0}, "key_salient_ratio has no meaning with bits=2/2"),
        ({"probe_recent": 0, "probe_random": 0}, "leave nothing to score tokens by"),
        (
            {"salient_ratio": 1, "key_salient_ratio": 0.5, "probe_recent": 0, "probe_random": 0},
            "leave nothing to score tokens by",
        ),
        ({"key_salient_ratio": 1.1}, "less than or equal to 1"),
        ({"salient_ratio": 1.1}, "less than or equal to 1"),
        ({"probe_random": 0.6}, "less than or equal to 0.5"),
        ({"bits": "3/2"}, "4/2"),
        ({"block_size": 64}, "Extra inputs"),
    ],
)
def test_what_does_not_fit_together(values, reason):
    with pytest.raises(ValidationError, match=reason):
        ZipCacheOptions(**values)


def test_the_compile_cache_tells_packed_layers_from_others():
    """Even without options, or its graph would be taken for that of stock vLLM."""
    assert ZipCacheOptions().graph_values() == {"skip_layers": []}


def test_one_class_needs_no_probes():
    options = ZipCacheOptions(
        salient_ratio=1, key_salient_ratio=None, probe_recent=0, probe_random=0
    )
    assert options.shares == ("4/2", 1, None)
    assert ZipCacheOptions(bits="2/2", probe_recent=0, probe_random=0).bits == "2/2"
    # Keys of four bits and values of two.
    options = ZipCacheOptions(salient_ratio=0, key_salient_ratio=1, probe_recent=0, probe_random=0)
    assert options.shares == ("4/2", 0, 1)


def test_each_format_of_pages_has_a_backend_of_its_own():
    """Under a name of its own too: by it vLLM tells groups of layers apart."""
    from vllm_plugins.attention_backends.zipcache.cpu_backend import PackedCpuBackend
    from vllm_plugins.attention_backends.zipcache.packed import packed_backend

    shares = [
        ZipCacheOptions(**x).shares
        for x in (
            {},
            {"salient_ratio": 0.3},
            {"key_salient_ratio": None},
            {"key_salient_ratio": 0.6},
        )
    ]
    backends = [packed_backend(PackedCpuBackend, *x) for x in shares]
    assert backends == [packed_backend(PackedCpuBackend, *x) for x in shares]
    assert len({x.full_cls_name() for x in backends}) == len(backends)
