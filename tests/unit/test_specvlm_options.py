"""SpecVLM's options, what they set, and what is refused."""

import copy
import json

import pytest
from pydantic import ValidationError

from tests.engine.specvlm_engine import drafter, target
from vllm_plugins import engine_args
from vllm_plugins.errors import PluginError
from vllm_plugins.spec_decode.specvlm.plugin import SpecVlmOptions, SpecVlmPlugin


@pytest.fixture(scope="module")
def config():
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "block_size": 32}
    return EngineArgs(
        model=str(target()), **arguments, **engine_args("specvlm", model=str(drafter()))
    ).create_engine_config()


def check(config, **options) -> str:
    """Return what the plug-in says to a configuration; empty where it is content."""
    try:
        SpecVlmPlugin().check(SpecVlmOptions(model="drafter", **options), config)
    except PluginError as error:
        return str(error)
    return ""


def changed(config, part, name, value):
    other = copy.copy(config)
    owner = other
    for step in filter(None, part.split(".")):
        inner = copy.copy(getattr(owner, step))
        object.__setattr__(owner, step, inner)
        owner = inner
    object.__setattr__(owner, name, value)
    return other


def test_it_sets_stock_arguments():
    set_ = engine_args("specvlm", model="drafter", num_speculative_tokens=3, draft_until_batch=8)
    assert set_["speculative_config"] == {
        "method": "eagle",
        "model": "drafter",
        "num_speculative_tokens": 3,
        "draft_sample_method": "greedy",
        "num_speculative_tokens_per_batch_size": [(1, 8, 3), (9, 9, 0)],
    }
    assert set_["disable_chunked_mm_input"] is True
    # What does without a limit does without a schedule.
    always = engine_args("specvlm", model="drafter", draft_until_batch=None)
    assert "num_speculative_tokens_per_batch_size" not in always["speculative_config"]


def test_a_speculative_config_of_ones_own_is_refused():
    from vllm_plugins.activation import expand
    from vllm_plugins.spec import parse_specs

    own = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}
    with pytest.raises(PluginError, match="drop --speculative-config or --plugin specvlm"):
        expand(parse_specs(["specvlm:model=drafter"]), own)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "Field required"),
        ({"model": ""}, "at least 1 character"),
        ({"model": "m", "num_speculative_tokens": 0}, "greater than or equal to 1"),
        ({"model": "m", "num_speculative_tokens": 17}, "less than or equal to 16"),
        ({"model": "m", "draft_until_batch": 0}, "greater than or equal to 1"),
        ({"model": "m", "mode": "best"}, "'off', 'static', 'select', 'weighted' or 'concat'"),
        ({"model": "m", "default_operator": "crop"}, "'prune', 'pool', 'conv'"),
        ({"model": "m", "prune_ratio": 0.5}, "greater than or equal to 1"),
        ({"model": "m", "pool_ratio": 31}, "less than or equal to 30"),
        ({"model": "m", "select_from": []}, "at least 1 item"),
        ({"model": "m", "select_from": ["pool", "pool"]}, "names an operator twice"),
        ({"model": "m", "conv_ratio": 2}, "Extra inputs are not permitted"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, reason):
    with pytest.raises(ValidationError, match=reason):
        SpecVlmOptions(**options)


def test_options_stand_over_what_was_trained(config):
    draft = config.speculative_config.draft_model_config
    trained = SpecVlmOptions(model="drafter").settings(draft)
    assert (trained.mode, trained.pool_ratio, trained.grid) == ("select", 20, (16, 16))
    over = SpecVlmOptions(model="drafter", mode="static", pool_ratio=4, seed=9).settings(draft)
    assert (over.mode, over.pool_ratio, over.seed) == ("static", 4, 9)
    assert over.model_copy(update=trained.model_dump()) == trained


def test_nothing_changes_the_compiled_layer():
    options = SpecVlmOptions(model="m", mode="static", seed=3)
    assert options.graph_values() == {}


def test_a_plain_configuration_is_served(config, caplog):
    assert check(config) == ""
    assert not caplog.text


