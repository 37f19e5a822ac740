"""`--plugin` on every command line, in YAML and offline, and what it must not override."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest

import vllm_plugins
from tests.unit.fake_plugins import offer
from vllm_plugins.errors import PluginError
from vllm_plugins.plugin import SCHEDULER_HOST
from vllm_plugins.registry import entry_points
from vllm_plugins.settings import KEY, enabled_plugins, requested

STOCK = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048")
COMMANDS = (
    ("serve", "--help=all"),
    ("serve", "--help=plugin"),
    ("serve", "--help=vllm-plugins"),
    ("run-batch", "--help=plugin"),
    ("bench", "latency", "--help=plugin"),
    ("bench", "throughput", "--help=plugin"),
    ("bench", "startup", "--help=plugin"),
    ("launch", "render", "--help=plugin"),
)


@pytest.fixture(scope="module", autouse=True)
def flag_is_installed():
    import vllm.engine.arg_utils
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    assert vllm.engine.arg_utils.EngineArgs._vllm_plugins_flag


@pytest.fixture
def from_command_line(tiny_llama):
    """Engine arguments as a vLLM command makes them from its command line."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def parse(*words):
        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        return AsyncEngineArgs.from_cli_args(
            parser.parse_args(["--model", str(tiny_llama), *STOCK, *words])
        )

    return parse


def plugins_of(arguments) -> dict:
    found = requested(arguments.additional_config)
    return {
        spec.name: {
            key: spec.options[key] for key in ("tbt_slo_ms", "gamma") if key in spec.options
        }
        for spec in found
    }


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_with_engine_arguments_shows_the_flag(monkeypatch, capsys, words):
    from vllm.entrypoints.cli.main import main

    # The command line sets it for its children.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setattr(sys, "argv", ["vllm", *words])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--plugin NAME[:key=value,...]" in shown
    assert f"Installed: {', '.join(entry_points())}." in shown


def test_the_flag_expands_to_stock_arguments(from_command_line):
    from vllm.engine.arg_utils import AsyncEngineArgs

    arguments = from_command_line("--plugin", "sarathi:tbt_slo_ms=40", "--plugin", "spf:gamma=3")
    assert type(arguments) is AsyncEngineArgs
    assert arguments.scheduler_cls == SCHEDULER_HOST
    assert plugins_of(arguments) == {"sarathi": {"tbt_slo_ms": 40.0}, "spf": {"gamma": 3.0}}
    assert arguments.max_model_len == 2048


def test_without_the_flag_the_class_and_the_values_are_stocks(from_command_line):
    from vllm.engine.arg_utils import AsyncEngineArgs

    arguments = from_command_line()
    assert type(arguments) is AsyncEngineArgs
    assert arguments.scheduler_cls is None
    assert arguments.additional_config == {}


@pytest.mark.parametrize(
    "yaml",
    [
        "plugin: 'sarathi:tbt_slo_ms=40'",
        'plugin: \'{"name": "sarathi", "tbt_slo_ms": 40}\'',
        "plugin: ['sarathi:tbt_slo_ms=40']",
        "plugin:\n  - name: sarathi\n    tbt_slo_ms: 40",
        "plugin:\n  - sarathi:\n      tbt_slo_ms: 40",
        "plugin:\n  sarathi:\n    tbt_slo_ms: 40",
        "plugin:\n  name: sarathi\n  tbt_slo_ms: 40",
    ],
)
def test_one_plugin_from_a_configuration_file(from_command_line, tmp_path, yaml):
    path = tmp_path / "config.yaml"
    path.write_text(f"{yaml}\nmax-num-seqs: 7\n")
    arguments = from_command_line("--config", str(path))
    assert plugins_of(arguments) == {"sarathi": {"tbt_slo_ms": 40.0}}
    assert arguments.max_num_seqs == 7


