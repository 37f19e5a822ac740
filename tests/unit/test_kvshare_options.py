"""What KVShare refuses, with the exact words, before anything runs."""

import copy
import json

import pytest

from tests.models import tiny_llama
from vllm_plugins import engine_args
from vllm_plugins.activation import configure
from vllm_plugins.cli.describe import describe, stock_arguments
from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.kvshare.deviation import SELECTORS
from vllm_plugins.kv_connectors.kvshare.plugin import (
    TRANSFER,
    KVShareOptions,
    KVSharePlugin,
    resolved,
)
from vllm_plugins.registry import enable
from vllm_plugins.settings import KEY, PluginSettings
from vllm_plugins.spec import parse_specs

DESCRIBE = "see `vllm-plugins describe kvshare`"


def refusal(*texts: str) -> str:
    with pytest.raises(PluginError) as caught:
        enable(parse_specs(texts))
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("chunk_min=600", "chunk_min=600 exceeds chunk_max=512"),
        ("recompute_min=0.5", "recompute_min=0.5 exceeds recompute_max=0.15"),
        ("min_run=1000", "min_run=1000 exceeds chunk_max=512"),
        ("link_tokens=40", "link_tokens=40 exceeds min_run=32"),
        (
            "mode=exact_only,recompute_max=0.5",
            "mode=exact_only recomputes nothing, so recompute_max has no meaning",
        ),
        ("disk_gib=8", "disk_gib has no meaning without disk_path"),
        (
            "disk_path=/x,disk_gib=2",
            "disk_gib=2 is below host_gib=4, which is a cache of it",
        ),
        ("device_gib=5", "device_gib=5 exceeds host_gib=4, of which it is a cache"),
        (
            "mode=exact_only,selector=epic",
            "mode=exact_only recomputes nothing, so selector has no meaning",
        ),
    ],
)
def test_options_that_contradict_one_another_are_refused(options, message):
    assert refusal(f"kvshare:{options}") == f"--plugin kvshare: {message}; {DESCRIBE}"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("min_run=15", "input should be greater than or equal to 16"),
        ("recompute_max=1.5", "input should be less than or equal to 1"),
        ("host_gib=0", "input should be greater than 0"),
        ("host_gib=inf", "input should be a finite number"),
        ("decode_k=513", "input should be less than or equal to 512"),
        ("link_tokens=257", "input should be less than or equal to 256"),
        ("mode=mix", "input should be 'blend' or 'exact_only'"),
        ("order=random", "input should be 'arrival' or 'hit_rate'"),
    ],
)
def test_values_out_of_range_are_refused(option, message):
    said = refusal(f"kvshare:{option}")
    where, _, reason = said.removesuffix(f"; {DESCRIBE}").rpartition(": ")
    name, value = option.split("=")
    assert where == f"--plugin kvshare: {name}={value}"
    assert reason == message


def test_an_unknown_option_is_refused_with_the_nearest():
    assert refusal("kvshare:recompute=0.2").startswith(
        "--plugin kvshare: recompute: unknown option; did you mean 'recompute_m"
    )


def test_the_selectors_of_the_option_are_those_there_are():
    schema = KVShareOptions.model_json_schema()["properties"]["selector"]
    assert schema["enum"] == list(SELECTORS)


def test_options_travel_with_all_their_values_and_mean_the_same():
    for text in ("kvshare", "kvshare:mode=exact_only", "kvshare:recompute_min=1,recompute_max=1"):
        (item,) = enable(parse_specs([text]))
        assert KVShareOptions.model_validate(item.options.model_dump(mode="json")) == item.options


def test_the_order_of_waiting_requests_has_one_owner():
    slack = "sarathi:order=least_slack"
    said = refusal(slack, "kvshare:order=hit_rate")
    assert said.startswith("--plugin kvshare: orders the waiting queue, and so does 'sarathi'; ")
    enable(parse_specs([slack, "kvshare"]))
    enable(parse_specs(["sarathi", "kvshare:order=hit_rate"]))


