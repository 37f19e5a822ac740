"""The `vllm-plugins` command: what it prints, and that it stays light."""

import json
import re
import resource
import subprocess
import sys

import pytest
from packaging.version import Version

from tests.unit.fake_plugins import offer
from vllm_plugins import __version__
from vllm_plugins.cli import describe, doctor, main
from vllm_plugins.cli import list as listing
from vllm_plugins.errors import PluginError
from vllm_plugins.plugin import Options, Requirements
from vllm_plugins.registry import enable, entry_points, load, validate_options
from vllm_plugins.settings import KEY, requested
from vllm_plugins.spec import PluginSpec, parse_specs

OWN = sorted(name for name, point in entry_points().items() if point.module.startswith(f"{KEY}."))
# With options that show quoting, null, a choice and a boolean.
SPECS = ("sarathi", "spf:gamma=0", "sarathi:tbt_slo_ms=40,order=fcfs,online_fit=true,profile=null")


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main.main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("words", [["--help"], ["list"], ["list", "--json"], ["describe", "spf"]])
def test_quick_commands_import_neither_torch_nor_vllm(words):
    script = (
        "import sys\nfrom vllm_plugins.cli.main import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'vllm', 'numpy', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"


def test_list_takes_less_than_a_second():
    """Processor time, which other load on the machine does not change; best of three."""

    def seconds(*words: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds("-m", "vllm_plugins.cli.main", "list") for _ in range(3)) < 1.0


def test_the_table_of_commands_repeats_each_modules_own_help():
    for name, text in main.COMMANDS.items():
        assert text == main.command_module(name).HELP


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        main.main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: vllm-plugins {name}" in capsys.readouterr().out


def test_help_shows_every_command_and_version_is_printed(capsys):
    for word, wanted in (("--help", list(main.COMMANDS)), ("--version", [__version__])):
        with pytest.raises(SystemExit) as end:
            main.main([word])
        assert end.value.code == 0
        shown = capsys.readouterr().out
        assert all(text in shown for text in wanted)


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["lisst"])
    assert end.value.code == 2
    assert "invalid choice: 'lisst'" in capsys.readouterr().err


def test_a_refusal_is_one_line_on_standard_error(capsys):
    code, out, err = run(capsys, "describe", "spff")
    assert (code, out) == (2, "")
    assert err == (
        "vllm-plugins: --plugin spff: no such plug-in; did you mean 'spf'? installed: "
        f"{', '.join(entry_points())}\n"
    )


def test_list_shows_every_plugin_with_its_source(capsys):
    _, text, _ = run(capsys, "list")
    _, raw, _ = run(capsys, "list", "--json")
    rows = {row["name"]: row for row in json.loads(raw)}
    assert list(rows) == list(entry_points())
    for name in OWN:
        plugin, row = load(name), rows[name]
        assert (row["family"], row["exactness"]) == (plugin.family, plugin.exactness)
        assert (row["distribution"], row["version"]) == ("vllm-plugins", __version__)
        assert plugin.summary == row["summary"]
        assert re.search(rf"^{name} .*{re.escape(plugin.summary)}$", text, re.MULTILINE)


def test_a_plugin_that_does_not_load_is_listed_as_such(capsys, monkeypatch):
    offer(monkeypatch, gone="no_such_module:Plugin", odd="NOT_A_PLUGIN")
    code, text, _ = run(capsys, "list")
    assert code == 0
    assert "does not load: no_such_module:Plugin does not load (ModuleNotFoundError" in text
    assert "odd" in text
    assert "is not a subclass" in text
    assert all(name in text for name in OWN)


@pytest.mark.parametrize("name", OWN)
def test_describe_shows_all_that_is_declared(name, capsys):
    plugin = load(name)
    _, text, _ = run(capsys, "describe", name)
    flat = " ".join(text.split())
    for key, field in plugin.Options.model_fields.items():
        assert f" {key} (" in flat
        assert field.description
        assert " ".join(field.description.split()) in flat
    for paper in plugin.papers:
        assert paper.title in flat
        assert paper.arxiv in flat
    assert plugin.summary in flat
    assert plugin.exactness in flat