def test_another_block_size_than_trained_is_warned_of(config, caplog):
    with caplog.at_level("WARNING", "vllm.vllm_plugins.specvlm"):
        assert check(changed(config, "cache_config", "block_size", 128)) == ""
    assert "the drafter was trained for 32" in caplog.text and "--block-size 32" in caplog.text


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("", "speculative_config", None, "no --speculative-config: there is nothing to draft with"),
        ("speculative_config", "method", "eagle3", "this --speculative-config: the drafter is"),
        ("speculative_config", "parallel_drafting", True, "this --speculative-config: the drafter"),
        (
            "speculative_config",
            "disable_padded_drafter_batch",
            True,
            "this --speculative-config: the drafter is served by",
        ),
        ("parallel_config", "pipeline_parallel_size", 2, "--pipeline-parallel-size: the drafter's"),
        ("parallel_config", "decode_context_parallel_size", 2, "context parallelism: holes are"),
        ("parallel_config", "enable_dbo", True, "--enable-dbo: a step's rows would be halved"),
        ("", "kv_transfer_config", object(), "--kv-transfer-config: which blocks the drafter"),
        ("cache_config", "kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill: it drops"),
    ],
    ids=lambda x: x if isinstance(x, str) and "_" in x else "",
)
def test_settings_that_it_cannot_serve_are_refused(config, part, name, value, message):
    said = check(changed(config, part, name, value))
    assert said.startswith(f"--plugin specvlm with {message}")


@pytest.mark.parametrize(
    ("runner", "modules", "refused"),
    [
        ("1", None, True),
        ("1", ["q_proj", "lm_head"], True),
        ("1", ["q_proj", "embed_tokens"], False),
        ("0", None, False),
    ],
)
def test_adapters_of_the_head_are_refused_on_v2(config, monkeypatch, runner, modules, refused):
    from vllm.config import LoRAConfig

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    said = check(changed(config, "", "lora_config", LoRAConfig(target_modules=modules)))
    assert said == refused * (
        "--plugin specvlm with --enable-lora: model runner V2 maps an adapter of lm_head to one "
        "row of a request, and drafts have more; set --lora-target-modules without lm_head"
    )


def test_an_encoder_cache_for_one_image_is_refused_where_prompts_have_several(config):
    small = changed(config, "scheduler_config", "encoder_cache_size", 300)
    assert check(small) == (
        "--plugin specvlm: several images of 256 tokens in a prompt, but an encoder cache of 300; "
        "set --max-num-batched-tokens to 512 or more, or --limit-mm-per-prompt '{\"image\": 1}'"
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "architectures",
            ["EagleLlamaForCausalLM"],
            "is a EagleLlamaForCausalLM, no drafter of SpecVLM; train one: vllm-plugins train "
            "specvlm",
        ),
        (
            "hidden_size",
            64,
            "has a hidden size of 64 and the target one of 128; take a drafter that was trained "
            "for this target",
        ),
        (
            "vocab_size",
            65,
            "has a vocabulary of 65 and the target one of 64; take a drafter that was trained for "
            "this target",
        ),
    ],
)
def test_drafters_of_something_else_are_refused(config, name, value, message):
    other = changed(config, "speculative_config.draft_model_config.hf_config", name, value)
    draft = other.speculative_config.draft_model_config
    object.__setattr__(draft, "hf_text_config", draft.hf_config)
    object.__setattr__(draft, "model_arch_config", draft.get_model_arch_config())
    assert check(other) == f"--plugin specvlm: model=drafter {message}".replace(
        "drafter ", "drafter: ", 1
    )


def test_a_checkpoint_without_its_block_is_refused(config):
    part = "speculative_config.draft_model_config.hf_config"
    said = check(changed(config, part, "specvlm", None))
    assert said == (
        "drafter/config.json: has no block 'specvlm'; train one: vllm-plugins train specvlm"
    )
    block = json.loads(json.dumps({"mode": "best"}))
    assert "specvlm.mode" in check(changed(config, part, "specvlm", block))