@pytest.mark.parametrize(
    "order", [("spf", "kvshare:order=hit_rate"), ("kvshare:order=hit_rate", "spf")]
)
def test_the_order_by_prefill_is_refined_and_has_still_one_owner(order):
    enable(parse_specs(order))
    said = refusal("sarathi:order=least_slack", *order)
    assert said.startswith("--plugin spf: orders the waiting queue, and so does 'sarathi'; ")


# --- the stock arguments ---


def test_it_sets_worker_and_connector_and_the_scheduler_only_to_order():
    plain, ordered = (engine_args(f"kvshare:order={order}") for order in ("arrival", "hit_rate"))
    assert plain["worker_cls"] == "vllm_plugins.engine.worker_host.PluginWorker"
    assert plain["kv_transfer_config"] == TRANSFER
    assert "scheduler_cls" not in plain
    assert ordered["scheduler_cls"] == "vllm_plugins.engine.scheduler_host.create_scheduler"


def test_the_stock_spelling_can_be_given_in_its_place():
    (item,) = enable(parse_specs(["kvshare:theta=3"]))
    words = stock_arguments(item)
    arguments = dict(zip(words[::2], words[1::2], strict=True))
    assert arguments.keys() == {"--worker-cls", "--kv-transfer-config", "--additional-config"}
    assert json.loads(arguments["--additional-config"]) == {KEY: {"kvshare": {"theta": 3}}}

    from vllm.config import KVTransferConfig

    same = KVTransferConfig(**json.loads(arguments["--kv-transfer-config"]))
    arguments = configure([item], {"kv_transfer_config": same}, {"kv_transfer_config": None})
    assert "kv_transfer_config" not in arguments.changes


def test_describing_it_imports_no_vllm(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "vllm", None)
    assert describe(*parse_specs(["kvshare"]))["requires"]["vllm"] == ">=0.31"


def test_another_connector_is_refused():
    from vllm.config import KVTransferConfig

    other = KVTransferConfig(kv_connector="SharedStorageConnector", kv_role="kv_both")
    with pytest.raises(PluginError) as caught:
        configure(
            enable(parse_specs(["kvshare"])),
            {"kv_transfer_config": other},
            {"kv_transfer_config": None},
        )
    assert str(caught.value) == (
        "--plugin kvshare: is a KV connector, and --kv-transfer-config names another; "
        "drop one of the two"
    )


def test_another_worker_is_refused():
    with pytest.raises(PluginError) as caught:
        configure(
            enable(parse_specs(["kvshare"])), {"worker_cls": "my.Worker"}, {"worker_cls": "auto"}
        )
    assert str(caught.value) == (
        "--plugin kvshare: sets --worker-cls vllm_plugins.engine.worker_host.PluginWorker, and so "
        "does --worker-cls my.Worker; drop --worker-cls or --plugin kvshare"
    )


# --- the finished configuration ---


@pytest.fixture(scope="module")
def config():
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048}
    return EngineArgs(model=str(tiny_llama(layers=4)), **arguments).create_engine_config()


def check(config, **options) -> str:
    """Return what the plug-in says to a configuration; empty where it is content."""
    try:
        KVSharePlugin().check(KVShareOptions(**options), config)
    except PluginError as error:
        return str(error)
    return ""


def layers_of(config) -> int:
    return config.model_config.get_total_num_hidden_layers()


def test_a_plain_configuration_is_served(config):
    assert check(config, check_layer=layers_of(config) - 2) == ""


def test_a_check_layer_that_leaves_nothing_above_is_refused(config):
    layers = layers_of(config)
    assert check(config, check_layer=layers - 1) == (
        f"--plugin kvshare: check_layer={layers - 1}: leaves no layer to save work in; the model "
        f"has {layers}; choose at most {layers - 2}"
    )