def test_describe_shows_requirements_and_conflicts(capsys, monkeypatch):
    offer(monkeypatch, loner="LonerPlugin", cudaonly="CudaPlugin", newer="NewerPlugin")
    assert "conflicts with sarathi: both own the step" in run(capsys, "describe", "loner")[1]
    assert "requires: platform cuda or rocm" in run(capsys, "describe", "cudaonly")[1]
    assert "requires: vLLM >=99" in run(capsys, "describe", "newer")[1]


def test_the_option_table_comes_from_the_schema(monkeypatch):
    offer(monkeypatch, graphy="GraphPlugin")
    rank, label = describe.option_table(load("graphy").Options)
    assert rank == {
        "name": "rank",
        "type": "integer",
        "default": 4,
        "required": False,
        "bounds": ">= 1, <= 8",
        "description": "",
        "graph": True,
    }
    assert (label["type"], label["default"], label["graph"]) == ("string", "x", False)


def test_option_types_are_readable():
    from typing import Literal

    class Wide(Options):
        choice: Literal["a", "b"] | None = None
        sizes: tuple[int, ...] = ()
        name: str

    choice, sizes, name = describe.option_table(Wide)
    assert choice["type"] == "one of a, b or null"
    assert sizes["type"] == "list of integer"
    assert (name["required"], choice["required"]) == (True, False)


def test_metrics_are_those_of_the_policies(capsys):
    """Read from source for speed; the classes themselves are the truth."""
    from vllm_plugins.metrics import PREFIX
    from vllm_plugins.schedulers.sarathi.policy import SarathiPolicy
    from vllm_plugins.schedulers.spf.policy import SpfPolicy

    for name, policy in (("sarathi", SarathiPolicy), ("spf", SpfPolicy)):
        _, raw, _ = run(capsys, "describe", name, "--json")
        shown = {(m["name"], m["kind"], m["help"]) for m in json.loads(raw)["metrics"]}
        assert shown == {(PREFIX + spec.name, spec.kind, spec.help) for spec in policy.metrics}


@pytest.mark.parametrize("text", SPECS)
def test_the_stock_spelling_means_the_same(text, capsys):
    code, raw, _ = run(capsys, "describe", text, "--json")
    assert code == 0
    words = json.loads(raw)["stock_arguments"]
    arguments = dict(zip(words[::2], words[1::2], strict=True))
    assert arguments.keys() == {"--scheduler-cls", "--additional-config"}
    (stock,) = enable(requested(json.loads(arguments["--additional-config"])))
    (named,) = enable(parse_specs([text]))
    assert stock.options == named.options
    assert stock.plugin.name == named.plugin.name


def test_the_stock_spelling_can_be_pasted(capsys):
    import shlex

    _, text, _ = run(capsys, "describe", "sarathi:tbt_slo_ms=40")
    words = shlex.split(text.splitlines()[-1])
    assert words[:3] == ["vllm", "serve", "MODEL"]
    assert json.loads(words[-1]) == {KEY: {"sarathi": {"tbt_slo_ms": 40.0}}}


def test_values_become_words():
    assert describe._words("async_scheduling", False) == ["--no-async-scheduling"]
    assert describe._words("enforce_eager", True) == ["--enforce-eager"]
    assert describe._words("logits_processors", ["a:A", "b:B"]) == [
        "--logits-processors", "a:A", "b:B",
    ]  # fmt: skip
    assert describe._words("kv_transfer_config", {"a": 1}) == ["--kv-transfer-config", '{"a": 1}']


def test_several_plugins_cannot_be_described_at_once():
    args = describe.argparse.Namespace(plugin='["spf", "sarathi"]', json=False)
    with pytest.raises(PluginError, match="names several plug-ins; describe one"):
        describe.run(args)


CPU = doctor.Engine("cpu", "a processor", "V1")


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        (Requirements(), []),
        (Requirements(vllm=">=99"), ["needs vLLM >=99, found 0.32.0"]),
        (
            Requirements(platforms=frozenset({"rocm", "cuda"}), runners=frozenset({"V2"})),
            ["needs platform cuda or rocm, found cpu", "needs model runner V2, found V1"],
        ),
        (Requirements(platforms=frozenset({"cpu"}), runners=frozenset({"V1", "V2"})), []),
    ],
)
def test_doctor_gives_every_reason(needs, expected):
    assert doctor.reasons(needs, Version("0.32.0"), CPU) == expected


