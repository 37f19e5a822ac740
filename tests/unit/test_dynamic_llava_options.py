"""Dynamic-LLaVA's options, what they make of an engine, and what is refused."""

import copy
import pickle

import pytest
from vision import tiny_llava

from tests.models import tiny_llama
from vllm_plugins import engine_args
from vllm_plugins.errors import PluginError
from vllm_plugins.visual_tokens.dynamic_llava.plugin import (
    ARCHITECTURE,
    GUARD,
    DynamicLlavaOptions,
    DynamicLlavaPlugin,
    Pruning,
)

NORM = {"image_scorer": "norm", "image_keep_rate": 0.25}
SPARSE = {"sparse_layer": 1, "image_keep_rate": 0.3, "text_keep_rate": 0.5}


@pytest.fixture(scope="module")
def config():
    from vllm.engine.arg_utils import EngineArgs

    model = str(tiny_llava(layers=4, pixels=168))
    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "block_size": 32}
    plugin = engine_args("dynamic_llava", **NORM)
    return EngineArgs(model=model, **arguments, **plugin).create_engine_config()


def check(config, **options) -> str:
    """Return what the plug-in says to a configuration; empty where it is content."""
    try:
        DynamicLlavaPlugin().check(DynamicLlavaOptions(**options), config)
    except PluginError as error:
        return str(error)
    return ""


def changed(config, path, value):
    """Return a configuration with one value replaced, such as `model_config.runner_type`."""
    other = copy.deepcopy(config)
    part = other
    *parents, name = path.split(".")
    for parent in parents:
        part = getattr(part, parent)
    object.__setattr__(part, name, value)
    return other


def with_predictors(config, **changes):
    return changed(config, "model_config.hf_config.sparse_config", SPARSE | changes)


def test_what_is_set_is_stock_arguments():
    arguments = engine_args("dynamic_llava", **NORM)
    assert arguments["hf_overrides"] == {"architectures": [ARCHITECTURE]}
    assert arguments["disable_chunked_mm_input"] is True
    assert arguments["logits_processors"] == [GUARD]
    assert "enable_prefix_caching" not in arguments
    assert arguments["scheduler_cls"].endswith("create_scheduler")
    assert engine_args("dynamic_llava", text_keep=True)["enable_prefix_caching"] is False
    memory = engine_args("dynamic_llava", free_hole_blocks=True)
    assert memory["enable_prefix_caching"] is False


def test_only_what_changes_the_graph_is_in_the_compile_key():
    options = DynamicLlavaOptions(prune_layer=3, image_keep_rate=0.5)
    assert options.graph_values() == {
        "prune_layer": 3,
        "text_keep": False,
        "image_scorer": "predictor",
    }


def test_the_users_own_overrides_stay():
    from vllm_plugins.activation import expand
    from vllm_plugins.spec import PluginSpec

    spec = [PluginSpec("dynamic_llava", dict(NORM))]
    current = {"hf_overrides": {"tie_word_embeddings": True}, "logits_processors": ["a:B"]}
    arguments = expand(spec, current)
    assert arguments["hf_overrides"]["tie_word_embeddings"] is True
    assert arguments["logits_processors"] == ["a:B", GUARD]
    with pytest.raises(PluginError, match="both choose the model's class"):
        expand(spec, {"hf_overrides": {"architectures": ["X"]}})


def test_a_process_that_is_sent_the_settings_knows_the_model():
    from vllm import ModelRegistry

    settings = engine_args("dynamic_llava", **NORM)["additional_config"]["vllm_plugins"]
    sent = pickle.dumps(settings)
    del ModelRegistry.models[ARCHITECTURE]
    assert pickle.loads(sent).options == settings.options
    assert ARCHITECTURE in ModelRegistry.models


def test_a_llava_is_served(config):
    assert check(config, **NORM) == ""
    assert check(config) == ""
    assert check(with_predictors(config)) == ""
    assert check(with_predictors(config), text_keep=True) == ""


def test_rates_without_predictors_are_refused(config):
    assert check(config, image_keep_rate=0.5) == (
        "--plugin dynamic_llava: image_keep_rate=0.5: the model has no image predictor: its "
        "config.json has no sparse_config for one; train one with `vllm-plugins train "
        "dynamic_llava`, or set image_scorer=attention"
    )
    assert check(config, text_keep=True) == (
        "--plugin dynamic_llava: text_keep=true: the model has no text predictor: its config.json "
        "has no sparse_config for one; train one with `vllm-plugins train dynamic_llava`"
    )
    only_images = with_predictors(config, text_keep_rate=1.0)
    assert "the model has no text predictor" in check(only_images, text_keep=True)


def test_another_layer_than_the_trained_one_is_refused(config):
    assert check(with_predictors(config), prune_layer=2) == (
        "--plugin dynamic_llava: prune_layer=2: the model's image predictor was trained to read "
        "layer 1; drop prune_layer"
    )
    assert check(with_predictors(config), prune_layer=2, **NORM) == ""