@pytest.mark.parametrize(
    "yaml",
    [
        "plugin: ['sarathi:tbt_slo_ms=40', 'spf:gamma=3']",
        "plugin:\n  sarathi:\n    tbt_slo_ms: 40\n  spf:\n    gamma: 3",
        "plugin:\n  - name: sarathi\n    tbt_slo_ms: 40\n  - spf:gamma=3",
    ],
)
def test_two_plugins_from_a_configuration_file(from_command_line, tmp_path, yaml):
    path = tmp_path / "config.yaml"
    path.write_text(yaml)
    wanted = {"sarathi": {"tbt_slo_ms": 40.0}, "spf": {"gamma": 3.0}}
    assert plugins_of(from_command_line("--config", str(path))) == wanted


def test_a_file_and_the_command_line_add_up(from_command_line, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("plugin: 'spf:gamma=3'")
    arguments = from_command_line("--config", str(path), "--plugin", "sarathi")
    assert plugins_of(arguments).keys() == {"spf", "sarathi"}


def test_the_stock_spelling_does_the_same(from_command_line):
    stock = {"spf": {"gamma": 3}, "sarathi": {"tbt_slo_ms": 40}}
    spelt = from_command_line(
        "--scheduler-cls", SCHEDULER_HOST, "--additional-config", json.dumps({KEY: stock})
    )
    named = from_command_line("--plugin", "spf:gamma=3", "sarathi:tbt_slo_ms=40")
    assert spelt.scheduler_cls == named.scheduler_cls
    by_stock, by_name = (
        [(type(item.plugin), item.options) for item in enabled_plugins(a.create_engine_config())]
        for a in (spelt, named)
    )
    assert by_stock == by_name
    assert len(by_name) == 2


def test_other_additional_configuration_is_kept(from_command_line):
    config = {"mine": [1], KEY: {"spf": {"gamma": 3}}}
    arguments = from_command_line("--plugin", "sarathi", "--additional-config", json.dumps(config))
    assert arguments.additional_config["mine"] == [1]
    assert plugins_of(arguments) == {"spf": {"gamma": 3.0}, "sarathi": {"tbt_slo_ms": None}}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--plugin", "sarathi", "--scheduler-cls", "my.Scheduler"],
            f"--plugin sarathi: sets --scheduler-cls {SCHEDULER_HOST}, and so does "
            "--scheduler-cls my.Scheduler; drop --scheduler-cls or --plugin sarathi",
        ),
        (
            ["--plugin", "sarathi", "--plugin", "setter"],
            f"--plugin setter: sets --scheduler-cls some.other.Scheduler, and --plugin sarathi "
            f"sets it to {SCHEDULER_HOST}; drop one of the two",
        ),
        (
            ["--plugin", "spf", "--additional-config", '{"vllm_plugins": {"spf": {"gamma": 1}}}'],
            "--plugin spf: is also in --additional-config vllm_plugins; keep one of the two",
        ),
        (
            ["--plugin", "sarathi", "--plugin", "sarathi:margin=1.1"],
            "--plugin sarathi: is named twice; put all its options into one --plugin",
        ),
        (
            ["--additional-config", '{"vllm_plugins": {"spf": {"gamma": -1}}}'],
            "--plugin spf: gamma=-1: input should be greater than or equal to 0; "
            "see `vllm-plugins describe spf`",
        ),
    ],
)
def test_refusals_of_a_command_line_are_one_line(monkeypatch, from_command_line, words, message):
    offer(monkeypatch, setter="SchedulerSetter")
    with pytest.raises(SystemExit) as refused:
        from_command_line(*words)
    assert refused.value.code == f"vllm: error: {message}"


def test_the_same_value_as_the_plugins_is_no_conflict(from_command_line):
    arguments = from_command_line("--plugin", "sarathi", "--scheduler-cls", SCHEDULER_HOST)
    assert arguments.scheduler_cls == SCHEDULER_HOST


def pickled(arguments):
    return pickle.loads(pickle.dumps(arguments))


def as_an_offline_command_does(arguments):
    """`LLM.from_engine_args` keeps the values and neither the object nor its class."""
    from vllm.engine.arg_utils import EngineArgs

    names = {field.name for field in dataclasses.fields(EngineArgs)}
    return EngineArgs(**{key: value for key, value in vars(arguments).items() if key in names})