def test_doctor_does_not_judge_what_it_could_not_ask():
    needs = Requirements(platforms=frozenset({"cuda"}), runners=frozenset({"V2"}))
    assert doctor.reasons(needs, None, doctor.Engine()) == []


@pytest.fixture
def fine(monkeypatch):
    monkeypatch.setattr(doctor, "ask_engine", lambda: CPU)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return monkeypatch


def test_doctor_finds_nothing_wrong_here(fine, capsys):
    code, text, _ = run(capsys, "doctor")
    assert code == 0
    assert "no problem found" in text
    assert "vllm_plugins.activation:register" in text
    assert re.search(r"^ +spf +can run here", text, re.MULTILINE)


def test_doctor_says_what_cannot_run(fine, capsys):
    offer(fine, cudaonly="CudaPlugin", gone="no_such_module:Plugin")
    code, raw, _ = run(capsys, "doctor", "--json")
    verdicts = {verdict["name"]: verdict["reasons"] for verdict in json.loads(raw)["plugins"]}
    assert code == 0
    assert verdicts["cudaonly"] == ["needs platform cuda or rocm, found cpu"]
    assert verdicts["gone"][0].startswith("does not load: no_such_module:Plugin")
    assert verdicts["spf"] == []


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (None, "vLLM is not installed; install a vLLM "),
        (Version("0.20.0"), "vLLM 0.20.0 is outside the supported range "),
    ],
)
def test_doctor_fails_without_a_supported_vllm(found, expected, fine, capsys):
    from vllm_plugins import versions

    for module in (versions, doctor):
        fine.setattr(module, "installed_vllm", lambda: found)
    fine.setattr(doctor, "ask_engine", lambda: pytest.fail("an unsupported vLLM was imported"))
    code, raw, _ = run(capsys, "doctor", "--json")
    report = json.loads(raw)
    assert code == 1
    assert report["problems"][0].startswith(expected)
    assert all(verdict["reasons"] for verdict in report["plugins"])


def test_doctor_sees_that_the_environment_hides_the_flag(fine, capsys):
    fine.setenv("VLLM_PLUGINS", "other")
    code, text, _ = run(capsys, "doctor")
    assert code == 1
    assert (
        "VLLM_PLUGINS=other hides the flag; set VLLM_PLUGINS=other,vllm_plugins or unset it" in text
    )


def test_doctor_sees_a_missing_entry_point(fine, capsys):
    stock = doctor.metadata.entry_points
    fine.setattr(
        doctor.metadata,
        "entry_points",
        lambda **wanted: () if wanted.get("group") == doctor.GENERAL_GROUP else stock(**wanted),
    )
    code, text, _ = run(capsys, "doctor")
    assert code == 1
    assert "the entry point is missing; reinstall vllm-plugins" in text


def test_doctor_reports_a_vllm_that_does_not_start(fine, capsys):
    fine.setattr(doctor, "ask_engine", lambda: doctor.Engine(error="ImportError: libcuda.so.1"))
    code, text, _ = run(capsys, "doctor")
    assert code == 1
    assert "problem: vLLM does not start here: ImportError: libcuda.so.1" in text


@pytest.mark.engine
def test_doctor_asks_the_real_vllm_and_keeps_its_log_out_of_the_report():
    done = subprocess.run(
        [sys.executable, "-m", "vllm_plugins.cli.main", "doctor", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    engine = json.loads(done.stdout)["engine"]
    assert engine["error"] == ""
    assert engine["platform"]
    assert engine["device"]
    assert engine["runner"] in ("V1", "V2")


def test_options_given_to_describe_are_checked():
    with pytest.raises(PluginError, match="unknown option"):
        describe.describe(PluginSpec("spf", {"gama": 1}))
    assert validate_options(load("spf"), {}) is not None
    assert main.COMMANDS["list"] == listing.HELP