def test_a_layer_that_the_model_does_not_have_is_refused(config):
    assert check(config, prune_layer=4, **NORM) == (
        "--plugin dynamic_llava: prune_layer=4: the model has 4 layers; choose one from 1 to 3"
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"image_keep_rate": 0}, "greater than 0"),
        ({"image_keep_rate": 1.5}, "less than or equal to 1"),
        ({"image_scorer": "clip"}, "'predictor', 'attention', 'norm' or 'random'"),
        ({"prune_layer": 0}, "greater than or equal to 1"),
        ({"align": "token"}, "unknown option"),
    ],
)
def test_bad_options_are_refused_by_name(options, reason):
    with pytest.raises(PluginError, match=reason):
        engine_args("dynamic_llava", **options)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_config.runner_type", "pooling", "--runner pooling: pooling would read rows"),
        ("parallel_config.pipeline_parallel_size", 2, "--pipeline-parallel-size: stages"),
        ("parallel_config.decode_context_parallel_size", 2, "context parallelism: a block's"),
        ("parallel_config.enable_dbo", True, "--enable-dbo: half-batches"),
        ("cache_config.kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill: it drops"),
        ("kv_transfer_config", object(), "--kv-transfer-config: the upper layers' pages"),
        ("speculative_config", object(), "--speculative-config: a drafter would read"),
        ("lora_config", object(), "--enable-lora: adapters are mapped"),
    ],
)
def test_settings_that_it_cannot_serve_are_refused(config, path, value, message):
    refusal = check(changed(config, path, value), **NORM)
    assert refusal.startswith(f"--plugin dynamic_llava with {message}"), refusal


def test_freeing_needs_tables_of_ones_own(config):
    options = NORM | {"free_hole_blocks": True}
    shared = changed(config, "scheduler_config.disable_hybrid_kv_cache_manager", True)
    refusal = check(shared, **options)
    assert refusal == (
        "--plugin dynamic_llava: free_hole_blocks=true with --disable-hybrid-kv-cache-manager: all "
        "layers would have one block table; drop one of the two"
    )
    # Forgotten tokens need none either, though no image token be dropped.
    forgets = {"text_keep": True, "free_hole_blocks": True, "image_keep_rate": 1.0}
    assert check(with_predictors(shared), **forgets) == refusal
    assert check(with_predictors(config), **forgets) == ""


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "qwen2_vl", "serves LLaVA models, and this one is a qwen2_vl"),
        ("text_config.model_type", "gemma", "is not known to work with a gemma decoder"),
        ("vision_config.model_type", "pixtral", "decoder behind a pixtral"),
        ("text_config.layer_types", ["full_attention", "sliding_attention"], "see a window"),
    ],
)
def test_models_that_it_does_not_know_are_refused(config, path, value, message):
    refusal = check(changed(config, f"model_config.hf_config.{path}", value), **NORM)
    assert message in refusal, refusal


def test_a_text_model_is_refused_before_it_is_loaded():
    from vllm.engine.arg_utils import EngineArgs

    plugin = engine_args("dynamic_llava", **NORM)
    with pytest.raises(PluginError, match="serves LLaVA models, and this one is a llama"):
        EngineArgs(model=str(tiny_llama()), **plugin).create_engine_config()


def hashes(config, salt=None, **options):
    """Return the keys under which the prefix cache holds a prompt's blocks."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    prompt, hasher = list(range(100)), get_request_block_hasher(32, sha256)
    params = SamplingParams(max_tokens=1)
    request = Request("a", prompt, params, None, cache_salt=salt, block_hasher=hasher)
    assert len(request.block_hashes) == 3
    if options:
        policy = DynamicLlavaPlugin().policy(DynamicLlavaOptions(**options), config)
        policy.added(request, 0.0)
    return request.block_hashes


def test_keep_settings_are_part_of_the_prefix_caches_key(config, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    stock = hashes(config)
    assert hashes(config, **NORM | {"image_keep_rate": 1.0}) == stock
    kinds = [
        {},
        NORM,
        NORM | {"image_keep_rate": 0.5},
        NORM | {"prune_layer": 3},
        NORM | {"image_scorer": "random"},
    ]
    found = [hashes(config, salt, **kind) for kind in kinds for salt in (None, "tenant")]
    assert all(len(keys) == 3 for keys in found)
    assert len({key for keys in found for key in keys}) == 3 * len(found)
    assert hashes(config, **NORM) == hashes(config, **NORM)


@pytest.mark.parametrize(("text", "frees"), [(True, True), (True, False), (False, True)])
def test_a_block_by_which_forgotten_tokens_are_counted_is_no_hole(text, frees):
    """The whole of an image that begins a prompt may be kept in its last, half-filled block."""
    pruning = Pruning(2, 0.1, "norm", text, frees, None)
    hole = pruning.plan_span((0, 576), 128)
    assert (hole.first_block, hole.first_block + hole.blocks) == (int(text and frees), 4)
    assert pruning.plan_span((1, 577), 128).first_block == 1


@pytest.mark.parametrize("asked", [{"prompt_logprobs": 1}, {"prompt_logprob_token_ids": [[1]]}])
def test_logprobs_of_the_prompt_are_refused(asked):
    from vllm import SamplingParams

    from vllm_plugins.visual_tokens.dynamic_llava.guard import PromptLogprobsGuard

    PromptLogprobsGuard.validate_params(SamplingParams(logprobs=1, logprob_token_ids=[1]))
    with pytest.raises(ValueError, match=f"{next(iter(asked))}: image tokens"):
        PromptLogprobsGuard.validate_params(SamplingParams(**asked))
