"""What EPD refuses, with the exact words, and the stock arguments that it sets."""

import copy
import json

import pytest
from vision import tiny_llava

from tests.models import tiny_llama
from vllm_plugins.activation import configure
from vllm_plugins.cli.describe import describe, stock_arguments
from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.epd.plugin import (
    CONNECTOR,
    MANAGER,
    MODULE,
    EpdOptions,
    EpdPlugin,
    available_memory,
)
from vllm_plugins.plugin import SCHEDULER_HOST
from vllm_plugins.registry import enable
from vllm_plugins.spec import parse_specs

DESCRIBE = "see `vllm-plugins describe epd`"


def refusal(text: str) -> str:
    with pytest.raises(PluginError) as caught:
        enable(parse_specs([text]))
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "role=prefill,fetch_timeout_s=30",
            "fetch_timeout_s=30 must be below lease_s=30: an item may be gone before it is given "
            "up",
        ),
        (
            "role=encode,on_missing=encode_local",
            "on_missing=encode_local has no meaning with role=encode",
        ),
        (
            "role=encode,bind_host=0.0.0.0,allow_remote=true",
            "bind_host=0.0.0.0 is no address that others can connect to: name the one of the "
            "network they are in",
        ),
        ("role=encode,bind_host=10.0.0.1", "bind_host=10.0.0.1 needs allow_remote=true"),
        (
            "role=encode,bind_host=10.0.0.1,allow_remote=true",
            "allow_remote=true needs secret_file, which all servers share",
        ),
        (
            "role=prefill,allow_remote=true",
            "allow_remote=true needs secret_file, which all servers share",
        ),
        ("role=encode,bind_host=gpu7", "bind_host=gpu7 is not an IP address"),
    ],
)
def test_options_that_contradict_one_another_are_refused(options, message):
    assert refusal(f"epd:{options}") == f"--plugin epd: {message}; {DESCRIBE}"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("tokens_per_block=0", "input should be greater than or equal to 1"),
        ("arena_bytes=0", "input should be greater than or equal to 1"),
        ("lease_s=0", "input should be greater than 0"),
        ("fetch_timeout_s=inf", "input should be a finite number"),
        ("port=70000", "input should be less than or equal to 65535"),
        ("on_missing=wait", "input should be 'fail' or 'encode_local'"),
    ],
)
def test_values_out_of_range_are_refused(option, message):
    said = refusal(f"epd:role=prefill,{option}")
    name, value = option.split("=")
    assert said == f"--plugin epd: {name}={value}: {message}; {DESCRIBE}"


def test_a_role_must_be_chosen():
    assert refusal("epd") == f"--plugin epd: role={{}}: field required; {DESCRIBE}"


# --- the stock arguments ---


def changes(text, **current):
    from vllm.config.ec_manager_config import EncoderCacheManagerConfig

    defaults = {"ec_transfer_config": None, "ec_manager_config": EncoderCacheManagerConfig()}
    return configure(enable(parse_specs([text])), {**defaults, **current}, defaults).changes


@pytest.mark.parametrize(
    ("role", "ec_role"),
    [("encode", "ec_producer"), ("prefill", "ec_consumer"), ("colocated", "ec_both")],
)
def test_it_sets_connector_and_manager_and_the_scheduler_where_requests_are_awaited(role, ec_role):
    made = changes(f"epd:role={role}")
    assert made["ec_transfer_config"] == {
        "ec_connector": CONNECTOR,
        "ec_connector_module_path": MODULE,
        "ec_role": ec_role,
    }
    assert made["ec_manager_config"] == {"encoder_cache_manager_cls": MANAGER}
    assert made.get("scheduler_cls") == (None if role == "encode" else SCHEDULER_HOST)


def test_the_stock_spelling_can_be_given_in_its_place():
    from vllm.config import ECTransferConfig
    from vllm.config.ec_manager_config import EncoderCacheManagerConfig

    (item,) = enable(parse_specs(["epd:role=prefill"]))
    words = stock_arguments(item)
    given = dict(zip(words[::2], words[1::2], strict=True))
    made = changes(
        "epd:role=prefill",
        ec_transfer_config=ECTransferConfig(**json.loads(given["--ec-transfer-config"])),
        ec_manager_config=EncoderCacheManagerConfig(**json.loads(given["--ec-manager-config"])),
    )
    assert made.keys() == {"scheduler_cls", "additional_config"}


def test_another_connector_or_manager_is_refused():
    from vllm.config import ECTransferConfig
    from vllm.config.ec_manager_config import EncoderCacheManagerConfig

    other = ECTransferConfig(ec_connector="ECExampleConnector", ec_role="ec_consumer")
    with pytest.raises(PluginError) as caught:
        changes("epd:role=prefill", ec_transfer_config=other)
    assert str(caught.value) == (
        "--plugin epd: is an EC connector, and --ec-transfer-config names another; "
        "drop one of the two"
    )
    manager = EncoderCacheManagerConfig(encoder_cache_manager_cls="my.Manager")
    with pytest.raises(PluginError) as caught:
        changes("epd:role=prefill", ec_manager_config=manager)
    assert str(caught.value) == (
        "--plugin epd: has an encoder cache manager, and --ec-manager-config names another; "
        "drop one of the two"
    )


