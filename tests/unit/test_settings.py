"""Options reach every process, and the compile-cache key only where they must; and are checked."""

import copy
import dataclasses
import json
import multiprocessing
import pickle

import pytest

from tests.unit.fake_plugins import offer
from vllm_plugins import engine_args
from vllm_plugins.engine.cost_model import FEATURES
from vllm_plugins.engine.cost_profile import CostProfile, profile_key
from vllm_plugins.errors import PluginError
from vllm_plugins.registry import enable
from vllm_plugins.settings import KEY, PluginSettings, enabled_plugins, requested
from vllm_plugins.spec import PluginSpec, parse_specs

SARATHI = {"tbt_slo_ms": 40.0, "margin": 1.5}


def settings_of(*texts: str) -> PluginSettings:
    return PluginSettings.of(enable(parse_specs(texts)))


@pytest.fixture(scope="module")
def make_config(tiny_llama):
    from vllm.engine.arg_utils import EngineArgs

    def make(**arguments):
        stock = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048}
        return EngineArgs(model=str(tiny_llama), **(stock | arguments)).create_engine_config()

    return make


def test_as_a_json_value_only_graph_options_show(monkeypatch):
    offer(monkeypatch, graphy="GraphPlugin")
    assert json.dumps(settings_of("sarathi:tbt_slo_ms=40", "spf")) == '"{}"'
    assert str(settings_of("graphy:rank=2,label=y", "spf")) == '{"graphy": {"rank": 2}}'


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        *(lambda s, p=p: pickle.loads(pickle.dumps(s, p)) for p in (2, pickle.HIGHEST_PROTOCOL)),
    ],
)
def test_copies_carry_every_option(copied):
    settings = settings_of("sarathi:tbt_slo_ms=40,margin=1.5", "spf:gamma=3")
    twin = copied(settings)
    assert type(twin) is PluginSettings
    assert twin == settings
    assert twin.options == settings.options
    assert requested({KEY: twin}) == requested({KEY: settings})
    assert requested({KEY: twin})[0].options.items() >= SARATHI.items()


def _report(config, sender):
    enabled = enabled_plugins(config)
    options = {item.plugin.name: item.options.model_dump(mode="json") for item in enabled}
    sender.send((options, config.scheduler_config.scheduler_cls))


def test_options_reach_a_spawned_process(make_config):
    """As a worker receives them: the pickled configuration, in an interpreter of its own."""
    config = make_config(**engine_args("sarathi:tbt_slo_ms=40,margin=1.5", "spf:gamma=3"))
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_report, args=(config, sender))
    worker.start()
    sender.close()
    options, scheduler = receiver.recv()
    worker.join()
    assert options["sarathi"].items() >= SARATHI.items()
    assert options["spf"] == {"gamma": 3.0}
    assert scheduler == "vllm_plugins.engine.scheduler_host.create_scheduler"