def test_a_weight_of_waiting_that_spf_overrules_is_refused(config):
    beside = copy.copy(config)
    specs = enable(parse_specs(["spf", "kvshare:order=hit_rate"]))
    beside.additional_config = {KEY: PluginSettings.of(specs)}
    assert check(beside, order="hit_rate") == check(beside, full_hit_ms=1.0) == ""
    assert check(config, order="hit_rate", full_hit_ms=1.0) == ""
    assert check(beside, order="hit_rate", full_hit_ms=1.0) == (
        "--plugin kvshare with spf: its gamma, not full_hit_ms, says how waiting weighs; "
        "drop full_hit_ms"
    )


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        (
            "parallel_config",
            "pipeline_parallel_size",
            2,
            "--plugin kvshare with --pipeline-parallel-size: stages would need each other's hidden "
            "states to recompute a token; use tensor parallelism",
        ),
        (
            "parallel_config",
            "decode_context_parallel_size",
            2,
            "--plugin kvshare with --decode-context-parallel-size: a token's KV would be split; "
            "drop it",
        ),
    ],
    ids=["pipeline", "decode-context"],
)
def test_other_parallelism_is_refused(config, part, name, value, message):
    changed = copy.deepcopy(config)
    object.__setattr__(getattr(changed, part), name, value)
    assert check(changed) == message


def test_a_slice_longer_than_a_step_is_refused_and_the_default_follows_the_step(config):
    most = config.scheduler_config.max_num_batched_tokens
    assert check(config, fix_tokens_per_step=most) == ""
    assert check(config, fix_tokens_per_step=most + 1) == (
        f"--plugin kvshare: fix_tokens_per_step={most + 1}: exceeds --max-num-batched-tokens, "
        f"{most}, so that a step would be longer than any other; lower it or raise "
        "--max-num-batched-tokens"
    )
    small = copy.deepcopy(config)
    small.scheduler_config.max_num_batched_tokens = 256
    assert check(small) == ""
    assert resolved(KVShareOptions(), small).fix_tokens_per_step == 256
    assert resolved(KVShareOptions(fix_tokens_per_step=64), small).fix_tokens_per_step == 64


def test_a_device_tier_without_a_device_is_refused(config):
    assert check(config, device_gib=1) == (
        "--plugin kvshare: device_gib=1: there is no device memory apart from the host's; drop it "
        "and raise host_gib"
    )


def test_a_folder_that_others_can_write_to_is_refused(config, tmp_path):
    tmp_path.chmod(0o777)
    assert check(config, disk_path=tmp_path) == (
        f"--plugin kvshare: disk_path={tmp_path}: can be written to by others; "
        f"chmod go-w {tmp_path}"
    )


def test_adapters_are_refused(config):
    from vllm.config import LoRAConfig

    changed = copy.deepcopy(config)
    changed.lora_config = LoRAConfig()
    assert check(changed) == (
        "--plugin kvshare with --enable-lora: recomputed tokens would miss the adapter; "
        "drop one of the two"
    )


@pytest.mark.parametrize(("method", "served"), [("ngram", True), ("eagle", False), ("mtp", False)])
def test_drafters_that_need_hidden_states_are_refused(config, method, served):
    from vllm.config import SpeculativeConfig

    changed = copy.deepcopy(config)
    drafter = SpeculativeConfig(method="ngram", num_speculative_tokens=2, prompt_lookup_max=3)
    object.__setattr__(drafter, "method", method)
    changed.speculative_config = drafter
    message = (
        "--plugin kvshare with --speculative-config: the drafter needs hidden states of the tokens "
        "that are not computed; use method 'ngram' or 'suffix'"
    )
    assert check(changed) == ("" if served else message)


def test_other_architectures_are_refused(config):
    from vllm_plugins.engine.partial_forward import check_architecture

    changed = copy.deepcopy(config)
    changed.model_config.hf_config.architectures = ["GemmaForCausalLM"]
    changed.model_config.model_arch_config.architectures = ["GemmaForCausalLM"]
    message = (
        "--plugin kvshare: cannot run the layers of GemmaForCausalLM one by one; use a model of "
        "type LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, "
        "Qwen2VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration, Qwen3ForCausalLM, "
        "Qwen3VLForConditionalGeneration"
    )
    assert check(changed) == message
    with pytest.raises(PluginError) as caught:
        check_architecture("--plugin kvshare", ["GemmaForCausalLM"])
    assert str(caught.value) == message