def test_a_kv_connector_may_stand_beside_it():
    made = changes("epd:role=prefill", kv_transfer_config={"kv_connector": "X"})
    assert "kv_transfer_config" not in made


def test_describing_it_imports_no_vllm(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "vllm", None)
    assert describe(*parse_specs(["epd:role=encode"]))["requires"]["vllm"] == ">=0.32"


# --- the finished configuration ---


def config_of(model, **arguments):
    from vllm.engine.arg_utils import EngineArgs

    common = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}
    return EngineArgs(model=str(model), **common, **arguments).create_engine_config()


@pytest.fixture(scope="module")
def config():
    return config_of(tiny_llava())


def check(config, **options) -> str:
    """Return what the plug-in says to a configuration; empty where it is content."""
    try:
        EpdPlugin().check(EpdOptions(**{"role": "prefill", **options}), config)
    except PluginError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("role", ["encode", "prefill", "colocated"])
def test_a_plain_configuration_is_served(config, role):
    assert check(config, role=role) == ""


@pytest.mark.parametrize("role", ["encode", "prefill", "colocated"])
def test_a_text_model_is_refused(role):
    assert check(config_of(tiny_llama()), role=role) == (
        f"--plugin epd:role={role}: the model takes text alone; use a multimodal model"
    )


def changed(config, part, name, value):
    copied = copy.deepcopy(config)
    object.__setattr__(getattr(copied, part), name, value)
    return copied


def test_pipeline_parallelism_is_refused(config):
    assert check(changed(config, "parallel_config", "pipeline_parallel_size", 2)) == (
        "--plugin epd:role=prefill: with --pipeline-parallel-size only the first stage's workers "
        "take embeddings; use tensor parallelism"
    )


def test_one_port_for_several_engines_is_refused(config):
    several = changed(config, "parallel_config", "data_parallel_size", 2)
    assert check(several, role="encode", port=4000) == (
        "--plugin epd:role=encode: with --data-parallel-size every engine listens, and there is "
        "one port=4000; drop port"
    )
    assert check(several, role="encode") == ""


def test_an_arena_smaller_than_one_image_is_refused(config):
    from vllm_plugins.kv_connectors.epd.assembly import check_largest_item

    options = EpdOptions(role="encode", arena_bytes=4096, tokens_per_block=8)
    with pytest.raises(PluginError) as caught:
        check_largest_item(config, options, 1)
    assert str(caught.value) == (
        "--plugin epd: arena_bytes=4096: holds 8 embeddings, and one item of this model may have "
        "16; raise it"
    )
    check_largest_item(config, options, 2)


def test_early_prefill_needs_chunked_prefill(config):
    whole = changed(config, "scheduler_config", "enable_chunked_prefill", False)
    assert check(whole) == (
        "--plugin epd:role=prefill: early_prefill needs chunked prefill; set early_prefill=false, "
        "or drop --no-enable-chunked-prefill"
    )
    assert check(whole, early_prefill=False) == ""
    assert check(whole, role="encode") == ""


@pytest.mark.parametrize("role", ["encode", "prefill"])
def test_a_server_that_encodes_has_no_use_for_drafts(role):
    drafting = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    said = check(config_of(tiny_llava(), speculative_config=drafting), role=role)
    assert said == (
        "--plugin epd:role=encode: a server that encodes decodes nothing, so --speculative-config "
        "has no meaning; drop it"
        if role == "encode"
        else ""
    )


@pytest.mark.parametrize(
    "skipping", [{"language_model_only": True}, {"limit_mm_per_prompt": {"image": 0}}]
)
def test_what_is_missing_cannot_be_encoded_without_an_encoder(skipping):
    skipped = config_of(tiny_llava(), **skipping)
    assert check(skipped, on_missing="encode_local") == (
        "--plugin epd:role=prefill: on_missing=encode_local needs the encoder, whose weights are "
        "not loaded; drop on_missing, or --language-model-only and limits of 0 in "
        "--limit-mm-per-prompt"
    )
    assert check(skipped) == ""


def test_an_arena_beyond_the_free_memory_is_refused(config):
    said = check(config, arena_bytes=1 << 60)
    assert said.startswith(f"--plugin epd: arena_bytes={1 << 60}: exceeds the ")
    assert said.endswith(" bytes of memory that are free; lower it")


def test_free_memory_is_what_linux_says_can_be_taken():
    text = "MemTotal:       100 kB\nMemFree:  10 kB\nMemAvailable:   50 kB\n"
    assert available_memory(text) == 50 << 10
    with pytest.raises(ValueError, match="does not tell the available memory"):
        available_memory("MemTotal: 1 kB\n")


def test_a_secret_that_others_can_read_is_refused(config, tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(b"x" * 32)
    path.chmod(0o644)
    assert "others may read or write it" in check(config, secret_file=path)
    path.chmod(0o600)
    assert check(config, secret_file=path) == ""