def test_options_survive_dataclass_copies(tiny_llama):
    """Front ends turn engine arguments into dictionaries."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(model=str(tiny_llama), **engine_args("sarathi:tbt_slo_ms=40,margin=1.5"))
    additional = dataclasses.asdict(arguments)["additional_config"]
    assert requested(additional)[0].options.items() >= SARATHI.items()


def test_compile_cache_key_follows_graph_options_alone(make_config, monkeypatch):
    offer(monkeypatch, graphy="GraphPlugin")

    def key(*texts):
        return make_config(**engine_args(*texts)).compute_hash()

    assert (
        key("sarathi") == key("sarathi:tbt_slo_ms=40,margin=1.5") == key("spf:gamma=2", "sarathi")
    )
    assert key("graphy", "sarathi") == key("graphy:label=z") != key("graphy:rank=5")
    assert key("graphy") != key("sarathi")


def test_with_and_without_a_scheduler_the_key_differs_in_our_entry_alone(make_config):
    """The entry is the empty graph text, not the options, so it is the same for all of them."""
    config = make_config(**engine_args("sarathi"))
    plain = make_config().compute_hash()
    empty = make_config(additional_config={KEY: settings_of()})
    assert config.compute_hash() == empty.compute_hash()
    config.additional_config = {}
    assert config.compute_hash() == plain


@pytest.mark.parametrize(
    ("entry", "specs"),
    [
        (None, []),
        ({}, []),
        ({"spf": {}}, [PluginSpec("spf", {})]),
        ({"spf": {"gamma": 1}, "b": {}}, [PluginSpec("spf", {"gamma": 1}), PluginSpec("b", {})]),
    ],
)
def test_stock_spelling(entry, specs):
    assert requested({KEY: entry, "other": 1}) == specs
    assert requested(None) == requested({}) == []


@pytest.mark.parametrize("entry", ["sarathi", ["sarathi"], {"sarathi": 40}, {"sarathi": None}, 1])
def test_malformed_stock_spelling(entry):
    with pytest.raises(PluginError) as refused:
        requested({KEY: entry})
    assert str(refused.value) == (
        "--additional-config vllm_plugins: is not a mapping from plug-in names to their options; "
        'write {"vllm_plugins": {"sarathi": {"tbt_slo_ms": 40}}}'
    )


LONG_PREFILL = {"long_prefill_token_threshold": 64}


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (
            "sarathi",
            {"enable_chunked_prefill": False},
            "--plugin sarathi: needs chunked prefill; drop --no-enable-chunked-prefill",
        ),
        (
            "sarathi",
            {"runner": "pooling"},
            "--plugin sarathi: a pooling model has no decode steps; drop --plugin sarathi",
        ),
        (
            "sarathi:token_budget=300",
            {"max_num_batched_tokens": 256, "max_num_seqs": 8},
            "--plugin sarathi: token_budget=300: is more than --max-num-batched-tokens 256; "
            "lower the one or raise the other",
        ),
        (
            "sarathi:min_budget=300",
            {"max_num_batched_tokens": 256, "max_num_seqs": 8},
            "--plugin sarathi: min_budget=300: is more than --max-num-batched-tokens 256; "
            "lower the one or raise the other",
        ),
        (
            "sarathi:tile=64",
            {"max_num_batched_tokens": 300, "max_num_seqs": 8},
            "--plugin sarathi: tile=64: does not divide --max-num-batched-tokens 300; "
            "choose another tile or a multiple of it",
        ),
        (
            "sarathi:max_prefills_per_step=1",
            LONG_PREFILL,
            "--plugin sarathi: max_prefills_per_step=1: gives one prompt the whole budget, "
            "--long-prefill-token-threshold takes it away; drop one of the two",
        ),
        (
            "spf",
            {"scheduling_policy": "priority"},
            "--plugin spf: orders the waiting queue, and so does --scheduling-policy priority; "
            "drop --scheduling-policy or --plugin spf",
        ),
        (
            "sarathi:order=least_slack",
            {"scheduling_policy": "priority"},
            "--plugin sarathi: orders the waiting queue, and so does "
            "--scheduling-policy priority; drop --scheduling-policy or --plugin sarathi",
        ),
        (
            "cudaonly",
            {},
            "--plugin cudaonly: does not run on 'cpu'; use one of: cuda, rocm",
        ),
        (
            "newrunner",
            {},
            "--plugin newrunner: does not support model runner V1; set VLLM_USE_V2_MODEL_RUNNER=1",
        ),
    ],
)
def test_engines_that_a_plugin_cannot_serve(make_config, monkeypatch, text, arguments, message):
    offer(monkeypatch, cudaonly="CudaPlugin", newrunner="RunnerV2Plugin")
    on = engine_args(text)
    with pytest.raises(PluginError) as in_front:
        make_config(**arguments, **on)
    # An engine looks again, and has nothing but the configuration.
    config = make_config(**arguments)
    config.additional_config = on["additional_config"]
    with pytest.raises(PluginError) as in_engine:
        enabled_plugins(config)
    assert str(in_front.value) == str(in_engine.value) == message


def test_what_is_refused_above_is_served_otherwise(make_config):
    """Each refusal has a neighbour that works, so that none of them refuses everything."""
    for text, arguments in (
        ("sarathi:token_budget=256,tile=64", {"max_num_batched_tokens": 256, "max_num_seqs": 8}),
        ("sarathi", LONG_PREFILL),
        ("sarathi", {"scheduling_policy": "priority"}),
    ):
        (item,) = enabled_plugins(make_config(**arguments, **engine_args(text)))
        assert item.plugin.name == "sarathi"


@pytest.fixture
def write_profile(make_config, tmp_path):
    def write(constant=0.01, **key):
        coefficients = (constant,) + (0.0,) * (len(FEATURES) - 1)
        measured = profile_key(make_config()).model_copy(update=key)
        profile = CostProfile(key=measured, coefficients=coefficients, knee=None, tile=1)
        path = tmp_path / "profile.json"
        path.write_text(profile.model_dump_json())
        return path

    return write


MEASURE = "measure one with `vllm-plugins profile MODEL`"


def check_profile(make_config, path, **options):
    config = make_config(**engine_args("sarathi", profile=str(path), **options))
    return enabled_plugins(config)


def test_a_profile_of_this_engine_is_accepted(make_config, write_profile):
    (item,) = check_profile(make_config, write_profile(), tbt_slo_ms=40)
    assert item.options.profile == write_profile()


@pytest.mark.parametrize(
    ("field", "found"),
    [("model", "Other-1"), ("dtype", "bfloat16"), ("tensor_parallel", 2), ("pipeline_parallel", 2),
     ("device", "H200"), ("vllm", "0.1")],
)  # fmt: skip
def test_a_profile_of_another_engine_is_refused(make_config, write_profile, field, found):
    path = write_profile(**{field: found})
    wanted = getattr(profile_key(make_config()), field)
    with pytest.raises(PluginError) as refused:
        check_profile(make_config, path)
    assert str(refused.value) == (
        f"--plugin sarathi: profile={path}: was measured with {field}={found}, "
        f"this engine has {wanted}; {MEASURE}"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("nonsense", "is not a cost profile (: Invalid JSON: expected ident at line 1 column 2)"),
        ("{}", "is not a cost profile (key: Field required)"),
        (" " * ((1 << 20) + 1), "is larger than 1048576 bytes"),
    ],
)
def test_files_that_are_no_profile(make_config, tmp_path, content, reason):
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(PluginError) as refused:
        check_profile(make_config, path)
    assert str(refused.value) == f"--plugin sarathi: profile={path}: {reason}; {MEASURE}"


def test_a_target_that_no_step_can_meet(make_config, write_profile):
    path = write_profile(constant=0.5)
    on = engine_args("sarathi", profile=str(path), tbt_slo_ms=40)
    with pytest.raises(PluginError) as refused:
        make_config(max_num_seqs=8, **on)
    assert str(refused.value) == (
        "--plugin sarathi: tbt_slo_ms=40: a step of 2 decodes alone takes 500 ms here; "
        "allow at least 500 ms or lower --max-num-seqs"
    )