WAYS = [copy.deepcopy, pickled, as_an_offline_command_does]
NEEDS_CHUNKS = "--plugin sarathi: needs chunked prefill; drop --no-enable-chunked-prefill"


@pytest.mark.parametrize("sent", [lambda arguments: arguments, *WAYS])
def test_a_command_refuses_an_engine_in_the_front_end_without_a_trace(from_command_line, sent):
    arguments = from_command_line("--plugin", "sarathi", "--no-enable-chunked-prefill")
    with pytest.raises(SystemExit) as refused:
        sent(arguments).create_engine_config()
    assert refused.value.code == f"vllm: error: {NEEDS_CHUNKS}"


@pytest.mark.parametrize("stock", [True, False])
def test_a_program_gets_an_exception_for_an_engine_that_is_refused(tiny_llama, stock):
    from vllm.engine.arg_utils import EngineArgs

    plain = {"scheduler_cls": SCHEDULER_HOST, "additional_config": {KEY: {"sarathi": {}}}}
    offline = plain if stock else vllm_plugins.engine_args("sarathi")
    arguments = EngineArgs(str(tiny_llama), enable_chunked_prefill=False, **offline)
    with pytest.raises(PluginError) as refused:
        arguments.create_engine_config()
    assert str(refused.value) == NEEDS_CHUNKS


@pytest.mark.parametrize("sent", WAYS)
def test_engine_arguments_can_be_sent_to_another_process(from_command_line, sent):
    arguments = from_command_line("--plugin", "sarathi:tbt_slo_ms=40")
    twin = sent(arguments)
    assert plugins_of(twin) == plugins_of(arguments) == {"sarathi": {"tbt_slo_ms": 40.0}}
    assert vars(twin).items() <= vars(arguments).items()


CHILD = """
import pickle, sys
args = pickle.load(sys.stdin.buffer)
from vllm.engine.arg_utils import AsyncEngineArgs
made = AsyncEngineArgs.from_cli_args(args)
from vllm_plugins.settings import requested
print(made.scheduler_cls, [spec.name for spec in requested(made.additional_config)])
"""


def test_a_process_that_is_sent_the_command_line_knows_the_flag(tiny_llama):
    """As an API server that vLLM starts as a process of its own: it loads no entry point first."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    words = ["--model", str(tiny_llama), *STOCK, "--plugin", "sarathi", "spf"]
    args = pickle.dumps(copy.copy(parser.parse_args(words)))
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=args, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    said = done.stdout.decode().strip().splitlines()[-1]
    assert said == f"{SCHEDULER_HOST} ['sarathi', 'spf']"


def test_offline_arguments():
    offline = vllm_plugins.engine_args("sarathi", tbt_slo_ms=40, tile=16)
    assert offline.keys() == {"scheduler_cls", "additional_config"}
    (spec,) = requested(offline["additional_config"])
    assert spec.options.items() >= {"tbt_slo_ms": 40.0, "tile": 16}.items()
    assert vllm_plugins.engine_args() == {}


@pytest.mark.parametrize("specs", [(), ("sarathi", "spf")])
def test_offline_options_need_exactly_one_plugin(specs):
    with pytest.raises(PluginError) as refused:
        vllm_plugins.engine_args(*specs, gamma=1)
    assert str(refused.value) == (
        f"engine_args(..., gamma=...): options need exactly one plug-in, got {len(specs)}; "
        'put them into the names: engine_args("sarathi:tbt_slo_ms=40", "spf")'
    )


def test_registering_again_changes_nothing():
    """VLLM calls the entry point once in every place that loads plug-ins."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_plugins.activation import register

    def hooked():
        return (
            EngineArgs.add_cli_args,
            EngineArgs.from_cli_args.__func__,
            EngineArgs.create_engine_config,
        )

    before = hooked()
    register()
    assert hooked() == before
